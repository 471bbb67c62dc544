//! Opening the device a run asks for.

use burn::tensor::{DType, Device, Tensor};

use crate::config::{DeviceKind, Precision};
use crate::error::TrainError;

/// The device of kind `kind` for the rank `local_rank` of this host, checked to be there: on GPUs, the
/// one of its number among those that the driver shows (`CUDA_VISIBLE_DEVICES`); the only one where
/// the starter shows each rank one; and whatever [`DEVICE_VARIABLE`] says.
///
/// # Errors
/// If the program was built without CUDA, or no GPU answers.
pub fn open(kind: DeviceKind, local_rank: usize) -> Result<Device, TrainError> {
    match kind {
        DeviceKind::Cpu => Ok(Device::flex()),
        DeviceKind::Cuda => open_cuda(local_rank),
    }
}

/// The environment variable that names the GPU to use instead of that of the rank's number. Ranks that
/// share one GPU are slow and good for tests alone.
pub const DEVICE_VARIABLE: &str = "TTT_CUDA_DEVICE";

/// Which of `count` GPUs is for the rank `local_rank`, where the variable says `asked`.
#[cfg(any(feature = "cuda", test))]
fn gpu_index(local_rank: usize, count: usize, asked: Option<&str>) -> Result<usize, String> {
    let there = match count {
        1 => "there is one GPU".to_string(),
        _ => format!("there are {count} GPUs"),
    };
    match asked.filter(|asked| !asked.is_empty()) {
        Some(asked) => match asked.parse() {
            Ok(index) if index < count => Ok(index),
            _ => Err(format!("{DEVICE_VARIABLE} is \"{asked}\", and {there}")),
        },
        None if local_rank < count => Ok(local_rank),
        None if count == 1 => Ok(0),
        None => Err(format!(
            "rank {local_rank} of this host has no GPU of its own, {there}: start as many ranks"
        )),
    }
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_local_rank: usize) -> Result<Device, TrainError> {
    Err(TrainError::Device {
        device: "cuda",
        problem:
            "this program was built without GPU support: build it with `cargo build --release \
                  --features cuda`, or set run.device = \"cpu\""
                .into(),
    })
}

#[cfg(feature = "cuda")]
fn open_cuda(local_rank: usize) -> Result<Device, TrainError> {
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
    let count = findings
        .iter()
        .filter(|f| f.what.starts_with("GPU"))
        .count();
    let asked = std::env::var(DEVICE_VARIABLE).ok();
    let index =
        gpu_index(local_rank, count, asked.as_deref()).map_err(|problem| TrainError::Device {
            device: "cuda",
            problem,
        })?;
    let device = Device::cuda(index);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_gpus() {
        assert_eq!(gpu_index(3, 8, None), Ok(3));
        assert_eq!(gpu_index(3, 8, Some("")), Ok(3));
        // Slurm's --gpus-per-task: each rank sees its own alone.
        assert_eq!(gpu_index(3, 1, None), Ok(0));
        assert_eq!(gpu_index(1, 8, Some("5")), Ok(5));
        for (refused, says) in [
            (gpu_index(2, 2, None), "there are 2 GPUs"),
            (gpu_index(0, 1, Some("1")), "there is one GPU"),
            (gpu_index(0, 4, Some("x")), "TTT_CUDA_DEVICE is \"x\""),
        ] {
            let refused = refused.expect_err(says);
            assert!(refused.contains(says), "{refused}");
        }
    }
}
