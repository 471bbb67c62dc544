//! What ranks send each other in a step, byte for byte.
//!
//! A collective of P ranks is counted as a ring makes it: of what all of them end up with, or start
//! from, each rank sends (P − 1)/P, twice for a sum that all get. NCCL's trees send about as much.

use ttt_kernels::context::{ATTENTION, AttentionExchange, Payload, STATES, StateExchange};
use ttt_kernels::ops::attention::heads_divide;
use ttt_model::{ModelConfig, Unit};
use ttt_parallel::Layout;

use super::saved::keys;
use crate::config::{Activations, Config};
use crate::device::compute_dtype;
use crate::sent;
use crate::step::gathers;
use crate::units::FlatLayout;

/// Ranks that exchange with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// Those that hold the shards of one copy of the parameters.
    Shard,
    /// Those that hold the same shard.
    Replicas,
    /// Those that share rows.
    Context,
    /// All.
    World,
}

/// A line of the traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficItem {
    /// What travels.
    pub name: &'static str,
    /// Between whom.
    pub among: Among,
    /// Bytes that a rank sends for each layer that has it, in one pass over a micro-batch, and how
    /// many such layers there are.
    pub per_layer: Option<(u64, usize)>,
    /// Bytes that a rank sends in a step.
    pub bytes: u64,
    /// The same of each unit, where it is for units.
    pub units: Vec<(Unit, u64)>,
    /// Exchanges in a step.
    pub exchanges: u64,
}

/// What one rank sends in a step; evaluation and checkpoints apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Line by line, without those that send nothing.
    pub items: Vec<TrafficItem>,
}

/// Bytes of an f32.
const F32: u64 = 4;

/// What a rank sends of `bytes` that every rank has a part of.
fn ring(bytes: u64, ranks: usize) -> u64 {
    bytes * (ranks as u64 - 1) / ranks as u64
}

/// The sum of `bytes` on all ranks.
fn all_reduce(bytes: u64, ranks: usize) -> u64 {
    2 * ring(bytes, ranks)
}

impl Traffic {
    /// What the rank that sends most does.
    pub fn busiest(config: &Config, layout: Layout) -> Self {
        // Only the place in the context group makes a difference.
        let ranks = 0..layout.context;
        let all = ranks.map(|rank| Self::of(config, layout, rank));
        let busiest = all.max_by_key(Self::bytes);
        busiest.expect("a group has ranks")
    }

    /// What the rank `rank` of its context group does, where every row is one document.
    pub fn of(config: &Config, layout: Layout, rank: usize) -> Self {
        let step = Step::new(config, layout, rank);
        let mut items = step.parameters();
        items.extend(step.rows());
        items.extend(step.scalars());
        items.retain(|item| item.bytes > 0);
        Self { items }
    }

    /// All of it.
    pub fn bytes(&self) -> u64 {
        self.items.iter().map(|item| item.bytes).sum()
    }

    /// What goes to ranks of one group.
    pub fn bytes_among(&self, among: Among) -> u64 {
        let items = self.items.iter().filter(|item| item.among == among);
        items.map(|item| item.bytes).sum()
    }
}

/// A step of one rank.
struct Step<'a> {
    config: &'a Config,
    layout: Layout,
    /// Place in the context group.
    rank: usize,
    /// Rows that this rank reads, in whole or in part.
    rows: u64,
    micro_batches: u64,
    /// Bytes of an activation.
    compute_bytes: u64,
}

impl<'a> Step<'a> {
    fn new(config: &'a Config, layout: Layout, rank: usize) -> Self {
        let train = &config.train;
        let rows = train.batch_rows() / (layout.replicate * layout.shard);
        Self {
            config,
            layout,
            rank,
            rows: rows as u64,
            micro_batches: rows.div_ceil(train.micro_batch_rows) as u64,
            compute_bytes: compute_dtype(config.run.device, train.compute).size() as u64,
        }
    }

