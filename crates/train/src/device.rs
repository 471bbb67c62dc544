//! Opening the device a run asks for.

use burn::tensor::{DType, Device, Tensor};

use crate::config::{DeviceKind, Precision};
use crate::error::TrainError;

/// The device of kind `kind`, checked to be there.
///
/// # Errors
/// If the program was built without CUDA, or no GPU answers.
pub fn open(kind: DeviceKind) -> Result<Device, TrainError> {
    match kind {
        DeviceKind::Cpu => Ok(Device::flex()),
        DeviceKind::Cuda => open_cuda(),
    }
}

#[cfg(not(feature = "cuda"))]
fn open_cuda() -> Result<Device, TrainError> {
    Err(TrainError::Device {
        device: "cuda",
        problem:
            "this program was built without GPU support: build it with `cargo build --release \
                  --features cuda`, or set run.device = \"cpu\""
                .into(),
    })
}

#[cfg(feature = "cuda")]
fn open_cuda() -> Result<Device, TrainError> {
    let refuse = |problem: &str| TrainError::Device {
        device: "cuda",
        problem: format!(
            "no usable NVIDIA GPU ({problem}): see `ttt doctor`, or set run.device = \"cpu\""
        ),
    };
    // Asked before the first tensor is made: making one panics where there is no driver.
    let findings = ttt_kernels::doctor::system();
    if let Some(missing) = findings
        .iter()
        .find(|f| f.what.starts_with("GPU") && !f.fine)
    {
        return Err(refuse(&missing.answer));
    }
    let device = Device::cuda(0);
    match Tensor::<1>::ones([1], &device).try_into_data() {
        Ok(_) => Ok(device),
        Err(error) => Err(refuse(&error.to_string())),
    }
}

/// The precision that activations are computed in, by default f32 on a CPU and bf16 on a GPU.
pub fn compute_dtype(kind: DeviceKind, asked: Option<Precision>) -> DType {
    match (asked, kind) {
        (Some(Precision::F32), _) | (None, DeviceKind::Cpu) => DType::F32,
        (Some(Precision::Bf16), _) | (None, DeviceKind::Cuda) => DType::BF16,
    }
}

/// The element of a `[1]` tensor; waits for the device.
///
/// # Errors
/// If what computes it failed.
pub fn read_scalar(tensor: &Tensor<1>) -> Result<f64, TrainError> {
    read(tensor).map(|values| values[0])
}

/// The elements of a vector; waits for the device.
///
/// # Errors
/// If what computes it failed.
pub fn read(tensor: &Tensor<1>) -> Result<Vec<f64>, TrainError> {
    let data = tensor
        .try_to_data()
        .map_err(|error| TrainError::Execution(error.to_string()))?;
    data.convert::<f64>()
        .try_into_vec()
        .map_err(|error| TrainError::Execution(format!("{error:?}")))
}

/// The elements of an f32 vector, bit for bit; waits for the device.
///
/// # Errors
/// If what computes it failed.
pub fn read_f32(tensor: &Tensor<1>) -> Result<Vec<f32>, TrainError> {
    let data = tensor
        .try_to_data()
        .map_err(|error| TrainError::Execution(error.to_string()))?;
    data.try_into_vec()
        .map_err(|error| TrainError::Execution(format!("{error:?}")))
}
