//! `z = silu(gate) ∘ up`.

use burn::tensor::{Tensor, activation::sigmoid};

use crate::dtype::{cast, widen};
use crate::function::{Forward, Function, Value, apply};

/// `silu(gate) ∘ up`, elementwise, computed in f32 and rounded once: both `[.., F]`.
pub fn swiglu<const R: usize>(gate: Tensor<R>, up: Tensor<R>) -> Tensor<R> {
    let dims = gate.dims();
    let flat = |t: Tensor<R>| -> Tensor<1> { t.reshape([dims.iter().product::<usize>()]) };
    apply(SwiGlu, [flat(gate).into(), flat(up).into()])
        .tensor::<1>()
        .reshape(dims)
}

#[derive(Debug)]
struct SwiGlu;

impl Function<2> for SwiGlu {
    type Saved = (Tensor<1>, Tensor<1>);

    fn forward(&self, [gate, up]: [Value; 2]) -> Forward<Self::Saved> {
        let (gate, up) = (gate.tensor::<1>(), up.tensor::<1>());
        #[cfg(feature = "cuda")]
        if let Some(z) = crate::cuda::pointwise::swiglu(&gate, &up) {
            return Forward {
                output: z.into(),
                extra: vec![],
                saved: (gate, up),
            };
        }
        let g = widen(gate.clone());
        let z = g.clone() * sigmoid(g) * widen(up.clone());
        Forward {
            output: cast(z, gate.dtype()).into(),
            extra: vec![],
            saved: (gate, up),
        }
    }

    /// silu'(g) = σ(g) (1 + g (1 − σ(g))).
    fn backward(self, (gate, up): Self::Saved, dz: Value, _: [bool; 2]) -> [Option<Value>; 2] {
        let dtype = gate.dtype();
        let dz = dz.tensor::<1>();
        #[cfg(feature = "cuda")]
        if let Some((dgate, dup)) = crate::cuda::pointwise::swiglu_backward(&gate, &up, &dz) {
            return [Some(dgate.into()), Some(dup.into())];
        }
        let (g, u, dz) = (widen(gate), widen(up), widen(dz));
        let s = sigmoid(g.clone());
        let silu = g * s.clone();
        let slope = s.clone() + silu.clone() * (s.neg() + 1.0);
        let dgate = dz.clone() * u * slope;
        let dup = dz * silu;
        [
            Some(cast(dgate, dtype).into()),
            Some(cast(dup, dtype).into()),
        ]
    }
}
