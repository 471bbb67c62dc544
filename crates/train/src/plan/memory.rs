//! How much memory a run holds at its fullest, item by item.
//!
//! The weights' share is exact. That of activations counts what the operations of `ttt-kernels`
//! save for their backward pass (`saved.rs`); the rest (a block being differentiated, the loss, the
//! update) are the largest buffers that are alive together. An allocator adds its own slack.

use ttt_kernels::context::{AttentionExchange, Payload};
use ttt_kernels::ops::attention::heads_divide;
use ttt_model::params::all_params;
use ttt_model::{ParamSpec, Unit};
use ttt_parallel::Layout;

use super::precision;
use super::saved::{keys, per_token};
use crate::config::{Activations, Config, DeviceKind};
use crate::units::FlatLayout;

/// The item whose size depends on the moment; narrow where most of it is.
const GRADIENTS: &str = "gradients, f32";
const NARROW_GRADIENTS: &str = "gradients, bf16";

/// Bytes of an f32, and of a bf16.
const F32: f64 = 4.0;
const BF16: f64 = 2.0;

/// Logits that the loss holds at a time: the slice of `ttt_kernels::linear_cross_entropy`, and of its
/// fused form.
const LOGITS_SLICE: f64 = (1u64 << 25) as f64;
const FUSED_LOGITS_SLICE: f64 = (1u64 << 27) as f64;

/// Bytes of the weights that the fused scan of a TTT layer makes at a time, at least one.
const WEIGHTS_SLAB: f64 = (256u64 << 20) as f64;

/// Most bytes of products that it makes before their turn, where ranks share rows.
const PRODUCTS_AHEAD: f64 = (2u64 << 30) as f64;

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

    /// Of one rank of `layout`: of the last of its context group, which fetches most.
    pub(super) fn estimate(config: &Config, layout: Layout) -> Self {
        let sizes = Sizes::new(config, layout);
        let sum = |items: &[MemoryItem]| items.iter().map(|item| item.bytes).sum::<f64>();
        let moments = [sizes.pass(), sizes.end_of_pass(), sizes.update()];
        let fullest = moments.into_iter().max_by(|a, b| sum(a).total_cmp(&sum(b)));
        let mut items = sizes.weights();
        items.extend(fullest.into_iter().flatten());
        items.retain(|item| item.bytes > 0.0);
        Self { items }
    }
}

/// The sizes that the estimate is made of: elements, unless a name says bytes.
struct Sizes<'a> {
    config: &'a Config,
    layout: Layout,
    /// Bytes of an activation.
    compute_bytes: f64,
    /// Tokens that go through the model at once on one rank, B·N.
    tokens: f64,
    /// Of one shard of all units, padding included.
    shard: f64,
    /// The units' parameters, in order.
    units: Vec<f64>,
    /// D, F, V.
    hidden: f64,
    intermediate: f64,
    vocab: f64,
}

fn item(name: impl Into<String>, bytes: f64) -> MemoryItem {
    MemoryItem {
        name: name.into(),
        bytes,
    }
}

impl<'a> Sizes<'a> {
    fn new(config: &'a Config, layout: Layout) -> Self {
        let model = &config.model;
        let train = &config.train;
        let flat = |unit: &Unit| FlatLayout::new(model, *unit, layout.parameter_shards());
        let units: Vec<FlatLayout> = Unit::all(model).iter().map(flat).collect();
        let part = train.sequence_length / layout.context;
        Self {
            config,
            layout,
            compute_bytes: precision(config).bytes() as f64,
            tokens: (train.micro_batch_rows * part) as f64,
            shard: units.iter().map(|unit| unit.shard_len() as f64).sum(),
            units: units.iter().map(|unit| unit.len() as f64).collect(),
            hidden: model.hidden_size as f64,
            intermediate: model.intermediate_size as f64,
            vocab: model.vocab_size as f64,
        }
    }

