//! The SwiGLU MLP, whose down projection learns in TTT layers.

use burn::tensor::Tensor;
use ttt_kernels::fused::{self, GateWeights};
use ttt_kernels::{linear, swiglu};

use crate::config::{ModelConfig, Target};
use crate::model::Batch;
use crate::params::Params;
use crate::ttt::{Ttt, TttOutput};

/// The MLP half of a block.
#[derive(Clone, Debug)]
pub struct Mlp {
    gate_proj: Tensor<2>,
    up_proj: Tensor<2>,
    down_proj: Tensor<2>,
    ttt: Option<Ttt>,
}

/// What an MLP returns.
#[derive(Debug)]
pub struct MlpOutput {
    /// `[B, N, D]`
    pub output: Tensor<3>,
    /// See [`TttOutput::state_ratio`]; `None` in ordinary layers.
    pub state_ratio: Option<Tensor<1>>,
}

impl Mlp {
    /// The MLP of layer `layer`.
    pub fn new(config: &ModelConfig, layer: usize, params: &Params) -> Self {
        Self {
            gate_proj: params.expect("mlp.gate_proj.weight"),
            up_proj: params.expect("mlp.up_proj.weight"),
            down_proj: params.expect("mlp.down_proj.weight"),
            ttt: config.is_ttt_layer(layer).then(|| Ttt::new(config, params)),
        }
    }

    /// The TTT part, if this layer learns.
    pub fn ttt(&self) -> Option<&Ttt> {
        self.ttt.as_ref()
    }

    /// W_0: `[D, F]`.
    pub fn down_proj(&self) -> &Tensor<2> {
        &self.down_proj
    }

    /// Z = silu(x W_gateᵀ) ∘ (x W_upᵀ): `[B, N, D]` → `[B, N, F]`.
    pub fn activate(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = linear(x.clone(), self.gate_proj.clone());
        swiglu(gate, linear(x, self.up_proj.clone()))
    }

    /// x + mlp(norm(x)) as one operation, where the device has it and the layer's targets do not need the
    /// normed input: x, embeddings `[B, N, D]`, the norm's gain `[D]`.
    pub(crate) fn fused(
        &self,
        x: &Tensor<3>,
        embeddings: &Tensor<3>,
        (gain, eps): (&Tensor<1>, f64),
        batch: &Batch,
    ) -> Option<MlpOutput> {
        let gate = self.gate(gain, eps);
        let Some(ttt) = &self.ttt else {
            return Some(MlpOutput {
                output: fused::mlp_sublayer(x, &gate, &self.down_proj)?,
                state_ratio: None,
            });
        };
        if ttt.config().target == Target::Hidden {
            return None;
        }
        let (source, w0) = (embeddings.clone(), self.down_proj.clone());
        let done = ttt.fused(x, &gate, source, w0, batch)?;
        Some(done.into())
    }

    /// Z from the input of the norm, as one operation, where the device has it and the layer's
    /// targets do not need the normed input.
    pub(crate) fn fused_activate(
        &self,
        x: &Tensor<3>,
        gain: &Tensor<1>,
        eps: f64,
    ) -> Option<Tensor<3>> {
        let hidden = |ttt: &Ttt| ttt.config().target == Target::Hidden;
        match &self.ttt {
            Some(ttt) if hidden(ttt) => None,
            _ => fused::gated(x, &self.gate(gain, eps)),
        }
    }

    fn gate<'a>(&'a self, norm: &'a Tensor<1>, eps: f64) -> GateWeights<'a> {
        GateWeights {
            norm,
            gate: &self.gate_proj,
            up: &self.up_proj,
            eps,
        }
    }

    /// x, embeddings: `[B, N, D]`.
    pub fn forward(&self, x: Tensor<3>, embeddings: Tensor<3>, batch: &Batch) -> MlpOutput {
        let z = self.activate(x.clone());
        let source = match &self.ttt {
            Some(ttt) => ttt.source(x, embeddings),
            None => embeddings,
        };
        self.down(z, source, batch)
    }

    /// The down projection of z `[B, N, F]`; `source` `[B, N, D]` is where targets come from.
    pub(crate) fn down(&self, z: Tensor<3>, source: Tensor<3>, batch: &Batch) -> MlpOutput {
        match &self.ttt {
            None => MlpOutput {
                output: linear(z, self.down_proj.clone()),
                state_ratio: None,
            },
            Some(ttt) => ttt.down(z, source, self.down_proj.clone(), batch).into(),
        }
    }
}

impl From<TttOutput> for MlpOutput {
    fn from(done: TttOutput) -> Self {
        Self {
            output: done.output,
            state_ratio: Some(done.state_ratio),
        }
    }
}
