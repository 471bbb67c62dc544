//! What can be wrong between a folder of weights and a model.

use std::path::PathBuf;

use ttt_model::hf::HfConfigError;
use ttt_weights::Dtype;

/// A folder that does not fit, one variant per reason.
#[derive(Debug, thiserror::Error)]
pub enum InteropError {
    /// The folder has no `config.json`.
    #[error("{}: no config.json: name a folder as transformers saves it", dir.display())]
    NoConfig {
        /// The folder.
        dir: PathBuf,
    },
    /// A JSON file is damaged or too large.
    #[error("{}: {problem}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// `config.json` describes a model that this program does not have, or cannot write.
    #[error("{}: {source}", dir.display())]
    Config {
        /// The folder.
        dir: PathBuf,
        /// What is wrong.
        source: HfConfigError,
    },
    /// Parameters of the model that the folder lacks.
    #[error("{}: lacks {names} of the model; {hint}", dir.display())]
    Missing {
        /// The folder.
        dir: PathBuf,
        /// The first of them, and how many.
        names: String,
        /// What the reason may be.
        hint: &'static str,
    },
    /// Tensors of the folder that the model has no use for.
    #[error("{}: also holds {names}, which the model has no use for; {hint}", dir.display())]
    Unused {
        /// The folder.
        dir: PathBuf,
        /// The first of them, and how many.
        names: String,
        /// What the reason may be.
        hint: &'static str,
    },
    /// A tensor of another shape than the model's parameter.
    #[error("{}: tensor {name} has shape {found:?}, the model's is {expected:?}; do the sizes of the configuration belong to these weights?", dir.display())]
    Shape {
        /// The folder.
        dir: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The parameter's.
        expected: Vec<usize>,
    },
    /// A tensor in a format that is not read.
    #[error("{}: tensor {name} is stored as {found}: F32, F16 and BF16 are read; take the model's bf16 form", dir.display())]
    Dtype {
        /// The folder.
        dir: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        found: Dtype,
    },
    /// The head is said to be the embedding, but the folder has another one.
    #[error("{}: tie_word_embeddings is set, but lm_head.weight differs from model.embed_tokens.weight; set it to false to use both", dir.display())]
    TiedHeadDiffers {
        /// The folder.
        dir: PathBuf,
    },
    /// The tokenizer has ids beyond the embedding.
    #[error("{}: the tokenizer has {tokens} ids, the model's vocab_size is {rows}: the two do not belong together", path.display())]
    Vocabulary {
        /// The tokenizer.
        path: PathBuf,
        /// Ids of the tokenizer.
        tokens: u64,
        /// Rows of the embedding.
        rows: usize,
    },
}
