//! `y = x Wᵀ`.

use burn::tensor::{DType, Tensor};

use crate::dtype::cast;
use crate::function::{Forward, Function, Value, apply};

/// `y = x Wᵀ` in x's precision: x `[.., K]`, weight `[M, K]` (Hugging Face layout) → `[.., M]`.
///
/// A weight kept in another precision is cast; its gradient comes back in its own.
pub fn linear<const R: usize>(x: Tensor<R>, weight: Tensor<2>) -> Tensor<R> {
    let mut dims = x.dims();
    let inner = dims[R - 1];
    let rows = dims[..R - 1].iter().product();
    dims[R - 1] = weight.dims()[0];
    let x: Tensor<2> = x.reshape([rows, inner]);
    apply(Linear, [x.into(), weight.into()])
        .tensor::<2>()
        .reshape(dims)
}

#[derive(Debug)]
struct Linear;

impl Function<2> for Linear {
    type Saved = (Tensor<2>, Tensor<2>);

    fn forward(&self, [x, weight]: [Value; 2]) -> Forward<Self::Saved> {
        let (x, weight) = (x.tensor::<2>(), weight.tensor::<2>());
        let y = product(&x, &weight);
        Forward {
            output: y.into(),
            extra: vec![],
            saved: (x, weight),
        }
    }

    fn backward(
        self,
        (x, weight): Self::Saved,
        dy: Value,
        wanted: [bool; 2],
    ) -> [Option<Value>; 2] {
        let dy = dy.tensor::<2>();
        let dtype = weight.dtype();
        let dx = wanted[0].then(|| input_gradient(&dy, weight, x.dtype()).into());
        let dw = wanted[1].then(|| weight_gradient(dy, x, dtype).into());
        [dx, dw]
    }
}

/// x Wᵀ: x `[T, K]`, weight `[M, K]`.
pub(super) fn product(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "cuda")]
    if let Some(y) = crate::cuda::linear::forward(x, weight) {
        return y;
    }
    x.clone()
        .matmul(cast(weight.clone(), x.dtype()).transpose())
}

/// dy W: dy `[T, M]`.
pub(super) fn input_gradient(dy: &Tensor<2>, weight: Tensor<2>, dtype: DType) -> Tensor<2> {
    #[cfg(feature = "cuda")]
    if let Some(dx) = crate::cuda::linear::input_gradient(dy, &weight) {
        return dx;
    }
    dy.clone().matmul(cast(weight, dtype))
}

/// dyᵀ x in the weight's precision; summed wide on CUDA, whatever that is.
pub(super) fn weight_gradient(dy: Tensor<2>, x: Tensor<2>, dtype: DType) -> Tensor<2> {
    #[cfg(feature = "cuda")]
    if let Some(dw) = crate::cuda::linear::weight_gradient(&dy, &x, dtype) {
        return dw;
    }
    cast(dy.transpose().matmul(x), dtype)
}
