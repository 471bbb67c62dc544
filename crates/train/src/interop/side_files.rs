//! The small files that travel with weights: tokenizer, chat template, generation settings.

use std::path::{Path, PathBuf};

/// Names under which Hugging Face folders keep them. `config.json` is not among them, since it is
/// written anew.
const NAMES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// Those of them that `dir` has.
pub fn side_files(dir: &Path) -> Vec<PathBuf> {
    let paths = NAMES.iter().map(|name| dir.join(name));
    paths.filter(|path| path.is_file()).collect()
}
