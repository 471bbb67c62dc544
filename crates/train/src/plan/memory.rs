//! How much memory a run holds at its fullest, item by item.
//!
//! The weights' share is exact. That of activations counts what the operations of `ttt-kernels`
//! save for their backward pass; the rest (a block being differentiated, the loss, the update) are
//! the largest buffers that are alive together. An allocator adds its own slack.

use ttt_model::Unit;
use ttt_model::params::all_params;

use super::precision;
use crate::config::{Activations, Config, DeviceKind};

/// Bytes of an f32.
const F32: f64 = 4.0;

/// Logits that the loss holds at a time: the slice of `ttt_kernels::linear_cross_entropy`.
const LOGITS_SLICE: f64 = (1u64 << 25) as f64;

/// Queries of a tile of the CPU's attention.
const ATTENTION_TILE: usize = 256;

/// A line of the estimate.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryItem {
    /// What it is.
    pub name: String,
    /// How much it is.
    pub bytes: f64,
}

/// The memory of a run on one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory {
    /// What is held when the run is at its fullest.
    pub items: Vec<MemoryItem>,
}

impl Memory {
    /// The sum.
    pub fn total_bytes(&self) -> f64 {
        self.items.iter().map(|item| item.bytes).sum()
    }

    pub(super) fn estimate(config: &Config) -> Self {
        let sizes = Sizes::new(config);
        let weights = sizes.weights();
        // The pass and the update are never at their fullest together.
        let pass = sizes.pass();
        let update = sizes.update();
        let sum = |items: &[MemoryItem]| items.iter().map(|item| item.bytes).sum::<f64>();
        let fullest = if sum(&pass) > sum(&update) {
            pass
        } else {
            update
        };
        let mut items = weights;
        items.extend(fullest);
        items.retain(|item| item.bytes > 0.0);
        Self { items }
    }
}

/// The sizes that the estimate is made of: elements, unless a name says bytes.
struct Sizes<'a> {
    config: &'a Config,
    /// Bytes of an activation.
    compute_bytes: f64,
    /// Tokens that go through the model at once, B·N.
    tokens: f64,
    parameters: f64,
    /// Of the largest unit.
    largest_unit: f64,
    /// Of the largest block.
    largest_block: f64,
    /// D, F, V.
    hidden: f64,
    intermediate: f64,
    vocab: f64,
    /// H·E and G·E.
    queries: f64,
    keys: f64,
}

fn item(name: impl Into<String>, bytes: f64) -> MemoryItem {
    MemoryItem {
        name: name.into(),
        bytes,
    }
}

impl<'a> Sizes<'a> {
    fn new(config: &'a Config) -> Self {
        let model = &config.model;
        let unit_len = |unit: Unit| {
            let params = unit.params(model);
            params.iter().map(|param| param.len()).sum::<usize>() as f64
        };
        let units = Unit::all(model);
        let blocks = units.iter().filter(|unit| matches!(unit, Unit::Block(_)));
        Self {
            config,
            compute_bytes: precision(config).bytes() as f64,
            tokens: (config.train.micro_batch_rows * config.train.sequence_length) as f64,
            parameters: units.iter().map(|unit| unit_len(*unit)).sum(),
            largest_unit: units.iter().map(|unit| unit_len(*unit)).fold(0.0, f64::max),
            largest_block: blocks.map(|unit| unit_len(*unit)).fold(0.0, f64::max),
            hidden: model.hidden_size as f64,
            intermediate: model.intermediate_size as f64,
            vocab: model.vocab_size as f64,
            queries: (model.num_attention_heads * model.head_size()) as f64,
            keys: (model.kv_heads() * model.head_size()) as f64,
        }
    }

    fn on_cpu(&self) -> bool {
        self.config.run.device == DeviceKind::Cpu
    }

    fn weights(&self) -> Vec<MemoryItem> {
        let name = match self.compute_bytes == F32 {
            true => "weights as computed with, f32",
            false => "weights as computed with, bf16",
        };
        vec![
            item("master weights, f32", F32 * self.parameters),
            item("AdamW moments, 2 x f32", 2.0 * F32 * self.parameters),
            item("gradients, f32", F32 * self.parameters),
            item(name, self.compute_weights_bytes()),
        ]
    }

    /// The copy of the weights in compute precision; on the CPU f32 weights are views, not copies.
    fn compute_weights_bytes(&self) -> f64 {
        let params = all_params(&self.config.model);
        let bytes = params.iter().map(|param| {
            let bytes = if param.master_precision {
                F32
            } else {
                self.compute_bytes
            };
            match self.on_cpu() && bytes == F32 {
                true => 0.0,
                false => bytes * param.len() as f64,
            }
        });
        bytes.sum()
    }

