//! How long a step may take: an estimate that ranks layouts and promises nothing. Its constants are
//! round numbers of the machines that one trains on.

use std::fmt;

use super::{Among, Plan};
use crate::config::{Activations, Config};

/// Matrix products that a GPU computes in a second, as models reach it.
const FLOPS_PER_S: f64 = 450e12;

/// Bytes that a GPU sends in a second to another of its host, and of another host.
const WITHIN_HOST: f64 = 200e9;
const BETWEEN_HOSTS: f64 = 25e9;

/// GPUs of a host.
const HOST: usize = 8;

/// How long an exchange takes that moves nothing, where nothing hides it.
const LATENCY_S: f64 = 20e-6;

/// Tokens at once with which products reach half of their speed.
const HALF_SPEED_TOKENS: f64 = 512.0;

/// Share of the passes behind which the exchanges of parameters hide.
const OVERLAP: f64 = 0.8;

/// Estimated seconds of a step.
pub(super) fn seconds(config: &Config, plan: &Plan) -> f64 {
    let layout = plan.layout;
    let train = &config.train;
    let again = match train.activations {
        Activations::Keep => 1.0,
        Activations::Recompute => 4.0 / 3.0,
    };
    let at_once = (train.micro_batch_rows * train.sequence_length / layout.context) as f64;
    let speed = FLOPS_PER_S * at_once / (at_once + HALF_SPEED_TOKENS);
    let flops = plan.flops.training_with_ttt() * plan.tokens_per_step as f64;
    let compute = again * flops / layout.ranks() as f64 / speed;
    // A group lies on one host if all between its first and last rank do.
    let per_s = |span: usize| match span <= HOST {
        true => WITHIN_HOST,
        false => BETWEEN_HOSTS,
    };
    let time = |among: Among, span: usize| plan.traffic.bytes_among(among) as f64 / per_s(span);
    let shard = time(Among::Shard, layout.shard * layout.context);
    let exposed = (shard - OVERLAP * compute).max(0.0);
    let context = time(Among::Context, layout.context);
    // Gradients are summed over replicas once a step, beside its last backward pass.
    let passes = train.batch_rows() / (layout.replicate * layout.shard) / train.micro_batch_rows;
    let last_backward = compute * 2.0 / 3.0 / passes.max(1) as f64;
    let replicas = time(Among::Replicas, layout.ranks());
    let replicas = (replicas - OVERLAP * last_backward).max(0.0);
    let exchanges: u64 = plan.traffic.items.iter().map(|item| item.exchanges).sum();
    compute + exposed + context + replicas + LATENCY_S * exchanges as f64
}

/// What the estimate is made from, in a sentence.
pub(super) struct Assumptions;

impl fmt::Display for Assumptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "layouts are ranked by an estimate from {:.0} TFLOP/s per GPU, {:.0} GB/s within a host of {HOST} \
             and {:.0} GB/s between hosts",
            FLOPS_PER_S / 1e12,
            WITHIN_HOST / 1e9,
            BETWEEN_HOSTS / 1e9
        )
    }
}
