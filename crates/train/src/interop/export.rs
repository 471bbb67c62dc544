//! A checkpoint as a Hugging Face folder.

use std::path::Path;

use serde_json::{Map, Value, json};
use ttt_data::Tokenizer;
use ttt_model::hf::config_to_json;
use ttt_model::{ModelConfig, Target};
use ttt_weights::{Dtype, WrittenFile, atomic_folder};

use super::copy::write_model;
use super::error::InteropError;
use super::hf_folder::{check_vocabulary, read_json};
use super::init_from::InitFrom;
use super::side_files::side_files;
use crate::checkpoint::Checkpoint;
use crate::error::TrainError;

/// What exported weights are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExportDtype {
    /// 32 bits: what the checkpoint holds.
    F32,
    /// 16 bits, rounded to nearest even.
    #[default]
    Bf16,
}

/// How to export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportOptions {
    /// What the weights are stored as.
    pub dtype: ExportDtype,
    /// Data in one file at most, unless a single tensor is larger.
    pub max_shard_bytes: u64,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            dtype: ExportDtype::default(),
            max_shard_bytes: 5 << 30,
        }
    }
}

/// What was exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The files of weights.
    pub files: Vec<WrittenFile>,
    /// What the folder's users should know.
    pub notes: Vec<String>,
}

/// Makes the Hugging Face folder `out` of the checkpoint at `path`: `config.json` with the keys of
/// the official In-Place TTT release, weights under their names, and the files of its tokenizer.
///
/// # Errors
/// If the checkpoint is damaged, no class of transformers computes its model, or `out` exists or
/// cannot be written.
pub fn export(path: &Path, out: &Path, options: &ExportOptions) -> Result<Exported, TrainError> {
    let checkpoint = Checkpoint::open(path)?;
    let model = &checkpoint.config.model;
    let plan = InitFrom::plan(model, checkpoint.weights(), 0)?;
    if let Some(name) = plan.new_parameters().next() {
        let problem = format!("lacks {name} of its own configuration");
        return Err(TrainError::checkpoint(checkpoint.path(), problem));
    }
    let (dtype, name) = match options.dtype {
        ExportDtype::F32 => (Dtype::F32, "float32"),
        ExportDtype::Bf16 => (Dtype::BF16, "bfloat16"),
    };
    let mut config = config_to_json(model, name).map_err(|source| {
        let dir = checkpoint.path().to_path_buf();
        InteropError::Config { dir, source }
    })?;
    let small = small_files(checkpoint.path(), model, &mut config)?;
    let files = atomic_folder(out, |partial| {
        let write = |name: &str, bytes: &[u8]| {
            let path = partial.join(name);
            std::fs::write(&path, bytes).map_err(TrainError::io("write", &path))
        };
        write("config.json", &pretty(&config))?;
        for (name, bytes) in &small {
            write(name, bytes)?;
        }
        write_model(&plan, partial, dtype, options.max_shard_bytes)
    })?;
    let notes = notes(model);
    Ok(Exported { files, notes })
}

/// The tokenizer's files, and the special tokens that `config.json` and `generation_config.json`
/// name.
fn small_files(
    dir: &Path,
    model: &ModelConfig,
    config: &mut Value,
) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
    let mut files = vec![];
    for path in side_files(dir) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
        files.push((name.into_owned(), bytes));
    }
    let has = |name: &str| files.iter().any(|(file, _)| file == name);
    let mut made = vec![];
    let mut ids = Map::new();
    if has("generation_config.json") {
        let generation = read_json(&dir.join("generation_config.json"))?;
        ids.extend(generation.as_object().cloned().unwrap_or_default());
    } else if has("tokenizer.json") {
        let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
        ids.insert("eos_token_id".into(), tokenizer.eos_id().into());
        made.push(("generation_config.json".to_string(), pretty(&json!(ids))));
    }
    if has("tokenizer.json") {
        let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
        check_vocabulary(&tokenizer, model)?;
        if !has("tokenizer_config.json") {
            // Without a class of its own, the model's class would split text its own way.
            let eos = tokenizer.id_to_token(tokenizer.eos_id());
            let class = json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos});
            made.push(("tokenizer_config.json".to_string(), pretty(&class)));
        }
    }
    // An absent id would mean the class's own default, which is a LLaMA 2 token in some.
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        config[key] = ids.get(key).cloned().unwrap_or(Value::Null);
    }
    files.extend(made);
    Ok(files)
}

fn pretty(json: &Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

/// Where a reader of the folder would compute something else in silence.
fn notes(model: &ModelConfig) -> Vec<String> {
    let ttt = &model.ttt;
    let mut notes = vec![];
    if !ttt.enabled {
        return notes;
    }
    notes.push(
        "transformers' own classes pass over the TTT parameters and compute the base model".into(),
    );
    if ttt.target == Target::NextToken {
        notes.push("the official modelling file does not know ttt_target = next_token".into());
    }
    if ttt.conv_taps().is_some_and(|taps| taps != 5) {
        let taps = ttt.conv_kernel;
        notes.push(format!(
            "the official modelling file has 5 taps, these weights have {taps}: it will refuse them"
        ));
    }
    if ttt.clip.is_some() {
        notes.push("the official modelling file does not clip the fast updates".into());
    }
    notes
}