    fn model(&self) -> &'a ModelConfig {
        &self.config.model
    }

    /// Forward passes of a block for one micro-batch.
    fn forwards(&self) -> u64 {
        match self.config.train.activations {
            Activations::Keep => 1,
            Activations::Recompute => 2,
        }
    }

    /// Parameters to where they are computed with, and their gradients back.
    fn parameters(&self) -> Vec<TrafficItem> {
        let (shards, replicas) = (
            self.layout.parameter_shards(),
            self.layout.parameter_copies(),
        );
        let model = self.model();
        let train = &self.config.train;
        let compute = compute_dtype(self.config.run.device, train.compute);
        let item = |name, among| TrafficItem {
            name,
            among,
            per_layer: Some((0, model.num_hidden_layers)),
            bytes: 0,
            units: vec![],
            exchanges: 0,
        };
        let mut items = [
            item(sent::PARAMETERS, Among::Shard),
            item(sent::GRADIENTS, Among::Shard),
            item(sent::SUMS, Among::Replicas),
        ];
        for unit in Unit::all(model) {
            let layout = FlatLayout::new(model, unit, shards);
            let others = shards as u64 - 1;
            let there: u64 = layout
                .gathers(compute)
                .map(|(len, dtype)| others * (len * dtype.size()) as u64)
                .sum();
            let parts = layout.gathers(compute).count() as u64;
            let back = others * F32 * layout.shard_len() as u64;
            let among_replicas = all_reduce(F32 * layout.shard_len() as u64, replicas);
            let (times, returns) = gathers(model, unit, train.activations);
            let (times, returns) = (self.micro_batches * times, self.micro_batches * returns);
            // Bytes at once, how often, and in how many exchanges each.
            let of_unit = [
                (there, times, parts),
                (back, returns, parts),
                (among_replicas, 1, 1),
            ];
            for (item, (once, times, parts)) in items.iter_mut().zip(of_unit) {
                item.bytes += times * once;
                item.units.push((unit, times * once));
                item.exchanges += times * parts;
                // The largest block stands for all in "per layer".
                if let (Unit::Block(_), Some((largest, _))) = (unit, &mut item.per_layer) {
                    *largest = once.max(*largest);
                }
            }
        }
        items.into()
    }

    /// What the parts of a row need of each other.
    fn rows(&self) -> Vec<TrafficItem> {
        let ranks = self.layout.context;
        if ranks == 1 {
            return vec![];
        }
        let model = self.model();
        let train = &self.config.train;
        let passes = self.forwards() + 1;
        let micro_rows = train.micro_batch_rows as u64;
        let mut items = vec![];

        let learning = model.ttt_layers().len();
        let (forward, backward) = self.states();
        let each = self.rows * (self.forwards() * forward + backward);
        let of_layers = model.ttt_layers().into_iter();
        let exchanges = match self.config.parallel.context_states.among(ranks) {
            StateExchange::AllToAll | StateExchange::Auto => 2,
            StateExchange::Chain | StateExchange::AllGather => 1,
        };
        items.push(TrafficItem {
            name: STATES,
            among: Among::Context,
            per_layer: Some((micro_rows * (forward + backward), learning)),
            bytes: learning as u64 * each,
            units: of_layers.map(|layer| (Unit::Block(layer), each)).collect(),
            exchanges: self.micro_batches * passes * exchanges * learning as u64,
        });

        let (mut units, mut largest, mut exchanges) = (vec![], 0, 0);
        for layer in 0..model.num_hidden_layers {
            let (forward, backward, times) = self.attention(layer);
            let bytes = self.rows * (self.forwards() * forward + backward);
            units.push((Unit::Block(layer), bytes));
            largest = largest.max(micro_rows * (forward + backward));
            exchanges += self.micro_batches * passes * times;
        }
        items.push(TrafficItem {
            name: ATTENTION,
            among: Among::Context,
            per_layer: Some((largest, model.num_hidden_layers)),
            bytes: units.iter().map(|(_, bytes)| bytes).sum(),
            units,
            exchanges,
        });
        let norms = (ranks as u64 - 1) * F32 * learning as u64;
        items.push(TrafficItem {
            name: sent::NORMS,
            among: Among::Context,
            per_layer: None,
            bytes: self.micro_batches * norms,
            units: vec![],
            exchanges: self.micro_batches * u64::from(learning > 0),
        });
        items
    }

    /// Bytes of the fast weights of one layer and row, forward and backward
    /// (`ttt_kernels::ops::ttt::carry`).
    fn states(&self) -> (u64, u64) {
        let ranks = self.layout.context;
        let model = self.model();
        let payload = match self.config.parallel.context_payload {
            Payload::F32 => F32,
            Payload::Bf16 => 2,
        };
        let state = (model.hidden_size * model.intermediate_size) as u64;
        let padded = state.next_multiple_of(ranks as u64);
        match self.config.parallel.context_states.among(ranks) {
            StateExchange::AllToAll | StateExchange::Auto => {
                let both = 2 * ring(payload * padded, ranks);
                (both, both)
            }
            StateExchange::AllGather => {
                let all = payload * state * (ranks as u64 - 1);
                (all, all)
            }
            // The last sends nothing on; backwards, the first.
            StateExchange::Chain => {
                let one = |sends: bool| if sends { payload * state } else { 0 };
                (one(self.rank + 1 < ranks), one(self.rank > 0))
            }
        }
    }

    /// Bytes of the attention of one layer and row, forward and backward, and exchanges of a pass
    /// (`ttt_kernels::ops::attention`).
    fn attention(&self, layer: usize) -> (u64, u64, u64) {
        let ranks = self.layout.context;
        let model = self.model();
        let tokens = self.config.train.sequence_length / ranks;
        let window = model.window(layer);
        let heads = match self.config.parallel.context_attention {
            AttentionExchange::Keys => false,
            AttentionExchange::Heads => true,
            AttentionExchange::Auto => heads_divide(model.kv_heads(), ranks),
        };
        if window.is_none() && heads {
            // Queries, keys and values there, the output back.
            let widths = 2 * model.num_attention_heads * model.head_size() + 2 * keys(model);
            let bytes = ring(self.compute_bytes * (tokens * widths) as u64, ranks);
            return (bytes, bytes, 2);
        }
        // Strips of keys and values go to the ranks behind, and their gradients to those before.
        let reach = |rank: usize| {
            let all = rank * tokens;
            window.map_or(all, |window| all.min(window - 1))
        };
        let seen = |rank: usize, of: usize| {
            let between = (rank - 1 - of) * tokens;
            reach(rank).saturating_sub(between).min(tokens)
        };
        let behind: usize = (self.rank + 1..ranks).map(|by| seen(by, self.rank)).sum();
        let before: usize = (0..self.rank).map(|of| seen(self.rank, of)).sum();
        let bytes = |count: usize| self.compute_bytes * (2 * count * keys(model)) as u64;
        (bytes(behind), bytes(before), 1)
    }

    /// Loss, labelled tokens and the norm of the gradient.
    fn scalars(&self) -> [TrafficItem; 2] {
        let item = |name, among, bytes, exchanges| TrafficItem {
            name,
            among,
            per_layer: None,
            bytes,
            units: vec![],
            exchanges,
        };
        let all = 2 * all_reduce(F32, self.layout.ranks());
        let norm = all_reduce(F32, self.layout.parameter_shards());
        [
            item(sent::LOSS, Among::World, all, 2),
            item(sent::GRADIENT_NORM, Among::Shard, norm, 1),
        ]
    }
}
