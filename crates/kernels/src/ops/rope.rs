//! Rotary position embedding, Hugging Face's half-split convention.

use burn::tensor::Tensor;

use crate::dtype::{cast, widen};
use crate::function::{Forward, Function, Value, apply};

/// Rotates channel j of each head with channel j + E/2: x `[B, N, H, E]`; cos, sin `[N, E/2]` f32.
///
/// Computed in f32 and rounded once. The tables carry YaRN's attention factor, if any.
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    apply(Rope { cos, sin }, [x.into()]).tensor()
}

#[derive(Debug)]
struct Rope {
    cos: Tensor<2>,
    sin: Tensor<2>,
}

impl Rope {
    fn rotate(&self, x: Tensor<4>, sign: f64) -> Tensor<4> {
        #[cfg(feature = "cuda")]
        if let Some(y) = crate::cuda::pointwise::rope(&x, &self.cos, &self.sin, sign) {
            return y;
        }
        let dtype = x.dtype();
        let x = widen(x);
        let [batch, tokens, heads, size] = x.dims();
        let half = size / 2;
        let table = |t: &Tensor<2>| cast(t.clone(), x.dtype()).reshape([1, tokens, 1, half]);
        let (cos, sin) = (table(&self.cos), table(&self.sin).mul_scalar(sign));
        let range = |from: usize| [0..batch, 0..tokens, 0..heads, from..from + half];
        let (a, b) = (x.clone().slice(range(0)), x.slice(range(half)));
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let second = b * cos + a * sin;
        cast(Tensor::cat(vec![first, second], 3), dtype)
    }
}

impl Function<1> for Rope {
    type Saved = ();

    fn forward(&self, [x]: [Value; 1]) -> Forward<()> {
        Forward {
            output: self.rotate(x.tensor(), 1.0).into(),
            extra: vec![],
            saved: (),
        }
    }

    /// The transposed rotation: by −θ.
    fn backward(self, _: (), dy: Value, _: [bool; 1]) -> [Option<Value>; 1] {
        [Some(self.rotate(dy.tensor(), -1.0).into())]
    }
}