    fn sharded(&self) -> bool {
        self.layout.parameter_shards() > 1
    }

    fn largest_unit(&self) -> f64 {
        self.units.iter().copied().fold(0.0, f64::max)
    }

    /// Of the blocks, which lie between the embedding and the head.
    fn largest_block(&self) -> f64 {
        let blocks = &self.units[1..self.units.len() - 1];
        blocks.iter().copied().fold(0.0, f64::max)
    }

    /// Whether the operations that have a fused form run in it.
    fn fused(&self) -> bool {
        !self.on_cpu() && self.compute_bytes != F32
    }

    fn on_cpu(&self) -> bool {
        self.config.run.device == DeviceKind::Cpu
    }

    fn weights(&self) -> Vec<MemoryItem> {
        let (master, gathered) = match self.compute_bytes == F32 {
            true => ("master weights, f32", "gathered weights, f32"),
            // The model computes with the upper halves.
            false => ("master weights, bf16 + 16 bits", "gathered weights, bf16"),
        };
        vec![
            item(master, F32 * self.shard),
            item("AdamW moments, 2 x f32", 2.0 * F32 * self.shard),
            item(gathered, self.gathered_bytes()),
        ]
    }

    /// The gradients that are there when a backward pass begins: those of the micro-batches before,
    /// and in the first the head's, which came with the loss.
    fn gradients_so_far(&self) -> MemoryItem {
        let head =
            self.units.last().copied().unwrap_or(0.0) / self.layout.parameter_shards() as f64;
        let elements = if self.micro_batches() > 1 {
            self.shard
        } else {
            head
        };
        item(GRADIENTS, F32 * elements)
    }

    fn all_gradients(&self) -> MemoryItem {
        let alone = self.micro_batches() == 1 && self.layout.ranks() == 1;
        if !alone || !self.fused() {
            return item(GRADIENTS, F32 * self.shard);
        }
        // Nothing is added to them, so they stay as they were made.
        let units = Unit::all(&self.config.model);
        let bytes = units.into_iter().map(|unit| self.made_bytes(unit)).sum();
        item(NARROW_GRADIENTS, bytes)
    }

    /// The gradients of one unit as its backward pass leaves them. Fused, a product writes that of a bf16
    /// matrix in bf16; those of W_0, of the embedding and of the head are sums of several products.
    fn made_bytes(&self, unit: Unit) -> f64 {
        let narrow = self.fused() && matches!(unit, Unit::Block(_));
        let bytes = |param: &ParamSpec| match narrow && param.decays() && !param.master_precision {
            true => BF16,
            false => F32,
        };
        let params = unit.params(&self.config.model);
        params.iter().map(|p| bytes(p) * p.len() as f64).sum()
    }

    /// [`Sizes::made_bytes`] of the block that has most.
    fn made_by_block_bytes(&self) -> f64 {
        let blocks = (0..self.config.model.num_hidden_layers).map(Unit::Block);
        blocks
            .map(|block| self.made_bytes(block))
            .fold(0.0, f64::max)
    }

    /// The weights that are whole at a time, beside the master weights: where these are whole, the model
    /// computes with views of them.
    fn gathered_bytes(&self) -> f64 {
        match (self.sharded(), self.config.train.activations) {
            (false, _) => 0.0,
            // What waits for its backward pass holds the weights that it was computed with.
            (true, Activations::Keep) => self.compute_weights_bytes(),
            // The unit that runs and the one that is on its way.
            (true, Activations::Recompute) => {
                let pairs = self.units.windows(2).map(|pair| pair[0] + pair[1]);
                let share = pairs.fold(0.0, f64::max) / self.units.iter().sum::<f64>();
                share * self.compute_weights_bytes()
            }
        }
    }

    /// All weights in the precisions that the model computes with them in.
    fn compute_weights_bytes(&self) -> f64 {
        let params = all_params(&self.config.model);
        let bytes = params.iter().map(|param| {
            let bytes = match param.master_precision {
                true => F32,
                false => self.compute_bytes,
            };
            bytes * param.len() as f64
        });
        bytes.sum()
    }

