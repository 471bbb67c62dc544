//! Arithmetic per token, the base of MFU.
//!
//! One multiply-add counts as two operations; a backward pass as two forward passes. Norms, RoPE
//! and the embedding count nothing, activation recompute is not counted.

use crate::config::ModelConfig;

/// Operations per token of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardFlops {
    /// Matrix products with parameters, the head included.
    pub matmul: f64,
    /// Scores and mixing over the mean number of visible keys.
    pub attention: f64,
    /// The fast updates: VᵀZ, W_t and the convolution. Applying W_i in place of W_0 is the down
    /// projection itself.
    pub ttt: f64,
}

impl ForwardFlops {
    /// For rows of `sequence_length` tokens that are one document each.
    pub fn per_token(config: &ModelConfig, sequence_length: usize) -> Self {
        let (d, f) = (config.hidden_size as f64, config.intermediate_size as f64);
        let n = sequence_length as f64;
        let queries = (config.num_attention_heads * config.head_size()) as f64;
        let keys = (config.kv_heads() * config.head_size()) as f64;
        let layers = config.num_hidden_layers;
        let per_layer = d * (queries + 2.0 * keys) + queries * d + 3.0 * d * f;
        let attention = (0..layers).map(|layer| {
            let window = config.window(layer).unwrap_or(sequence_length);
            let w = window.min(sequence_length) as f64;
            4.0 * queries * (w - w * (w - 1.0) / (2.0 * n))
        });
        let chunks = sequence_length.div_ceil(config.ttt.chunk.max(1)) as f64;
        let projection = f64::from(u8::from(config.ttt.projection)) * 2.0 * d * d;
        let conv = config
            .ttt
            .conv_taps()
            .map_or(0.0, |taps| 2.0 * taps as f64 * d);
        let per_ttt_layer = 2.0 * d * f * (chunks - 1.0) / chunks + projection + conv;
        Self {
            matmul: 2.0 * (layers as f64 * per_layer + d * config.vocab_size as f64),
            attention: attention.sum(),
            ttt: match chunks > 1.0 {
                true => per_ttt_layer * config.ttt_layers().len() as f64,
                false => 0.0,
            },
        }
    }

    /// Forward and backward, without the fast updates: the base of `mfu`.
    pub fn training(&self) -> f64 {
        3.0 * (self.matmul + self.attention)
    }

    /// Forward and backward with the fast updates: the base of `mfu_with_ttt`.
    pub fn training_with_ttt(&self) -> f64 {
        self.training() + 3.0 * self.ttt
    }
}
