//! Starting a backward pass from a gradient that is already known.

use burn::tensor::{Gradients, Tensor};

use crate::function::{Forward, Function, Value, apply};

/// Runs the backward pass of `y`'s graph with `dy` as the gradient of `y` (same shape).
///
/// This is how one layer's graph is continued from the next layer's input gradient.
///
/// # Panics
/// If `y` is not tracked.
pub fn backward_from<const R: usize>(y: Tensor<R>, dy: Tensor<R>) -> Gradients {
    let seed = Seed {
        dy: dy.inner().into(),
    };
    apply(seed, [y.into()]).tensor::<1>().backward()
}

#[derive(Debug)]
struct Seed {
    dy: Value,
}

impl Function<1> for Seed {
    type Saved = ();

    fn forward(&self, [y]: [Value; 1]) -> Forward<()> {
        Forward {
            output: Tensor::<1>::zeros([1], &y.device()).into(),
            extra: vec![],
            saved: (),
        }
    }

    fn backward(self, _: (), _: Value, _: [bool; 1]) -> [Option<Value>; 1] {
        [Some(self.dy)]
    }
}
