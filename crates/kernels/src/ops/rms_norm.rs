//! Root mean square normalisation.

use burn::tensor::Tensor;

use crate::dtype::{cast, wide, widen};
use crate::function::{Forward, Function, Value, apply};

/// `y = w ∘ x / sqrt(mean(x²) + eps)` over the last dimension: x `[.., K]`, weight `[K]`.
///
/// The statistic and the product are taken in f32 and rounded once.
pub fn rms_norm<const R: usize>(x: Tensor<R>, weight: Tensor<1>, eps: f64) -> Tensor<R> {
    let dims = x.dims();
    let width = dims[R - 1];
    let x: Tensor<2> = x.reshape([dims.iter().product::<usize>() / width, width]);
    apply(RmsNorm { eps }, [x.into(), weight.into()])
        .tensor::<2>()
        .reshape(dims)
}

#[derive(Debug)]
struct RmsNorm {
    eps: f64,
}

impl RmsNorm {
    /// 1 / sqrt(mean(x²) + eps): `[T, 1]`.
    fn reciprocal(&self, x: Tensor<2>) -> Tensor<2> {
        x.square().mean_dim(1).add_scalar(self.eps).sqrt().recip()
    }
}

impl Function<2> for RmsNorm {
    type Saved = (Tensor<2>, Tensor<1>);

    fn forward(&self, [x, weight]: [Value; 2]) -> Forward<Self::Saved> {
        let (x, weight) = (x.tensor::<2>(), weight.tensor::<1>());
        #[cfg(feature = "cuda")]
        if let Some(y) = crate::cuda::norm::forward(&x, &weight, self.eps) {
            return Forward {
                output: y.into(),
                extra: vec![],
                saved: (x, weight),
            };
        }
        let wide_x = widen(x.clone());
        let gain = cast(weight.clone(), wide(x.dtype())).unsqueeze::<2>();
        let y = wide_x.clone() * self.reciprocal(wide_x) * gain;
        Forward {
            output: cast(y, x.dtype()).into(),
            extra: vec![],
            saved: (x, weight),
        }
    }

    /// With x̂ = x r: dx = r (w dy − x̂ mean(w dy x̂)), dw = Σ dy x̂.
    fn backward(
        self,
        (x, weight): Self::Saved,
        dy: Value,
        _wanted: [bool; 2],
    ) -> [Option<Value>; 2] {
        let dtypes = (x.dtype(), weight.dtype());
        let dy = dy.tensor::<2>();
        #[cfg(feature = "cuda")]
        if let Some((dx, dw)) = crate::cuda::norm::backward(&x, &weight, &dy, self.eps) {
            return [Some(dx.into()), Some(dw.into())];
        }
        let (x, dy) = (widen(x), widen(dy));
        let gain = cast(weight, x.dtype()).unsqueeze::<2>();
        let reciprocal = self.reciprocal(x.clone());
        let normed = x * reciprocal.clone();
        let dw = (dy.clone() * normed.clone()).sum_dim(0).squeeze_dim::<1>(0);
        let scaled = dy * gain;
        let along = (scaled.clone() * normed.clone()).mean_dim(1);
        let dx = (scaled - normed * along) * reciprocal;
        [
            Some(cast(dx, dtypes.0).into()),
            Some(cast(dw, dtypes.1).into()),
        ]
    }
}
