//! `[parallel]`: how the ranks of a run are laid out and how they exchange what they need.

use serde::{Deserialize, Serialize};
use ttt_kernels::ContextSettings;
use ttt_kernels::context::{AttentionExchange, Payload, StateExchange};
use ttt_parallel::{CommError, Layout};

use super::Config;
use super::validate::{Checked, Problem, refuse};
use crate::config::ConfigError;
use crate::context;

/// `[parallel]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Copies of the parameters, which read different rows; default: as many as there are ranks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicate: Option<usize>,
    /// Ranks over which one copy of the parameters is spread; they read different rows.
    pub shard: usize,
    /// Ranks over which each row is spread.
    pub context: usize,
    /// Spread one copy of the parameters over the ranks of a row as well: over shard x context. Less memory;
    /// parameters and gradients then travel once for each pass of rows.
    pub shard_over_context: bool,
    /// How fast weights travel between the ranks of a row.
    pub context_states: StateExchange,
    /// The precision in which fast weights travel.
    pub context_payload: Payload,
    /// What travels for attention without a window.
    pub context_attention: AttentionExchange,
    /// Seconds of silence, or without a move (at least four times the longest time between two moves so far;
    /// ten times as long in a declared task such as saving, while its process computes, reads or writes),
    /// after which a rank is given up and all others end. A rank moves several times per block.
    pub timeout_s: u64,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self {
            replicate: None,
            shard: 1,
            context: 1,
            shard_over_context: false,
            context_states: StateExchange::default(),
            context_payload: Payload::default(),
            context_attention: AttentionExchange::default(),
            timeout_s: 20,
        }
    }
}

impl ParallelConfig {
    /// The layout of `ranks` ranks.
    ///
    /// # Errors
    /// If the numbers do not multiply to them.
    pub fn layout(&self, ranks: usize) -> Result<Layout, CommError> {
        let layout = Layout::of(ranks, self.replicate, self.shard, self.context)?;
        Ok(Layout {
            shard_over_context: self.shard_over_context,
            ..layout
        })
    }

    /// Whether a layout is asked for, and not merely as many copies as there are ranks.
    pub fn asks(&self) -> bool {
        (self.replicate, self.shard, self.context) != (None, 1, 1) || self.shard_over_context
    }

    /// How the ranks of a row exchange what they need.
    pub fn context_settings(&self) -> ContextSettings {
        ContextSettings {
            states: self.context_states,
            payload: self.context_payload,
            attention: self.context_attention,
        }
    }
}

pub(super) fn validate(config: &Config) -> Checked {
    let parallel = &config.parallel;
    for (key, value) in [
        ("replicate", parallel.replicate.unwrap_or(1)),
        ("shard", parallel.shard),
        ("context", parallel.context),
    ] {
        // Products with lengths, up to 2^48, stay numbers.
        if !(1..=1 << 14).contains(&value) {
            let key = format!("parallel.{key}");
            refuse(key, format!("counts ranks, from 1 to 2^14, got {value}"))?;
        }
    }
    if !(2..=3600).contains(&parallel.timeout_s) {
        let sentence = format!("must lie between 2 and 3600, got {}", parallel.timeout_s);
        refuse("parallel.timeout_s", sentence)?;
    }
    rows(config, parallel.replicate.unwrap_or(1) * parallel.shard)?;
    without_effect(config)?;
    let (length, settings) = (config.train.sequence_length, parallel.context_settings());
    let shared = context::validate(&config.model, length, parallel.context, &settings);
    shared.map_err(|error| match error {
        ConfigError::Invalid { key, problem, .. } => Problem {
            key,
            sentence: problem,
        },
        other => Problem {
            key: "parallel.context".into(),
            sentence: other.to_string(),
        },
    })
}

/// Refuses what was chosen and changes nothing.
fn without_effect(config: &Config) -> Checked {
    let (chosen, model) = (&config.parallel, &config.model);
    let default = ParallelConfig::default();
    let full = (0..model.num_hidden_layers).any(|layer| model.window(layer).is_none());
    let learns = !model.ttt_layers().is_empty();
    let states = (learns, "there is no TTT layer whose fast weights would");
    let attention = (full, "every layer has a window, so that no attention");
    let always = (true, "");
    let choices = [
        ("shard_over_context", chosen.shard_over_context, always),
        (
            "context_states",
            chosen.context_states != default.context_states,
            states,
        ),
        (
            "context_payload",
            chosen.context_payload != default.context_payload,
            states,
        ),
        (
            "context_attention",
            chosen.context_attention != default.context_attention,
            attention,
        ),
    ];
    for (key, is_chosen, (used, unused)) in choices {
        let key = format!("parallel.{key}");
        if is_chosen && chosen.context == 1 {
            let sentence =
                "only ranks that share rows use it: leave it out, or set parallel.context";
            refuse(&key, sentence)?;
        }
        if is_chosen && !used {
            refuse(key, format!("{unused} use it: leave it out"))?;
        }
    }
    Ok(())
}

/// Refuses rows that `ranks` ranks do not read in equal shares.
pub(super) fn rows(config: &Config, ranks: usize) -> Checked {
    let train = &config.train;
    let (rows, length) = (train.batch_rows(), train.sequence_length);
    if rows.is_multiple_of(ranks) {
        return Ok(());
    }
    let below = rows / ranks * ranks;
    let nearest = match below {
        0 => format!("the least is {}", ranks.saturating_mul(length)),
        _ => format!(
            "the nearest are {} and {}",
            below * length,
            (below + ranks).saturating_mul(length)
        ),
    };
    refuse(
        "train.batch_tokens",
        format!(
            "the {rows} rows of a step do not divide among the {ranks} ranks that read different \
             rows (parallel.replicate x parallel.shard): {nearest}"
        ),
    )
}
