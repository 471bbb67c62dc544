//! `y = x Wᵀ` and its gradients.

use burn::tensor::{DType, Tensor};

use super::gemm::{Matrix, Operand};
use super::stream::on_stream;
use crate::dtype::cast;

/// a · b in a's precision: `[m, k]`, `[k, n]` → `[m, n]`, written as `dtype`; transposed views cost
/// nothing.
fn product(a: &Tensor<2>, b: &Tensor<2>, dtype: DType) -> Option<Tensor<2>> {
    let (a, b) = (Operand::of(a)?, Operand::of(b)?);
    if a.buffer.dtype() != DType::BF16 || b.buffer.dtype() != DType::BF16 {
        return None;
    }
    let (m, n) = (a.buffer.dims()[0], b.buffer.dims()[1]);
    let out = a.buffer.empty([m, n], dtype);
    on_stream(&[&a.buffer, &b.buffer], &[&out], |cx, from, to| {
        cx.gemm(
            a.at(from[0]),
            b.at(from[1]),
            Matrix::new(to[0], m, n, dtype),
            1.0,
            0.0,
        )
    });
    Some(out.tensor())
}

/// x `[T, K]` bf16, weight `[M, K]` → `[T, M]`.
pub fn forward(x: &Tensor<2>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    if x.dtype() != DType::BF16 {
        return None;
    }
    let weight = cast(weight.clone(), DType::BF16);
    product(x, &weight.transpose(), DType::BF16)
}

/// dy W: `[T, M]` bf16 → `[T, K]`.
pub fn input_gradient(dy: &Tensor<2>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    if dy.dtype() != DType::BF16 {
        return None;
    }
    product(dy, &cast(weight.clone(), DType::BF16), DType::BF16)
}

/// dyᵀ x: `[M, K]`, in bf16 for a bf16 weight, else in f32.
pub fn weight_gradient(dy: &Tensor<2>, x: &Tensor<2>, weight: DType) -> Option<Tensor<2>> {
    let dtype = match weight {
        DType::BF16 => DType::BF16,
        _ => DType::F32,
    };
    product(&dy.clone().transpose(), x, dtype)
}
