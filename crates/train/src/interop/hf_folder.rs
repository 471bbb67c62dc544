//! A folder as transformers saves it, opened and checked.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;
use ttt_data::Tokenizer;
use ttt_model::ModelConfig;
use ttt_model::hf::config_from_json;
use ttt_weights::Folder;

use super::error::InteropError;
use crate::error::TrainError;

/// A model in Hugging Face's layout. Only headers and small files have been read.
#[derive(Debug)]
pub struct HfFolder {
    /// The folder.
    pub dir: PathBuf,
    /// The model that its `config.json` describes.
    pub config: ModelConfig,
    /// Its tensors.
    pub weights: Folder,
}

impl HfFolder {
    /// Opens `dir` and checks `config.json`, the headers of the weights and, if there is one, that
    /// the tokenizer fits the embedding.
    ///
    /// # Errors
    /// If one of them is missing, damaged, or describes something that is not supported.
    pub fn open(dir: &Path) -> Result<Self, TrainError> {
        let config = base_config(dir)?;
        let weights = Folder::open(dir)?;
        let tokenizer = dir.join("tokenizer.json");
        if tokenizer.is_file() {
            check_vocabulary(&Tokenizer::load(&tokenizer)?, &config)?;
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            weights,
        })
    }
}

/// The model that the `config.json` in `dir` describes. No other file is read.
///
/// # Errors
/// If it is missing, damaged, or describes something that is not supported.
pub fn base_config(dir: &Path) -> Result<ModelConfig, TrainError> {
    let path = dir.join("config.json");
    if !path.is_file() {
        let dir = dir.to_path_buf();
        return Err(InteropError::NoConfig { dir }.into());
    }
    config_from_json(&read_json(&path)?).map_err(|source| {
        let dir = dir.to_path_buf();
        InteropError::Config { dir, source }.into()
    })
}

/// Refuses a tokenizer with ids beyond the embedding. Fewer are usual: embeddings are padded.
pub(super) fn check_vocabulary(
    tokenizer: &Tokenizer,
    config: &ModelConfig,
) -> Result<(), InteropError> {
    let (tokens, rows) = (tokenizer.vocab_size(), config.vocab_size);
    match tokens > rows as u64 {
        true => Err(InteropError::Vocabulary {
            path: tokenizer.path().to_path_buf(),
            tokens,
            rows,
        }),
        false => Ok(()),
    }
}

/// Reads a small JSON file.
pub(super) fn read_json(path: &Path) -> Result<Value, TrainError> {
    const LIMIT: u64 = 16 << 20;
    let mut bytes = vec![];
    let file = std::fs::File::open(path).map_err(TrainError::io("read", path))?;
    let read = file.take(LIMIT + 1).read_to_end(&mut bytes);
    let length = read.map_err(TrainError::io("read", path))? as u64;
    let json = match length > LIMIT {
        true => Err(format!("has more than {LIMIT} bytes")),
        false => serde_json::from_slice(&bytes).map_err(|error| format!("not JSON: {error}")),
    };
    json.map_err(|problem| {
        let path = path.to_path_buf();
        InteropError::Json { path, problem }.into()
    })
}
