//! What a run will take: parameters, arithmetic, tokens, memory and traffic, from its configuration
//! alone.
//!
//! Nothing is allocated and no device is opened, so any machine can plan any model on any number of
//! others. [`propose`] finds the layout for so many.

mod memory;
mod proposal;
mod propose;
mod saved;
mod speed;
mod table;
mod traffic;

use ttt_model::ParamGroup;
use ttt_model::flops::ForwardFlops;
use ttt_model::params::all_params;
use ttt_parallel::Layout;

pub use memory::{Memory, MemoryItem};
pub use proposal::{PlanError, Proposal};
pub use propose::{Gpus, propose};
pub use traffic::{Among, Traffic, TrafficItem};

use crate::config::{Config, Precision};
use crate::device::compute_dtype;

/// What a run will take.
#[derive(Clone, Debug)]
pub struct Plan {
    /// One line about the model.
    pub model: String,
    /// Parameters by group, without groups that have none.
    pub parameters: Vec<(ParamGroup, usize)>,
    /// Arithmetic of a forward pass, per token.
    pub flops: ForwardFlops,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens of a step.
    pub tokens_per_step: u64,
    /// Tokens of a row.
    pub sequence_length: usize,
    /// Rows that go through the model at once.
    pub micro_batch_rows: usize,
    /// Rows of a step.
    pub rows: usize,
    /// The ranks.
    pub layout: Layout,
    /// Memory on one device, the fullest.
    pub memory: Memory,
    /// What a rank sends in a step, the busiest.
    pub traffic: Traffic,
}

impl Plan {
    /// The plan of a valid configuration on the ranks that its `[parallel]` asks for.
    pub fn new(config: &Config) -> Self {
        let asked = &config.parallel;
        let layout = Layout {
            replicate: asked.replicate.unwrap_or(1),
            shard: asked.shard,
            context: asked.context,
            shard_over_context: asked.shard_over_context,
        };
        Self::on(config, layout)
    }

    /// The plan of a valid configuration on the ranks of `layout`, which divide its rows.
    pub fn on(config: &Config, layout: Layout) -> Self {
        let params = all_params(&config.model);
        let groups = [
            ParamGroup::Embedding,
            ParamGroup::Attention,
            ParamGroup::Mlp,
            ParamGroup::Ttt,
            ParamGroup::Norm,
            ParamGroup::Head,
        ];
        let parameters = groups.into_iter().map(|group| {
            let own = params.iter().filter(|param| param.group == group);
            (group, own.map(|param| param.len()).sum::<usize>())
        });
        let train = &config.train;
        Self {
            model: table::describe_model(config),
            parameters: parameters.filter(|(_, count)| *count > 0).collect(),
            flops: ForwardFlops::per_token(&config.model, train.sequence_length),
            steps: train.steps,
            tokens_per_step: train.batch_tokens as u64,
            sequence_length: train.sequence_length,
            micro_batch_rows: train.micro_batch_rows,
            rows: train.batch_rows(),
            memory: Memory::estimate(config, layout),
            traffic: Traffic::busiest(config, layout),
            layout,
        }
    }

    /// All parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|(_, count)| count).sum()
    }

    /// Tokens of the whole run.
    pub fn total_tokens(&self) -> u64 {
        self.steps.saturating_mul(self.tokens_per_step)
    }

    /// Arithmetic of the whole run, fast updates included, recomputation not.
    pub fn total_flops(&self) -> f64 {
        self.total_tokens() as f64 * self.flops.training_with_ttt()
    }
}

/// The precision a configuration computes in.
fn precision(config: &Config) -> Precision {
    match compute_dtype(config.run.device, config.train.compute) {
        burn::tensor::DType::BF16 => Precision::Bf16,
        _ => Precision::F32,
    }
}