    /// What one block saves for its backward pass.
    fn saved_by_block_bytes(&self, layer: usize) -> f64 {
        let tokens = self.config.train.sequence_length / self.layout.context;
        let part = (self.layout.context > 1).then_some(tokens);
        let per_token = per_token(self.config, layer, part).map(|(_, bytes)| bytes);
        let own = self.tokens * per_token.sum::<usize>() as f64;
        own + self.fetched_bytes(layer, tokens)
    }

    /// What the last rank keeps of keys that it fetched, and, apart from its others, of the queries that
    /// see them. With a window this is where a document begins among the fetched keys; elsewhere these
    /// queries are a square with the keys, of which the keys alone are kept.
    fn fetched_bytes(&self, layer: usize, tokens: usize) -> f64 {
        let model = &self.config.model;
        let before = tokens * (self.layout.context - 1);
        let heads = match self.config.parallel.context_attention {
            AttentionExchange::Keys => false,
            AttentionExchange::Heads => true,
            AttentionExchange::Auto => heads_divide(model.kv_heads(), self.layout.context),
        };
        let (fetched, seeing) = match model.window(layer) {
            Some(window) => (before.min(window - 1), tokens.min(window - 1)),
            None if heads => (0, 0),
            None => (before, tokens),
        };
        if fetched == 0 {
            return 0.0;
        }
        let queries = seeing * model.num_attention_heads * model.head_size();
        let keys = (fetched + seeing) * keys(model);
        let rows = self.config.train.micro_batch_rows;
        self.compute_bytes * (rows * 2 * (queries + keys)) as f64
    }

    /// One micro-batch at the end of its backward pass, when the first block is differentiated.
    fn end_of_pass(&self) -> Vec<MemoryItem> {
        let residual = self.tokens * self.hidden * self.compute_bytes;
        let block = self.saved_by_block_bytes(0);
        vec![
            self.all_gradients(),
            item("activations of the first block", block + 4.0 * residual),
            item("TTT states, f32", self.ttt_state_bytes(1)),
            item("TTT states on their way", self.travelling_state_bytes()),
            item(
                "one block in its backward pass",
                self.block_backward_bytes(),
            ),
        ]
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
        let layers = match train.activations {
            Activations::Keep => model.ttt_layers().len(),
            Activations::Recompute => 1,
        };
        vec![
            self.gradients_so_far(),
            item(format!("activations, {mode}"), kept + ends),
            item("TTT states, f32", self.ttt_state_bytes(layers)),
            item("TTT states on their way", self.travelling_state_bytes()),
            item(name, working),
        ]
    }

    /// What `layers` layers that learn keep for the backward pass, and the buffers of the one that runs: S, G,
    /// one chunk's update to each, and the weight W_0 + η S; or what the fused scan has of them.
    fn ttt_state_bytes(&self, layers: usize) -> f64 {
        if self.config.model.ttt_layers().is_empty() {
            return 0.0;
        }
        let elements = self.hidden * self.intermediate;
        let rows = self.config.train.micro_batch_rows as f64;
        let states = rows * F32 * elements;
        if !self.fused() {
            return layers as f64 * states + 5.0 * F32 * elements;
        }
        let tokens = self.config.train.sequence_length / self.layout.context;
        let chunks = tokens.div_ceil(self.config.model.ttt.chunk) as f64;
        let slots = (WEIGHTS_SLAB / (BF16 * elements)).floor().clamp(1.0, 32.0);
        let slab = |chunks: f64| chunks * BF16 * elements;
        // Rows that a slab holds whole need no states and share it; if all do, their weights are kept.
        // Beside states S and G, and of a group of chunks the weights, if they are not kept, and the updates.
        match self.layout.context == 1 && chunks <= slots {
            true if rows * chunks <= slots => (layers as f64 + 1.0) * slab(rows * chunks),
            true => 2.0 * slab(slots),
            false => {
                let ahead = match self.layout.context {
                    1 => 0.0,
                    _ => slab(rows * chunks).min(PRODUCTS_AHEAD),
                };
                let slabs = 2.0 * slab(slots.min(chunks));
                layers as f64 * states + 2.0 * F32 * elements + slabs + ahead
            }
        }
    }

