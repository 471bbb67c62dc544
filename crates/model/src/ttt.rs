//! The target side of an In-Place TTT layer: what the fast weight learns to predict.

use burn::tensor::{DType, Tensor};
use ttt_kernels::dtype::cast;
use ttt_kernels::fused::{self, GateWeights};
use ttt_kernels::ops::flat::Part;
use ttt_kernels::ttt::{Scan, ScanSpec, chunk_conv, fast_weight_scan, shift_targets, targets};
use ttt_kernels::{Packing, linear, square_sum};

use crate::config::{ModelConfig, Target, TttConfig};
use crate::model::Batch;
use crate::params::Params;

/// The learned parts of a TTT layer beside its MLP.
#[derive(Clone, Debug)]
pub struct Ttt {
    config: TttConfig,
    /// Taps of the convolution: `[D, 1, K]`; none for `next_token`.
    conv: Option<Tensor<3>>,
    /// W_t: `[D, D]`, applied untransposed, as the release does.
    projection: Option<Tensor<2>>,
}

/// What [`Ttt::down`] returns.
#[derive(Debug)]
pub struct TttOutput {
    /// `[B, N, D]`
    pub output: Tensor<3>,
    /// ‖η S‖_F / ‖W_0‖_F for the largest final state of a document (of those that end on this rank),
    /// f32 `[1]`.
    pub state_ratio: Tensor<1>,
}

impl Ttt {
    /// The TTT part of a learning layer.
    pub fn new(config: &ModelConfig, params: &Params) -> Self {
        Self {
            config: config.ttt.clone(),
            conv: params.get("mlp.ttt_conv.weight"),
            projection: params.get("mlp.ttt_proj.weight"),
        }
    }

    /// The layer's settings.
    pub fn config(&self) -> &TttConfig {
        &self.config
    }

    /// Where targets come from: embeddings or the MLP's input x, both `[B, N, D]`.
    pub fn source(&self, x: Tensor<3>, embeddings: Tensor<3>) -> Tensor<3> {
        match self.config.target {
            Target::Hidden => x,
            Target::Embedding | Target::NextToken => embeddings,
        }
    }

    /// V = conv(source) W_t: `[B, N, D]` → `[B, N, D]`.
    pub fn targets(&self, source: Tensor<3>, packing: &Packing) -> Tensor<3> {
        let chunk = self.config.chunk;
        match (&self.conv, &self.projection) {
            (Some(taps), Some(w)) => targets(source, taps.clone(), w.clone(), packing, chunk),
            (Some(taps), None) => chunk_conv(source, taps.clone(), packing, chunk),
            // linear() computes x Wᵀ; W_t is used untransposed (docs/in-place-ttt.md, section 1).
            (None, Some(w)) => linear(shift_targets(source, packing, chunk), w.clone().transpose()),
            (None, None) => shift_targets(source, packing, chunk),
        }
    }

    /// The down projection with fast weights: z `[B, N, F]`, source `[B, N, D]`, w0 `[D, F]`.
    pub fn down(&self, z: Tensor<3>, source: Tensor<3>, w0: Tensor<2>, batch: &Batch) -> TttOutput {
        let v = self.targets(source, &batch.packing);
        let scan = fast_weight_scan(z, v, w0.clone(), self.spec(batch));
        self.output(scan, w0)
    }

    /// x + [`Ttt::down`] of Z, from the input of the norm before the MLP, as one operation, where the
    /// device has it: x `[B, N, D]`.
    pub(crate) fn fused(
        &self,
        x: &Tensor<3>,
        gate: &GateWeights,
        source: Tensor<3>,
        w0: Tensor<2>,
        batch: &Batch,
    ) -> Option<TttOutput> {
        let v = || self.targets(source, &batch.packing);
        let scan = fused::ttt_sublayer(x, gate, v, &w0, &self.spec(batch))?;
        Some(self.output(scan, w0))
    }

    fn spec(&self, batch: &Batch) -> ScanSpec {
        ScanSpec {
            lr: self.config.lr,
            chunk: self.config.chunk,
            clip: batch.clip,
            packing: batch.packing.clone(),
            context: batch.context.clone(),
        }
    }

    fn output(&self, scan: Scan, w0: Tensor<2>) -> TttOutput {
        let norm = square_sum(&[Part::Values(w0.inner().reshape([-1]))]).sqrt();
        let state = cast(scan.state_norm, DType::F32);
        TttOutput {
            output: scan.output,
            state_ratio: state.mul_scalar(self.config.lr) / norm,
        }
    }
}
