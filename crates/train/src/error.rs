//! Everything that can go wrong in a run, as sentences.

use std::path::{Path, PathBuf};

use ttt_data::DataError;
use ttt_kernels::packing::PackingError;
use ttt_parallel::CommError;
use ttt_weights::WeightsError;

use crate::config::ConfigError;
use crate::generate::chat::ChatError;
use crate::interop::InteropError;

/// Why a run ended early or could not begin.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Data, shards or tokenizer.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A document layout that no row can have.
    #[error(transparent)]
    Packing(#[from] PackingError),
    /// A rank was lost.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Weights could not be read or written.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A folder of weights and a model do not fit.
    #[error(transparent)]
    Interop(#[from] InteropError),
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint that this run cannot use.
    #[error("checkpoint {}: {problem}", path.display())]
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A new TTT layer changes what the base model computes.
    #[error(
        "with TTT the model of [init] computes other logits than without (largest difference {difference:e}, at most {tolerance:e} is rounding): this is a defect of the program, please report it with the configuration"
    )]
    NotTheBaseModel {
        /// The largest difference between logits.
        difference: f64,
        /// What rounding explains.
        tolerance: f64,
    },
    /// A prompt that the model cannot read.
    #[error("the prompt {0}")]
    Prompt(String),
    /// A chat template that cannot be used.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The device asked for is not there.
    #[error("device \"{device}\": {problem}")]
    Device {
        /// As in `run.device`.
        device: &'static str,
        /// What is missing and what to do.
        problem: String,
    },
    /// A gradient was not finite or spiked, and the policy is to stop.
    #[error(
        "step {step}: the gradient norm is {grad_norm}, which `train.on_bad_gradient = \"abort\"` stops at; the weights are those of the step before"
    )]
    BadGradient {
        /// The step, from 0.
        step: u64,
        /// Its gradient norm.
        grad_norm: f64,
    },
    /// Another rank could not do its part of something that all must do.
    #[error("rank {rank}: {problem}")]
    OtherRank {
        /// Its number.
        rank: usize,
        /// What it said.
        problem: String,
    },
    /// The device failed while running.
    #[error("the device failed: {0}")]
    Execution(String),
}

impl TrainError {
    /// An error of the file system.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    }

    /// A checkpoint that cannot be used.
    pub fn checkpoint(path: &Path, problem: impl Into<String>) -> Self {
        Self::Checkpoint {
            path: path.to_path_buf(),
            problem: problem.into(),
        }
    }
}