    /// Sums of updates as a rank sends them, and as it receives and adds them.
    fn travelling_state_bytes(&self) -> f64 {
        let learns = !self.config.model.ttt_layers().is_empty();
        if self.layout.context == 1 || !learns {
            return 0.0;
        }
        let payload = match self.config.parallel.context_payload {
            Payload::F32 => F32,
            Payload::Bf16 => BF16,
        };
        let rows = self.config.train.micro_batch_rows as f64;
        (2.0 * F32 + 2.0 * payload) * rows * self.hidden * self.intermediate
    }

    fn micro_batches(&self) -> usize {
        let rows = self.config.train.batch_rows() / (self.layout.replicate * self.layout.shard);
        rows.div_ceil(self.config.train.micro_batch_rows)
    }

    /// A slice of logits, the head's input and its gradient, and the gradient of the matrix, once as
    /// it is formed and once as it is handed on. The reference form also has the softmax, and the
    /// newest slice's part of the gradient.
    fn loss_bytes(&self) -> f64 {
        let logits = self.tokens * self.vocab;
        let hidden = 3.0 * self.tokens * self.hidden * self.compute_bytes;
        let matrix = F32 * self.vocab * self.hidden;
        match self.fused() {
            true => 2.0 * FUSED_LOGITS_SLICE.min(logits) + hidden + 2.0 * matrix,
            false => 5.0 * F32 * LOGITS_SLICE.min(logits) + hidden + 3.0 * matrix,
        }
    }

    /// Gradients of activations and weights that are alive together in the MLP of one block.
    fn block_backward_bytes(&self) -> f64 {
        // Z, dgate, dup, dx, and around the norm dy, dn, n. The CPU's reference form also holds sigmoid,
        // silu and slope.
        let (inner, outer) = match self.on_cpu() {
            true => (6.0, 2.0),
            false => (3.0, 4.0),
        };
        let width = inner * self.intermediate + outer * self.hidden;
        let activations = self.tokens * width * self.compute_bytes;
        // Parts that are to be added; the first stay where they are, as the gradient. Where it is
        // sharded: parts, these joined, and the block before on its way.
        let parts = match (self.sharded(), self.micro_batches() > 1) {
            (true, _) => self.made_by_block_bytes() + 2.0 * F32 * self.largest_block(),
            (false, true) => self.made_by_block_bytes(),
            (false, false) => 0.0,
        };
        // What the sum over replicas gives, beside what is summed.
        let summed = match self.layout.parameter_copies() {
            1 => 0.0,
            _ => F32 * self.largest_block() / self.layout.parameter_shards() as f64,
        };
        activations.max(self.attention_tile_bytes()) + parts + summed
    }

    /// Scores of a tile of queries on the CPU: weights, scores and their gradients. Of several ranks,
    /// the last sees the most keys.
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

    /// The update of the largest unit: on the CPU the terms of the formula, and halves joined for it and
    /// made of its result; fused, it is made in place, unless learning rates differ within a unit.
    fn update(&self) -> Vec<MemoryItem> {
        let buffers = match (self.on_cpu(), self.config.optimizer.overrides.is_empty()) {
            (true, _) if self.compute_bytes == F32 => 8.0,
            (true, _) => 10.0,
            (false, false) => 3.0,
            (false, true) => 0.0,
        };
        let bytes = buffers * F32 * self.largest_unit() / self.layout.parameter_shards() as f64;
        vec![
            self.all_gradients(),
            item("update of the largest unit", bytes),
        ]
    }
}
