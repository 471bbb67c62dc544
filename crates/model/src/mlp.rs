//! The SwiGLU MLP, whose down projection learns in TTT layers.

use burn::tensor::Tensor;
use ttt_kernels::{Packing, linear, swiglu};

use crate::config::ModelConfig;
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

    /// x, embeddings: `[B, N, D]`. `clip` bounds the fast updates, at inference only.
    pub fn forward(
        &self,
        x: Tensor<3>,
        embeddings: Tensor<3>,
        packing: &Packing,
        clip: Option<f64>,
    ) -> MlpOutput {
        let z = self.activate(x.clone());
        match &self.ttt {
            None => MlpOutput {
                output: linear(z, self.down_proj.clone()),
                state_ratio: None,
            },
            Some(ttt) => {
                let source = ttt.source(x, embeddings);
                let TttOutput {
                    output,
                    state_ratio,
                } = ttt.down(z, source, self.down_proj.clone(), packing, clip);
                MlpOutput {
                    output,
                    state_ratio: Some(state_ratio),
                }
            }
        }
    }
}
