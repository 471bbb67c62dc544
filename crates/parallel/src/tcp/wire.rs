//! Tensors as bytes, little endian.

use burn::tensor::{DType, Device, Tensor, TensorData, bf16};

use super::frame::WireType;

/// The elements of `tensor`; waits for its device.
///
/// # Errors
/// If its precision does not travel, or what computes it failed.
pub fn to_bytes(tensor: Tensor<1>) -> Result<(WireType, Vec<u8>), String> {
    // What travels belongs to no tape.
    let tensor = match tensor.is_autodiff() {
        true => tensor.inner(),
        false => tensor,
    };
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    let told = |error| format!("{error:?}");
    match data.dtype() {
        DType::F32 => {
            let values = data.as_slice::<f32>().map_err(told)?;
            let mut bytes = vec![0; 4 * values.len()];
            for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *to = value.to_le_bytes();
            }
            Ok((WireType::F32, bytes))
        }
        DType::BF16 => {
            let values = data.as_slice::<bf16>().map_err(told)?;
            let mut bytes = vec![0; 2 * values.len()];
            for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *to = value.to_le_bytes();
            }
            Ok((WireType::Bf16, bytes))
        }
        other => Err(format!("{other:?} does not travel: f32 and bf16 do")),
    }
}

/// The tensor again. A remainder of bytes, which a frame's header excludes, is left out.
pub fn from_bytes(dtype: WireType, bytes: &[u8], device: &Device) -> Tensor<1> {
    match dtype {
        WireType::Bf16 => {
            let (values, _) = bytes.as_chunks::<2>();
            let values: Vec<bf16> = values.iter().map(|&v| bf16::from_le_bytes(v)).collect();
            let len = values.len();
            Tensor::from_data(TensorData::new(values, [len]), (device, DType::BF16))
        }
        WireType::F32 | WireType::None => {
            let (values, _) = bytes.as_chunks::<4>();
            let values: Vec<f32> = values.iter().map(|&v| f32::from_le_bytes(v)).collect();
            let len = values.len();
            Tensor::from_data(TensorData::new(values, [len]), (device, DType::F32))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_come_back() {
        let device = Device::flex();
        let values = vec![1.0, -0.0, f32::NAN, f32::INFINITY, 1e-40, 3.25];
        for (dtype, wire, bytes) in [
            (DType::F32, WireType::F32, 24),
            (DType::BF16, WireType::Bf16, 12),
        ] {
            let tensor = Tensor::from_data(TensorData::new(values.clone(), [6]), (&device, dtype));
            let (sent, data) = to_bytes(tensor.clone()).expect("a float");
            assert_eq!((sent, data.len()), (wire, bytes));
            let back = from_bytes(sent, &data, &device);
            assert_eq!(back.dtype(), dtype);
            assert_eq!(back.into_data().as_bytes(), tensor.into_data().as_bytes());
        }
        let double = Tensor::<1>::zeros([1], (&device, DType::F64));
        assert!(to_bytes(double).expect_err("f64").contains("F64"));
    }
}
