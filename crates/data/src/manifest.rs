//! `manifest.json`: what a dataset folder holds. It is written last, so a folder that has one is complete.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{DataError, durable};

/// The two parts of a dataset. A document belongs to one of them by the hash of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// What the model learns from.
    Train,
    /// What it never sees.
    Validation,
}

impl Split {
    /// Both, in the order in which tables list them.
    pub const ALL: [Split; 2] = [Split::Train, Split::Validation];

    /// `train` or `validation`.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
        }
    }
}

/// Integer type of the token ids in the shards, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    /// Ids below 65 536.
    U16,
    /// All other vocabularies.
    U32,
}

impl TokenType {
    /// The smallest type that holds ids `0..vocab_size`. `u32::MAX` is kept free: it is [`crate::IGNORE`].
    pub fn for_vocab(vocab_size: u64) -> Result<Self, DataError> {
        match vocab_size {
            0..=0x1_0000 => Ok(TokenType::U16),
            0x1_0001..=0xffff_ffff => Ok(TokenType::U32),
            _ => Err(DataError::VocabTooLarge {
                vocab_size,
                dtype: "u32",
            }),
        }
    }

    /// Bytes of one token.
    pub fn bytes(self) -> usize {
        match self {
            TokenType::U16 => 2,
            TokenType::U32 => 4,
        }
    }

    /// One more than the largest id that fits.
    pub fn capacity(self) -> u64 {
        match self {
            TokenType::U16 => 1 << 16,
            TokenType::U32 => u64::from(u32::MAX),
        }
    }

    /// `u16` or `u32`.
    pub fn name(self) -> &'static str {
        match self {
            TokenType::U16 => "u16",
            TokenType::U32 => "u32",
        }
    }
}

/// One file of tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardInfo {
    /// Path relative to the dataset folder.
    pub file: String,
    /// Size of the file.
    pub bytes: u64,
    /// Tokens in it, end-of-text tokens included.
    pub tokens: u64,
    /// Documents in it.
    pub documents: u64,
    /// Bytes of UTF-8 text that the tokens stand for.
    pub text_bytes: u64,
    /// BLAKE3 of the file, in hex.
    pub blake3: String,
}

/// One split of one source: its shards in stream order and their sums.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitInfo {
    /// Tokens, end-of-text tokens included.
    pub tokens: u64,
    /// Documents.
    pub documents: u64,
    /// Bytes of UTF-8 text.
    pub text_bytes: u64,
    /// The files, in order.
    pub shards: Vec<ShardInfo>,
}

/// What a source's inputs held beside the documents that were stored. Nothing is left out silently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// Files of a folder whose extension is not on the list of text formats.
    pub other_files: u64,
    /// Hidden files and folders, and links to folders, inside a folder.
    pub hidden: u64,
    /// Files with a text extension and binary content.
    pub binary_files: u64,
    /// Documents without any text.
    pub empty_documents: u64,
    /// Records passed over under `bad_records = "skip"`.
    pub bad_records: u64,
    /// Documents longer than `max_document_bytes`, stored as several.
    pub cut_documents: u64,
}

/// A hub repository that a source was read from, at the commit that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubRevision {
    /// The input as written in the configuration.
    pub input: String,
    /// The commit its revision stood for.
    pub commit: String,
}

/// One source of the mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceInfo {
    /// Its name in the configuration.
    pub name: String,
    /// Its weight in the mixture: share of rows, relative to the other sources' weights.
    pub weight: f64,
    /// Hub commits among its inputs.
    pub hub: Vec<HubRevision>,
    /// The training split.
    pub train: SplitInfo,
    /// The validation split.
    pub validation: SplitInfo,
    /// What was left out.
    pub skipped: Skipped,
}

impl SourceInfo {
    /// The numbers and files of one split.
    pub fn split(&self, split: Split) -> &SplitInfo {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }
}

/// The whole dataset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the folder's format: [`Manifest::FORMAT`].
    pub format: u64,
    /// BLAKE3 of the tokenizer.json that made the tokens, in hex. A copy lies beside the manifest.
    pub tokenizer_hash: String,
    /// Ids run from 0 to this, exclusive.
    pub vocab_size: u64,
    /// The token that ends every document.
    pub eos_id: u32,
    /// Integer type of the ids in the shards.
    pub dtype: TokenType,
    /// Hash over the settings and inputs of the build, weights aside.
    pub build_fingerprint: String,
    /// The share of documents that the build sent to the validation split.
    pub validation_fraction: f64,
    /// The sources, in the order of the configuration.
    pub sources: Vec<SourceInfo>,
    /// BLAKE3 of this manifest with this field empty, in hex: tells an edited or damaged file.
    pub hash: String,
}

