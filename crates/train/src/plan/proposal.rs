//! What comes of looking for a layout.

use std::fmt;

use ttt_parallel::Layout;

use super::Plan;
use super::propose::Gpus;
use super::speed::Assumptions;
use crate::config::{Activations, Config, ConfigError};
use crate::human::gib;

/// A layout that fits, and why it was taken.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// The configuration with what the proposal sets.
    pub config: Config,
    /// Its plan.
    pub plan: Plan,
    /// Estimated seconds of a step; they rank layouts and promise nothing.
    pub step_s: f64,
    /// What else was looked at, in sentences.
    pub reasons: Vec<String>,
    /// The GPUs it was made for.
    pub gpus: Gpus,
}

/// Why there is no layout.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A setting of the configuration stands against it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No layout divides the rows, or the row, among the GPUs.
    #[error(
        "no layout of {gpus} GPUs divides a step of {rows} rows (train.batch_tokens / train.sequence_length) \
         of {length} tokens{chunks}: {why}; change train.batch_tokens, or take a number of GPUs that divides the rows"
    )]
    Rows {
        /// GPUs.
        gpus: usize,
        /// Rows of a step.
        rows: usize,
        /// Tokens of a row.
        length: usize,
        /// The chunk, where there are TTT layers.
        chunks: String,
        /// What the last layout that was tried lacks.
        why: String,
    },
    /// None fits.
    #[error(
        "no layout fits into {gpus} x {:.1} GiB ({:.1} of each usable): {least} needs the least, {:.1} GiB; {more}",
        gib(*memory_bytes), gib(*usable_bytes), gib(*needed_bytes)
    )]
    Memory {
        /// GPUs.
        gpus: usize,
        /// Memory of one.
        memory_bytes: f64,
        /// What the plan may take of it.
        usable_bytes: f64,
        /// What the smallest layout takes.
        needed_bytes: f64,
        /// That layout.
        least: String,
        /// What would do.
        more: String,
    },
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Layout {
            replicate,
            shard,
            context,
            shard_over_context,
        } = self.plan.layout;
        let train = &self.config.train;
        let activations = match train.activations {
            Activations::Keep => "keep",
            Activations::Recompute => "recompute",
        };
        writeln!(f, "{}\n", self.plan)?;
        writeln!(
            f,
            "for {} GPUs of {:.1} GiB, {:.1} of them usable:\n",
            self.gpus.count,
            gib(self.gpus.memory_bytes),
            gib(self.gpus.usable_bytes())
        )?;
        writeln!(f, "  [parallel]")?;
        writeln!(f, "  replicate = {replicate}")?;
        writeln!(f, "  shard = {shard}")?;
        writeln!(f, "  context = {context}")?;
        if shard_over_context {
            writeln!(f, "  shard_over_context = true")?;
        }
        writeln!(f, "  [train]")?;
        writeln!(f, "  activations = \"{activations}\"")?;
        writeln!(f, "  micro_batch_rows = {}\n", train.micro_batch_rows)?;
        writeln!(f, "why:")?;
        for reason in &self.reasons {
            writeln!(f, "  {reason}")?;
        }
        write!(f, "  {Assumptions}")
    }
}
