//! A Hugging Face folder as a checkpoint.

use std::path::Path;

use serde::Serialize;
use ttt_model::ModelConfig;
use ttt_weights::{Dtype, atomic_folder};

use super::copy::write_model;
use super::hf_folder::HfFolder;
use super::init_from::InitFrom;
use super::side_files::side_files;
use crate::checkpoint::{self, Progress};
use crate::config::{Config, ConfigError};
use crate::error::TrainError;

/// Makes the checkpoint `out`, at step 0 and without optimizer state, of the Hugging Face folder
/// `dir`: weights in f32, which holds what bf16 and f16 hold, and the files of its tokenizer.
///
/// # Errors
/// If the folder is damaged or not supported, or `out` exists or cannot be written.
pub fn import(dir: &Path, out: &Path) -> Result<(), TrainError> {
    let source = HfFolder::open(dir)?;
    let plan = InitFrom::plan(&source.config, &source.weights, 0)?;
    let config = starting_point(source.config.clone(), out)?;
    atomic_folder(out, |partial| {
        let mut files: Vec<_> = write_model(&plan, partial, Dtype::F32, checkpoint::FILE_BYTES)?
            .into_iter()
            .map(checkpoint::FileEntry::from)
            .collect();
        let mut write = |name: &str, bytes: &[u8]| {
            files.push(checkpoint::write_file(partial, name, bytes)?);
            Ok::<_, TrainError>(())
        };
        write("config.toml", config.to_toml()?.as_bytes())?;
        for path in side_files(dir) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
            write(&name, &bytes)?;
        }
        let progress = Progress {
            step: 0,
            tokens: 0,
            mean_grad_norm: 0.0,
            data_fingerprint: String::new(),
        };
        checkpoint::seal(partial, &progress, files)
    })
}

/// The configuration of an imported checkpoint: the model, and settings from which to continue
/// training it (in-place-ttt, continual recipe). Data is for its user to name.
fn starting_point(model: ModelConfig, out: &Path) -> Result<Config, TrainError> {
    // Rows must be longer than a chunk for the chunk's update to be read.
    let chunk = if model.ttt.enabled {
        model.ttt.chunk
    } else {
        0
    };
    let row = model.max_position_embeddings.min(8192.max(2 * chunk));
    let section = toml::to_string(&ModelSection { model: &model });
    let section = section.map_err(|error| ConfigError::Write(error.to_string()))?;
    let dir = toml::Value::from(out.with_extension("run").to_string_lossy().as_ref());
    let text = format!(
        "run.dir = {dir}\n\
         data.path = \"data\"\n\
         train = {{ steps = 1000, sequence_length = {row}, batch_tokens = {row} }}\n\
         optimizer = {{ lr = 5e-6, warmup_steps = 20 }}\n\
         {section}"
    );
    Ok(Config::parse(&text, &out.join("config.toml"), &[])?)
}

#[derive(Serialize)]
struct ModelSection<'a> {
    model: &'a ModelConfig,
}
