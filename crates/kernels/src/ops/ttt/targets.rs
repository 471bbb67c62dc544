//! Targets: what the fast weight learns to predict.

use burn::tensor::Tensor;

use super::conv::ChunkConv;
use crate::function::{Forward, Function, Value, apply};
use crate::ops::linear::{input_gradient, product, weight_gradient};
use crate::packing::Packing;

/// `V = conv(x) W_t`, the convolution that of [`super::chunk_conv`]: x `[B, N, D]`, taps `[D, 1, K]`, projection
/// `[D, D]`, applied untransposed → `[B, N, D]`. The convolution is cheap next to the memory of what it makes,
/// so that is not kept but made again in the backward pass.
pub fn targets(
    x: Tensor<3>,
    taps: Tensor<3>,
    projection: Tensor<2>,
    packing: &Packing,
    chunk: usize,
) -> Tensor<3> {
    let targets = Targets {
        conv: ChunkConv::new(packing, chunk),
    };
    apply(targets, [x.into(), taps.into(), projection.into()]).tensor()
}

#[derive(Debug)]
struct Targets {
    conv: ChunkConv,
}

impl Targets {
    /// The convolution: `[T, D]`.
    fn mixed(&self, x: &Value, taps: &Value) -> Tensor<2> {
        let mixed = self.conv.forward([x.clone(), taps.clone()]).output;
        rows(mixed.tensor())
    }
}

fn rows(x: Tensor<3>) -> Tensor<2> {
    let [batch, tokens, width] = x.dims();
    x.reshape([batch * tokens, width])
}

impl Function<3> for Targets {
    type Saved = [Value; 3];

    fn forward(&self, [x, taps, projection]: [Value; 3]) -> Forward<Self::Saved> {
        let weight = projection.clone().tensor::<2>().transpose();
        let v = product(&self.mixed(&x, &taps), &weight);
        let shape = x.clone().tensor::<3>().dims();
        Forward {
            output: v.reshape(shape).into(),
            extra: vec![],
            saved: [x, taps, projection],
        }
    }

    /// dU = dV W_tᵀ, dW_t = Uᵀ dV, and on through the convolution.
    fn backward(
        self,
        [x, taps, projection]: Self::Saved,
        dv: Value,
        wanted: [bool; 3],
    ) -> [Option<Value>; 3] {
        let dv = dv.tensor::<3>();
        let shape = dv.dims();
        let dv = rows(dv);
        let (wide, weight) = (dv.dtype(), projection.tensor::<2>());
        let dtype = weight.dtype();
        let du = input_gradient(&dv, weight.transpose(), wide).reshape(shape);
        let dprojection = weight_gradient(self.mixed(&x, &taps), dv, dtype);
        let saved = (x.tensor(), taps.tensor());
        let both = [wanted[0], wanted[1]];
        let [dx, dtaps] = self.conv.backward(saved, du.into(), both);
        [dx, dtaps, Some(dprojection.into())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear;
    use crate::testing::{normal, values};
    use crate::ttt::chunk_conv;
    use burn::tensor::{DType, Device};

    #[test]
    fn values_and_gradients_are_those_of_the_single_operations() {
        let device = Device::flex().autodiff();
        let packing = Packing::new(12, vec![vec![0, 5], vec![0]]).expect("ascending");
        let input = |shape: &[usize], seed| -> Tensor<1> {
            let plain = Device::flex();
            let flat: Tensor<1> = normal([shape.iter().product()], 1.0, seed, &plain, DType::F32);
            Tensor::from_data(flat.to_data(), &device).require_grad()
        };
        let run = |fused: bool| {
            let (x, taps, weight) = (input(&[2, 12, 8], 1), input(&[8, 5], 2), input(&[8, 8], 3));
            let (x3, w2) = (
                x.clone().reshape([2, 12, 8]),
                weight.clone().reshape([8, 8]),
            );
            let k3: Tensor<3> = taps.clone().reshape([8, 1, 5]);
            let v = match fused {
                true => targets(x3, k3, w2, &packing, 4),
                false => linear(chunk_conv(x3, k3, &packing, 4), w2.transpose()),
            };
            let grads = (v.clone() * v.clone()).sum().backward();
            let of = |t: &Tensor<1>| values(&t.grad(&grads).expect("a gradient"));
            [
                values(&v.inner().reshape([-1])),
                of(&x),
                of(&taps),
                of(&weight),
            ]
        };
        for (fused, single) in run(true).iter().zip(run(false)) {
            let worst = fused.iter().zip(&single).map(|(a, b)| (a - b).abs());
            assert!(worst.fold(0.0, f64::max) < 1e-4);
            assert!(single.iter().any(|x| x.abs() > 0.1));
        }
    }
}
