//! The MLP half whose down projection learns.

use burn::tensor::{DType, Tensor};

use super::mlp::{Inputs, Results, fits, gradient};
use crate::cuda::stream::{Buffer, on_stream};
use crate::dtype::cast;
use crate::function::{Forward, Function, Value, apply_with_extra};
use crate::fused::GateWeights;
use crate::ops::ttt::{FastWeightScan, Saved, Scan, ScanSpec};

/// `x + scan(swiglu(rms_norm(x)), v, w0)`.
pub fn ttt(
    x: &Tensor<3>,
    w: &GateWeights,
    v: impl FnOnce() -> Tensor<3>,
    w0: &Tensor<2>,
    spec: &ScanSpec,
) -> Option<Scan> {
    let w0_fits = matches!(w0.dtype(), DType::BF16 | DType::F32);
    if !(fits(x, w)? && w0_fits && spec.clip.is_none()) {
        return None;
    }
    let inputs = [
        x.clone().into(),
        w.norm.clone().into(),
        w.gate.clone().into(),
        w.up.clone().into(),
        cast(v(), DType::BF16).into(),
        w0.clone().into(),
    ];
    let half = Learning {
        eps: w.eps,
        scan: FastWeightScan { spec: spec.clone() },
    };
    let (output, mut extra) = apply_with_extra(half, inputs);
    Some(Scan {
        output: output.tensor(),
        state_norm: extra.swap_remove(0).tensor(),
    })
}

#[derive(Debug)]
struct Learning {
    eps: f64,
    scan: FastWeightScan,
}

/// x, gain, gate and up matrices.
type Gate = [Value; 4];

impl Function<6> for Learning {
    /// The gate's inputs, gate and up side by side, and the scan's part.
    type Saved = (Gate, Buffer, Saved);

    fn forward(&self, [x, gain, gate, up, v, w0]: [Value; 6]) -> Forward<Self::Saved> {
        let inputs = [x.clone(), gain, gate, up];
        let i = Inputs::new(inputs.clone(), self.eps);
        let (pair, z) = i.pair_and_z();
        let (output, norm, saved) = {
            let x: Tensor<3> = x.tensor();
            self.scan.run(z, v.tensor(), w0.tensor(), Some(&x))
        };
        Forward {
            output: output.into(),
            extra: vec![norm.into()],
            saved: (inputs, pair, saved),
        }
    }

    fn forward_only(&self, [x, gain, gate, up, v, w0]: [Value; 6]) -> (Value, Vec<Value>) {
        let z = Inputs::new([x.clone(), gain, gate, up], self.eps).only_z();
        let x: Tensor<3> = x.tensor();
        let (output, norm, _) = self.scan.run(z, v.tensor(), w0.tensor(), Some(&x));
        (output.into(), vec![norm.into()])
    }

    fn backward(
        self,
        (inputs, pair, saved): Self::Saved,
        dy: Value,
        _: [bool; 6],
    ) -> [Option<Value>; 6] {
        let i = Inputs::new(inputs, self.eps);
        let dy = gradient(dy);
        let checked = "checked before the operation was chosen";
        let scan = self.scan;
        let done = scan.differentiate_gated(saved, dy.clone().tensor(), &pair);
        let done = done.expect(checked);
        let r = i.results_with(Buffer::of(&done.z).expect(checked));
        let mut reads = i.reads();
        reads.push(&dy);
        on_stream(&reads, &r.writes(), |cx, from, to| {
            i.backward(cx, from, &Results::at(to, from[4]))
        });
        let [dx, dgain, dgate, dup] = r.gradients(i.f);
        [dx, dgain, dgate, dup, done.v.into(), done.w0.into()].map(Some)
    }
}