impl Manifest {
    /// Version of the format that this program writes and reads.
    pub const FORMAT: u64 = 1;
    /// Name of the file in the dataset folder.
    pub const FILE: &'static str = "manifest.json";

    /// Tokens of a split over all sources.
    pub fn tokens(&self, split: Split) -> u64 {
        self.sources
            .iter()
            .map(|source| source.split(split).tokens)
            .sum()
    }

    /// Documents of a split over all sources.
    pub fn documents(&self, split: Split) -> u64 {
        self.sources
            .iter()
            .map(|source| source.split(split).documents)
            .sum()
    }

    /// Bytes of text of a split over all sources.
    pub fn text_bytes(&self, split: Split) -> u64 {
        self.sources
            .iter()
            .map(|source| source.split(split).text_bytes)
            .sum()
    }

    /// Reads and checks the manifest of dataset folder `dir`; opens no shard.
    pub fn load(dir: &Path) -> Result<Self, DataError> {
        let path = dir.join(Self::FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(DataError::NoManifest {
                    path: dir.to_path_buf(),
                });
            }
            Err(error) => return Err(DataError::io(&path, "read the manifest")(error)),
        };
        Self::parse(&text, &path)
    }

    pub(crate) fn parse(text: &[u8], path: &Path) -> Result<Self, DataError> {
        let bad = |reason: String| DataError::BadManifest {
            path: path.to_path_buf(),
            reason,
        };
        // The version first: another version may have other fields.
        let value: serde_json::Value =
            serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(Self::FORMAT) => {}
            Some(found) => {
                return Err(DataError::ManifestVersion {
                    path: path.to_path_buf(),
                    found,
                    expected: Self::FORMAT,
                });
            }
            None => return Err(bad("it has no format version".into())),
        }
        let manifest: Self = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
        let expected = manifest.compute_hash();
        if manifest.hash != expected {
            return Err(bad(format!(
                "its hash is {}, its content hashes to {expected}: it was edited or damaged",
                manifest.hash
            )));
        }
        manifest.check().map_err(bad)?;
        Ok(manifest)
    }

    /// Writes the manifest into dataset folder `dir`, whole or not at all; fills in the hash.
    pub(crate) fn save(&mut self, dir: &Path) -> Result<(), DataError> {
        self.hash = self.compute_hash();
        let path = dir.join(Self::FILE);
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| DataError::BadManifest {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        text.push(b'\n');
        durable::write_atomically(&path, |writer| writer.write_all(&text))
    }

    fn compute_hash(&self) -> String {
        let unhashed = Self {
            hash: String::new(),
            ..self.clone()
        };
        // A struct of numbers, strings and lists always serialises; were it not so, the hash would never match.
        let text = serde_json::to_vec(&unhashed).unwrap_or_default();
        blake3::hash(&text).to_hex().to_string()
    }

    /// Contradictions that the hash cannot tell (a manifest written by a faulty program).
    fn check(&self) -> Result<(), String> {
        if self.vocab_size > self.dtype.capacity() {
            return Err(format!(
                "{} ids do not fit {}",
                self.vocab_size,
                self.dtype.name()
            ));
        }
        if u64::from(self.eos_id) >= self.vocab_size {
            return Err(format!(
                "eos id {} is outside the vocabulary of {}",
                self.eos_id, self.vocab_size
            ));
        }
        if self.sources.is_empty() {
            return Err("it lists no source".into());
        }
        for source in &self.sources {
            for split in Split::ALL {
                let info = source.split(split);
                let sum = |field: fn(&ShardInfo) -> u64| {
                    info.shards
                        .iter()
                        .try_fold(0u64, |sum, shard| sum.checked_add(field(shard)))
                };
                if sum(|s| s.tokens) != Some(info.tokens)
                    || sum(|s| s.documents) != Some(info.documents)
                {
                    return Err(format!(
                        "source `{}`: the {} shards do not sum up",
                        source.name,
                        split.name()
                    ));
                }
                if let Some(shard) = info
                    .shards
                    .iter()
                    .find(|shard| !is_plain_relative(&shard.file))
                {
                    return Err(format!(
                        "shard path `{}` leaves the dataset folder",
                        shard.file
                    ));
                }
            }
        }
        Ok(())
    }
}

fn is_plain_relative(file: &str) -> bool {
    let path = PathBuf::from(file);
    !file.is_empty()
        && path
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)))
}
