//! Checkpoints: a folder that exists only when it is complete.
//!
//! ```text
//! <run.dir>/checkpoints/step-00000100/
//!     model.safetensors       master weights, f32, Hugging Face names (in several files when large)
//!     optimizer.safetensors   <name>.exp_avg and <name>.exp_avg_sq
//!     config.toml             the configuration of the run
//!     tokenizer.json          and what else belongs to it, if the run began with another model
//!     manifest.json           step, data cursor, and size and hashes of every file above
//! ```
//!
//! It is written aside, flushed and renamed, so that a process killed at any instant leaves the
//! checkpoints it had. All ranks write into the same files, each the ranges of tensors that it
//! holds, so that nothing is gathered and the folder does not show how many ranks there were; all
//! ranks of any other layout read theirs from it. `run.dir` must therefore be on a file system that
//! all of them share, and that keeps what several machines write into different ranges of one file
//! (Lustre, GPFS and NFS do): one that does not is found out by the hashes.

mod manifest;
mod read;
mod write;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ttt_parallel::Mesh;

use crate::config::Config;
use crate::error::TrainError;
use crate::units::UnitState;

pub(crate) use manifest::{FileEntry, seal, write_file};
pub use read::Checkpoint;

/// Bytes of one safetensors file.
pub(crate) const FILE_BYTES: u64 = 5 << 30;

/// What a run needs beside weights and moments to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done: the data cursor.
    pub step: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Running mean of the gradient norm.
    pub mean_grad_norm: f32,
    /// What the batches are a function of; a run on other data must not go on.
    pub data_fingerprint: String,
}

/// How the moments of a parameter are named.
const FIRST: &str = ".exp_avg";
const SECOND: &str = ".exp_avg_sq";

/// The folder that holds a run's checkpoints.
pub fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// The folder of the checkpoint after `step` steps.
pub fn path_of(run_dir: &Path, step: u64) -> PathBuf {
    folder(run_dir).join(format!("step-{step:08}"))
}

/// The checkpoints of a run, oldest first.
///
/// # Errors
/// If the folder is there but cannot be listed.
pub fn list(run_dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let folder = folder(run_dir);
    if !folder.exists() {
        return Ok(vec![]);
    }
    let entries = std::fs::read_dir(&folder).map_err(TrainError::io("list", &folder))?;
    let mut found = vec![];
    for entry in entries {
        let path = entry.map_err(TrainError::io("list", &folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let step = name
            .strip_prefix("step-")
            .and_then(|n| n.parse::<u64>().ok());
        found.extend(step.map(|step| (step, path.clone())));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Writes a checkpoint of the run in `config.run.dir`, with `small` files (name and content) for its
/// tokenizer, and removes all but the newest `config.checkpoint.keep`. Returns its folder. Every
/// rank calls it at the same step.
///
/// # Errors
/// If a file cannot be written on any rank, or a rank is lost; what was there before stays.
pub fn save(
    config: &Config,
    units: &[UnitState],
    progress: &Progress,
    small: &[(String, Vec<u8>)],
    mesh: &Mesh,
) -> Result<PathBuf, TrainError> {
    let path = path_of(&config.run.dir, progress.step);
    let mut files = vec![("config.toml".to_string(), config.to_toml()?.into_bytes())];
    files.extend_from_slice(small);
    write::write(&path, units, progress, &files, mesh, || {
        let all = list(&config.run.dir)?;
        let excess = all.len().saturating_sub(config.checkpoint.keep.max(1));
        all[..excess].iter().try_for_each(|old| {
            mesh.activity.at(format_args!("removing {}", old.display()));
            std::fs::remove_dir_all(old).map_err(TrainError::io("remove", old))
        })
    })?;
    Ok(path)
}
