//! Which precision sums are kept in.

use burn::tensor::{DType, FloatDType, Tensor};

/// The precision in which statistics and running sums over `dtype` values are kept: f64 for f64
/// (so that gradients can be checked by finite differences), f32 for everything else.
pub fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// `tensor` in [`wide`] precision; free when it already is.
pub fn widen<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    let to = wide(tensor.dtype());
    cast(tensor, to)
}

/// `tensor` as `dtype`; free when it already is.
///
/// # Panics
/// If `dtype` is not a float type.
pub fn cast<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype {
        return tensor;
    }
    tensor.cast(float(dtype))
}

fn float(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        DType::F32 => FloatDType::F32,
        DType::F16 => FloatDType::F16,
        DType::BF16 => FloatDType::BF16,
        other => panic!("{other:?} is not a float type of this crate"),
    }
}
