//! The ends of the model: embedding, head, and what a batch brings along.

use burn::tensor::{DType, Device, Int, Tensor};
use ttt_kernels::{
    Context, Packing, embedding, linear, linear_cross_entropy, rms_norm, token_losses,
};

use crate::config::ModelConfig;
use crate::params::Params;
use crate::rope::RopeTable;

/// What every block needs to know about a batch beside its activations.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The documents of the rows, or of this rank's part of them.
    pub packing: Packing,
    /// The ranks that have the other parts of the rows, if there are any.
    pub context: Option<Context>,
    /// RoPE tables for the positions of the tokens in their rows.
    pub rope: RopeTable,
    /// Bound on the fast updates: `config.ttt.clip` at inference, `None` in training.
    pub clip: Option<f64>,
}

impl Batch {
    /// A batch to train on.
    pub fn training(config: &ModelConfig, packing: Packing, device: &Device) -> Self {
        Self {
            rope: RopeTable::new(config, packing.positions(), device),
            packing,
            context: None,
            clip: None,
        }
    }

    /// A batch to evaluate: fast updates are clipped if the model says so.
    pub fn inference(config: &ModelConfig, packing: Packing, device: &Device) -> Self {
        Self {
            clip: config.ttt.clip,
            ..Self::training(config, packing, device)
        }
    }
}

/// The embedding.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[V, D]`
    pub weight: Tensor<2>,
}

impl Embedding {
    /// From the parameters of its unit.
    pub fn new(params: &Params) -> Self {
        Self {
            weight: params.expect("model.embed_tokens.weight"),
        }
    }

    /// ids `[B, N]` → `[B, N, D]` in precision `dtype`.
    pub fn forward(&self, ids: Tensor<2, Int>, dtype: DType) -> Tensor<3> {
        embedding(ids, self.weight.clone(), dtype)
    }
}

/// The last norm and the output matrix.
#[derive(Clone, Debug)]
pub struct Head {
    norm: Tensor<1>,
    weight: Tensor<2>,
    eps: f64,
}

impl Head {
    /// From the parameters of its unit; `tied` is the embedding where the head has no matrix of
    /// its own.
    ///
    /// # Panics
    /// If the head has no matrix and none is given.
    pub fn new(config: &ModelConfig, params: &Params, tied: Option<Tensor<2>>) -> Self {
        Self {
            norm: params.expect("model.norm.weight"),
            weight: params
                .get("lm_head.weight")
                .or(tied)
                .expect("a head of its own or the embedding"),
            eps: config.rms_norm_eps,
        }
    }

    /// The normed hidden states, one row per token: `[B, N, D]` → `[B·N, D]`.
    fn hidden(&self, x: Tensor<3>) -> Tensor<2> {
        let [batch, tokens, width] = x.dims();
        rms_norm(x, self.norm.clone(), self.eps).reshape([batch * tokens, width])
    }

    /// `scale` times the summed cross-entropy: x `[B, N, D]`, labels `[B·N]` → `[1]` f32.
    pub fn loss(&self, x: Tensor<3>, labels: Tensor<1, Int>, scale: f64) -> Tensor<1> {
        linear_cross_entropy(self.hidden(x), self.weight.clone(), labels, scale)
    }

    /// The cross-entropy of each token, 0 where it has no label: `[B·N]` f32. No gradient.
    pub fn token_losses(&self, x: Tensor<3>, labels: Tensor<1, Int>) -> Tensor<1> {
        token_losses(self.hidden(x), self.weight.clone(), labels)
    }

    /// `[B, N, D]` → `[B, N, V]`. All logits at once: for few tokens.
    pub fn logits(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let logits = linear(self.hidden(x), self.weight.clone());
        let vocab = logits.dims()[1];
        logits.reshape([batch, tokens, vocab])
    }
}
