//! A `tokenizer.json`, from a file, a folder or the hub: text to ids and back.

mod decode;
mod train;
mod words;

use std::path::{Path, PathBuf};

pub use decode::StreamDecoder;
pub use train::{TokenizerTraining, train_tokenizer};
pub(crate) use words::Encoder;

use crate::guard::guarded;
use crate::source::hub;
use crate::{DataError, Manifest};

/// The name of the file in a folder, in the hub's repositories and in datasets.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// End-of-text tokens of known families, tried in this order when no tokenizer_config.json names one.
const EOS_CANDIDATES: [&str; 6] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
];

/// A loaded tokenizer. Cloning it gives a copy with its own cache.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    hash: String,
    vocab_size: u64,
    eos_id: u32,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("hash", &self.hash)
            .field("vocab_size", &self.vocab_size)
            .field("eos_id", &self.eos_id)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads `name`: a tokenizer.json, a folder that holds one, or `hub:owner/model[@revision]`.
    ///
    /// The end-of-text token is the `eos_token` of a tokenizer_config.json beside it, else the first known name that
    /// the vocabulary has.
    pub fn load(name: &Path) -> Result<Self, DataError> {
        Self::load_with_eos(name, None, hub::offline_by_environment())
    }

    /// Like [`Tokenizer::load`], with the end-of-text token given and the network allowed or not.
    pub fn load_with_eos(
        name: &Path,
        eos_token: Option<&str>,
        offline: bool,
    ) -> Result<Self, DataError> {
        let path = locate(name, offline)?;
        let (bytes, hash) = read(&path)?;
        let inner = parse(&bytes, &path)?;
        let eos_id = match eos_token {
            Some(token) => inner.token_to_id(token).ok_or_else(|| {
                DataError::setting(
                    "eos_token",
                    format!("`{token}` is not a token of {}", path.display()),
                )
            })?,
            None => find_eos(&inner, &path)?,
        };
        Self::new(inner, path, hash, eos_id)
    }

    /// The copy in a dataset folder, which must be the file that made the shards; with the end-of-text token that the dataset was built with.
    pub(crate) fn load_from_dataset(dir: &Path, manifest: &Manifest) -> Result<Self, DataError> {
        let path = dir.join(TOKENIZER_FILE);
        let (bytes, hash) = read(&path)?;
        if hash != manifest.tokenizer_hash {
            return Err(DataError::TokenizerMismatch {
                path: dir.to_path_buf(),
                expected: manifest.tokenizer_hash.clone(),
                found: hash,
            });
        }
        Self::new(parse(&bytes, &path)?, path, hash, manifest.eos_id)
    }

    fn new(
        mut inner: tokenizers::Tokenizer,
        path: PathBuf,
        hash: String,
        eos_id: u32,
    ) -> Result<Self, DataError> {
        let bad = |reason: String| DataError::BadTokenizer {
            path: path.clone(),
            reason,
        };
        // Ids may have gaps (added tokens), so the largest id counts, not the number of entries.
        let vocab_size = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| u64::from(id) + 1);
        if u64::from(eos_id) >= vocab_size {
            return Err(bad(format!(
                "it has no token with the end-of-text id {eos_id}"
            )));
        }
        // A text that spells "<|endoftext|>" must not end its document: special tokens in text are plain text.
        inner.set_encode_special_tokens(true);
        // Saved truncation and padding settings serve fixed-size batches; here they would drop or invent text.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| bad(error.to_string()))?;
        Ok(Self {
            inner,
            path,
            hash,
            vocab_size,
            eos_id,
        })
    }

    /// Ids of `text`, without any beginning- or end-of-text token. Special tokens spelled out in the text are encoded
    /// as the plain characters they are.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| DataError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of a prompt: those of [`Tokenizer::encode`], with the beginning-of-text token where the tokenizer's file says
    /// that texts have one, as LLaMA's does.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self
            .inner
            .encode_fast(text, true)
            .map_err(|error| DataError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of `text` in which special tokens are what their names say: for text that a chat template made, whose
    /// special tokens are meant. A user's text that spells one becomes one too, as in other programs.
    pub fn encode_special(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut inner = self.inner.clone();
        inner.set_encode_special_tokens(false);
        let encoding = inner
            .encode_fast(text, false)
            .map_err(|error| DataError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`; special tokens are left out. Bytes that are no UTF-8 come out as U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        self.inner
            .decode(ids, true)
            .map_err(|error| DataError::Tokenizer(error.to_string()))
    }

    /// Decodes token by token, for generation.
    pub fn decode_stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }

    /// Ids run from 0 to this, exclusive. A model's vocab_size must be at least this.
    pub fn vocab_size(&self) -> u64 {
        self.vocab_size
    }

    /// The token that ends every document.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// Id of a token by its name.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Name of a token.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// BLAKE3 of the tokenizer.json, in hex.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The tokenizer.json that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The file that `name` stands for.
fn locate(name: &Path, offline: bool) -> Result<PathBuf, DataError> {
    if let Some(hub_name) = name
        .to_str()
        .and_then(|name| name.strip_prefix(hub::PREFIX))
    {
        return hub::fetch_model_file(hub_name, TOKENIZER_FILE, offline);
    }
    if name.is_dir() {
        return Ok(name.join(TOKENIZER_FILE));
    }
    let parts = name.components().count();
    if !name.exists()
        && name.is_relative()
        && parts == 2
        && name.extension().is_none_or(|e| e != "json")
    {
        return Err(DataError::BadTokenizer {
            path: name.to_path_buf(),
            reason: format!(
                "no such file or folder; for the hub write {}{}",
                hub::PREFIX,
                name.display()
            ),
        });
    }
    Ok(name.to_path_buf())
}

/// The file's bytes and their hash.
fn read(path: &Path) -> Result<(Vec<u8>, String), DataError> {
    let bytes = std::fs::read(path).map_err(DataError::io(path, "read the tokenizer"))?;
    let hash = blake3::hash(&bytes).to_hex().to_string();
    Ok((bytes, hash))
}

fn parse(bytes: &[u8], path: &Path) -> Result<tokenizers::Tokenizer, DataError> {
    let bad = |reason: String| DataError::BadTokenizer {
        path: path.to_path_buf(),
        reason,
    };
    // The tokenizers crate panics on some JSON that ends early, so the syntax is checked first, and a panic over
    // content that it did not foresee is an error too.
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes)
        .map_err(|error| bad(error.to_string()))?;
    guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
        .ok_or_else(|| bad("its content is not a tokenizer's".into()))?
        .map_err(|error| bad(error.to_string()))
}

fn find_eos(inner: &tokenizers::Tokenizer, path: &Path) -> Result<u32, DataError> {
    let config = path.with_file_name("tokenizer_config.json");
    match std::fs::read(&config) {
        Ok(bytes) => {
            let bad = |reason: String| DataError::BadTokenizer {
                path: config.clone(),
                reason,
            };
            let value: serde_json::Value =
                serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
            let entry = &value["eos_token"];
            // Either the token or an object that describes it.
            if let Some(token) = entry.as_str().or_else(|| entry["content"].as_str()) {
                return inner.token_to_id(token).ok_or_else(|| {
                    bad(format!(
                        "its eos_token `{token}` is not in the vocabulary of {}",
                        path.display()
                    ))
                });
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(DataError::io(&config, "read")(error)),
    }
    EOS_CANDIDATES
        .iter()
        .find_map(|token| inner.token_to_id(token))
        .ok_or_else(|| DataError::NoEos {
            path: path.to_path_buf(),
            candidates: EOS_CANDIDATES.join(", "),
        })
}
