//! The run's configuration: one TOML file, one struct per section.
//!
//! `sections.rs` says what there is, [`Config::load`] reads a file with overrides from the command
//! line, and every mistake comes back as a [`ConfigError`] that names its place, its key and what
//! would do. A key nobody knows is a mistake.

mod base;
mod error;
mod parallel;
mod read;
mod sections;
mod validate;

use std::path::Path;

use serde::{Deserialize, Serialize};
use ttt_model::ModelConfig;

pub use error::{ConfigError, Place};
pub use parallel::ParallelConfig;
pub use sections::{
    Activations, CheckpointConfig, DataConfig, DeviceKind, EvalConfig, InitConfig, LrOverride,
    OnBadGradient, OptimizerConfig, Precision, RunConfig, ScheduleKind, SourceConfig, TrainConfig,
};

/// A training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where and on what.
    pub run: RunConfig,
    /// The weights to begin with; default: random ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitConfig>,
    /// The model, with Hugging Face's key names; `[model.ttt]` are the layers that learn.
    pub model: ModelConfig,
    /// The text.
    pub data: DataConfig,
    /// Steps and batches.
    pub train: TrainConfig,
    /// AdamW and its schedule.
    pub optimizer: OptimizerConfig,
    /// The ranks.
    #[serde(default)]
    pub parallel: ParallelConfig,
    /// When to save.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// When to look how it goes.
    #[serde(default)]
    pub eval: EvalConfig,
}

impl Config {
    /// Reads the file at `path`, applies the overrides `sets` (`section.key=value`, the value in
    /// TOML or a bare word) in order, and checks the result. Relative paths stay relative to the
    /// working directory.
    ///
    /// # Errors
    /// With the place (file and line, or the override), the key, and what would do.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        Self::parse(&text, path, sets)
    }

    /// [`Config::load`] of text that is already read; `path` is its name in messages.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path, sets: &[String]) -> Result<Self, ConfigError> {
        read::parse(text, path, sets)
    }

    /// Refuses sizes and settings that do not go together.
    ///
    /// # Errors
    /// With the key at fault and what would do.
    pub fn validate(&self) -> Result<(), ConfigError> {
        validate::validate(self)
            .map_err(|problem| ConfigError::invalid(problem.key, problem.sentence))
    }

    /// Refuses a step's rows that `ranks` ranks, which read different ones, cannot share.
    ///
    /// # Errors
    /// With what would do.
    pub fn validate_rows(&self, ranks: usize) -> Result<(), ConfigError> {
        parallel::rows(self, ranks)
            .map_err(|problem| ConfigError::invalid(problem.key, problem.sentence))
    }

    /// The configuration as TOML that [`Config::parse`] reads back to the same values.
    ///
    /// # Errors
    /// If a path is not UTF-8 or a number is beyond TOML's 64 signed bits; neither can come out of
    /// a valid file.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|error| ConfigError::Write(error.to_string()))
    }
}
