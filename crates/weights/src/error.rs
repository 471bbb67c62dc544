//! Everything that can go wrong with a folder of weights, one variant each.

use std::path::{Path, PathBuf};

use crate::Dtype;

/// The crate's error. Every message says what happened, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// Reading, writing or renaming failed (missing file, permission, disk full, ...).
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The folder holds no weights.
    #[error("{}: no weights here: expected {stem}.safetensors, or {stem}.safetensors.index.json with its shards", dir.display())]
    NotFound {
        /// The folder.
        dir: PathBuf,
        /// The files' stem.
        stem: String,
    },
    /// The folder holds weights only in a format that can run code, or that is not read.
    #[error("{}: only safetensors are read: pickled files can run code when they are opened; convert it, for example by loading it in transformers and save_pretrained", path.display())]
    Pickled {
        /// The file that was found in place of safetensors.
        path: PathBuf,
    },
    /// A single file and an index are both there, and only one of them can be meant.
    #[error("{}: both {stem}.safetensors and {stem}.safetensors.index.json are here; remove the one that is out of date", dir.display())]
    Ambiguous {
        /// The folder.
        dir: PathBuf,
        /// The files' stem.
        stem: String,
    },
    /// The index of the shards cannot be used.
    #[error("{}: broken index: {problem}; fetch the folder again", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file stands for something outside the folder.
    #[error("{}: resolves to {}, outside the folder; weights are read from inside it (or from the blobs of its hub cache): copy the file", path.display(), target.display())]
    Escapes {
        /// The file as named.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A shard that the index lists does not exist.
    #[error("{}: shard missing, the index lists it; fetch or copy it again", path.display())]
    MissingShard {
        /// The shard.
        path: PathBuf,
    },
    /// A safetensors file is damaged, truncated or not one.
    #[error("{}: not a sound safetensors file: {problem}; fetch or copy it again", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Two shards hold a tensor of the same name.
    #[error("{}: tensor {name} is also in {}; one of the two is out of date", path.display(), other.display())]
    Duplicate {
        /// The tensor.
        name: String,
        /// A shard with it.
        path: PathBuf,
        /// Another shard with it.
        other: PathBuf,
    },
    /// A file changed size after it was opened.
    #[error("{}: the file changed while it was open; wait until it is complete and start again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A tensor was asked for that is not there.
    #[error("{}: no tensor {name}", dir.display())]
    MissingTensor {
        /// The folder.
        dir: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor's type is not a floating-point type that is read.
    #[error("{}: tensor {name} is stored as {found}: F32, F16 and BF16 are read; dequantise the model first", dir.display())]
    UnsupportedDtype {
        /// The folder.
        dir: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        found: Dtype,
    },
    /// A caller's buffer or range does not fit the tensor.
    #[error("tensor {name}: {problem}")]
    Range {
        /// The tensor.
        name: String,
        /// What does not fit.
        problem: String,
    },
    /// Tensors were given to a writer in another order, number or size than announced.
    #[error("{}: {problem}", dir.display())]
    Plan {
        /// The folder being written.
        dir: PathBuf,
        /// What differs from the plan.
        problem: String,
    },
    /// The folder to be written is there already.
    #[error("{}: already exists; choose another folder or remove this one", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process is writing the same folder.
    #[error("{}: another process is writing this folder; wait for it or end it", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
}

impl WeightsError {
    /// For `map_err`: keeps the path and the attempt beside the operating system's reason.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }
}
