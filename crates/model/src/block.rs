//! One decoder block.

use burn::tensor::Tensor;
use ttt_kernels::rms_norm;

use crate::attention::Attention;
use crate::config::ModelConfig;
use crate::mlp::{Mlp, MlpOutput};
use crate::model::Batch;
use crate::params::Params;

/// x + attention(norm(x)), then x + mlp(norm(x)).
#[derive(Clone, Debug)]
pub struct Block {
    pub(crate) input_layernorm: Tensor<1>,
    pub(crate) self_attn: Attention,
    pub(crate) post_attention_layernorm: Tensor<1>,
    pub(crate) mlp: Mlp,
    pub(crate) eps: f64,
}

impl Block {
    /// Block `layer` with the parameters of its unit.
    pub fn new(config: &ModelConfig, layer: usize, params: &Params) -> Self {
        Self {
            input_layernorm: params.expect("input_layernorm.weight"),
            self_attn: Attention::new(config, layer, params),
            post_attention_layernorm: params.expect("post_attention_layernorm.weight"),
            mlp: Mlp::new(config, layer, params),
            eps: config.rms_norm_eps,
        }
    }

    /// x, embeddings: `[B, N, D]` → `[B, N, D]`.
    pub fn forward(&self, x: Tensor<3>, embeddings: Tensor<3>, batch: &Batch) -> MlpOutput {
        let x = self.attention_half(x, batch);
        self.mlp_half(x, embeddings, batch)
    }

    /// x + attention(norm(x))
    fn attention_half(&self, x: Tensor<3>, batch: &Batch) -> Tensor<3> {
        let fused = self.self_attn.fused(&x, &self.input_layernorm, batch);
        if let Some(x) = fused {
            return x;
        }
        let normed = rms_norm(x.clone(), self.input_layernorm.clone(), self.eps);
        let qkv = self.self_attn.project(normed, &batch.rope);
        x + self.self_attn.attend_within(qkv, batch)
    }

    /// x + mlp(norm(x))
    fn mlp_half(&self, x: Tensor<3>, embeddings: Tensor<3>, batch: &Batch) -> MlpOutput {
        let gain = &self.post_attention_layernorm;
        let norm = (gain, self.eps);
        if let Some(done) = self.mlp.fused(&x, &embeddings, norm, batch) {
            return done;
        }
        let mlp = match self.mlp.fused_activate(&x, gain, self.eps) {
            Some(z) => self.mlp.down(z, embeddings, batch),
            None => {
                let normed = rms_norm(x.clone(), gain.clone(), self.eps);
                self.mlp.forward(normed, embeddings, batch)
            }
        };
        MlpOutput {
            output: x + mlp.output,
            ..mlp
        }
    }
}