    /// What one block saves for its backward pass.
    fn saved_by_block_bytes(&self, layer: usize) -> f64 {
        let model = &self.config.model;
        let (d, f, q, k) = (self.hidden, self.intermediate, self.queries, self.keys);
        // rms_norm: its input; the projections: its output. Twice, for attention and MLP.
        let mut elements = 4.0 * d;
        // attention: q, k, v and its output, which is the output projection's input too.
        elements += 2.0 * q + 2.0 * k;
        if model.qk_norm() {
            elements += q + k; // queries and keys before their norms
        }
        // swiglu: gate and up; the down projection: Z.
        elements += 3.0 * f;
        if model.is_ttt_layer(layer) {
            // fast_weight_scan: V; the projection: the mixed targets. Their source is saved already.
            elements += d * (1.0 + f64::from(u8::from(model.ttt.projection)));
        }
        let log_sum_exp = F32 * model.num_attention_heads as f64;
        self.tokens * (elements * self.compute_bytes + log_sum_exp)
    }

    /// Forward and backward of one micro-batch, at the end of the forward pass.
    fn pass(&self) -> Vec<MemoryItem> {
        let train = &self.config.train;
        let model = &self.config.model;
        let layers = model.num_hidden_layers;
        let residual = self.tokens * self.hidden * self.compute_bytes;
        let blocks: Vec<f64> = (0..layers).map(|i| self.saved_by_block_bytes(i)).collect();
        let largest = blocks.iter().copied().fold(0.0, f64::max);
        let (kept, again) = match train.activations {
            Activations::Keep => (blocks.iter().sum(), 0.0),
            Activations::Recompute => (residual * layers as f64, largest),
        };
        // The embeddings, their gradient, and the last block's output with its gradient.
        let ends = 4.0 * residual;
        let (loss, backward) = (self.loss_bytes(), again + self.block_backward_bytes());
        let (name, working) = match loss > backward {
            true => ("loss: a slice of logits, the head's gradient", loss),
            false => ("one block in its backward pass", backward),
        };
        let mode = match train.activations {
            Activations::Keep => "kept",
            Activations::Recompute => "block inputs",
        };
        vec![
            item(format!("activations, {mode}"), kept + ends),
            item("TTT states, f32", self.ttt_state_bytes()),
            item(name, working),
        ]
    }

    /// The states kept for the backward pass, and the buffers of the layer that runs: S, G, one
    /// chunk's update to each, and the weight W_0 + η S.
    fn ttt_state_bytes(&self) -> f64 {
        let layers = self.config.model.ttt_layers().len() as f64;
        if layers == 0.0 {
            return 0.0;
        }
        let rows = self.config.train.micro_batch_rows as f64;
        let kept = match self.config.train.activations {
            Activations::Keep => layers * rows,
            Activations::Recompute => rows,
        };
        (kept + 5.0) * F32 * self.hidden * self.intermediate
    }

    /// A slice of logits with its softmax and gradient, the head's input and its gradient, and the
    /// gradient of the matrix: the sum, the newest slice's part, and the copy handed on.
    fn loss_bytes(&self) -> f64 {
        let slice = LOGITS_SLICE.min(self.tokens * self.vocab);
        let hidden = 3.0 * self.tokens * self.hidden * self.compute_bytes;
        5.0 * F32 * slice + hidden + 3.0 * F32 * self.vocab * self.hidden
    }

    /// Gradients of activations and weights that are alive together in the MLP of one block.
    fn block_backward_bytes(&self) -> f64 {
        // Fused: dZ, dgate, dup. The CPU's reference form also holds sigmoid, silu and slope.
        let mlp = match self.on_cpu() {
            true => 6.0 * F32,
            false => 3.0 * self.compute_bytes,
        };
        let activations =
            self.tokens * (self.intermediate * mlp + 2.0 * self.hidden * self.compute_bytes);
        // Parts, and the same joined; once more where there is a sum to add them to.
        let accumulates = f64::from(u8::from(self.config.train.micro_batches() > 1));
        let gradients = (1.0 + accumulates) * F32 * self.largest_block;
        activations.max(self.attention_tile_bytes()) + gradients
    }

    /// Scores of a tile of queries on the CPU: weights, scores and their gradients.
    fn attention_tile_bytes(&self) -> f64 {
        if !self.on_cpu() {
            return 0.0;
        }
        let (model, length) = (&self.config.model, self.config.train.sequence_length);
        let keys = (0..model.num_hidden_layers)
            .map(|layer| {
                model
                    .window(layer)
                    .map_or(length, |w| (w + ATTENTION_TILE).min(length))
            })
            .max()
            .unwrap_or(length);
        let rows = self.config.train.micro_batch_rows * model.num_attention_heads;
        4.0 * F32 * (rows * ATTENTION_TILE.min(length) * keys) as f64
    }

    /// The update of the largest unit: fused, its new weights and moments; on the CPU also the
    /// intermediate terms of the formula.
    fn update(&self) -> Vec<MemoryItem> {
        let buffers = if self.on_cpu() { 8.0 } else { 3.0 };
        let bytes = buffers * F32 * self.largest_unit;
        vec![item("update of the largest unit", bytes)]
    }
}
