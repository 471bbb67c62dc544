//! The settings of a build and what can be wrong with them.

use std::path::PathBuf;

use crate::source::{BadRecords, Discovered, SourceSpec};
use crate::{DataError, TokenType, Tokenizer};

/// Text files and directories longer than this become several documents: 64 MiB.
pub const DEFAULT_MAX_DOCUMENT_BYTES: usize = 64 << 20;

/// What `ttt data build` does. [`BuildConfig::new`] gives the defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct BuildConfig {
    /// What to read.
    pub sources: Vec<SourceSpec>,
    /// The dataset folder to write.
    pub out: PathBuf,
    /// A tokenizer.json, a folder that holds one, or `hub:owner/model[@revision]`.
    pub tokenizer: PathBuf,
    /// The end-of-text token by name; `None`: the tokenizer's own.
    pub eos_token: Option<String>,
    /// Share of documents that go to the validation split, `0 <= x < 1`.
    pub validation_fraction: f64,
    /// A shard is closed once it has so many tokens. Also the unit of restart; memory per split is 4 bytes a token.
    pub shard_tokens: usize,
    /// Longer documents are stored as several.
    pub max_document_bytes: usize,
    /// Records that cannot be read: stop, or skip and count.
    pub bad_records: BadRecords,
    /// Use the hub's cache alone.
    pub offline: bool,
    /// Worker threads; 0: one per core.
    pub threads: usize,
}

impl BuildConfig {
    /// Sources, output folder and tokenizer given, all else at its default.
    pub fn new(
        sources: Vec<SourceSpec>,
        out: impl Into<PathBuf>,
        tokenizer: impl Into<PathBuf>,
    ) -> Self {
        Self {
            sources,
            out: out.into(),
            tokenizer: tokenizer.into(),
            eos_token: None,
            validation_fraction: 0.01,
            shard_tokens: 1 << 26,
            max_document_bytes: DEFAULT_MAX_DOCUMENT_BYTES,
            bad_records: BadRecords::default(),
            offline: crate::source::hub::offline_by_environment(),
            threads: 0,
        }
    }

    pub(super) fn check(&self) -> Result<(), DataError> {
        if self.sources.is_empty() {
            return Err(DataError::setting("sources", "name at least one source"));
        }
        for (index, source) in self.sources.iter().enumerate() {
            let name = &source.name;
            let plain = !name.is_empty()
                && !name.starts_with('.')
                && name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
            if !plain {
                return Err(DataError::setting(
                    "sources.name",
                    format!("`{name}` becomes a folder: use letters, digits, - _ and ."),
                ));
            }
            if self.sources[..index]
                .iter()
                .any(|earlier| earlier.name == *name)
            {
                return Err(DataError::setting(
                    "sources.name",
                    format!("`{name}` names two sources"),
                ));
            }
            if !(source.weight.is_finite() && source.weight > 0.0) {
                return Err(DataError::setting(
                    format!("sources.{name}.weight"),
                    format!("{} is not a positive number", source.weight),
                ));
            }
        }
        if !(0.0..1.0).contains(&self.validation_fraction) {
            return Err(DataError::setting(
                "validation_fraction",
                format!("{} is not in 0 <= x < 1", self.validation_fraction),
            ));
        }
        for (key, value) in [
            ("shard_tokens", self.shard_tokens),
            ("max_document_bytes", self.max_document_bytes),
        ] {
            if value == 0 {
                return Err(DataError::setting(key, "must be at least 1"));
            }
        }
        Ok(())
    }

    /// Hash over everything that decides the shards' bytes. Weights, threads and absolute paths do not.
    pub(super) fn fingerprint(
        &self,
        tokenizer: &Tokenizer,
        dtype: TokenType,
        found: &[Discovered],
    ) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("ttt-data 1 build");
        let mut put = |bytes: &[u8]| {
            hasher
                .update(&(bytes.len() as u64).to_le_bytes())
                .update(bytes);
        };
        put(&crate::Manifest::FORMAT.to_le_bytes());
        put(tokenizer.hash().as_bytes());
        put(&tokenizer.eos_id().to_le_bytes());
        put(dtype.name().as_bytes());
        put(&self.validation_fraction.to_bits().to_le_bytes());
        put(&(self.shard_tokens as u64).to_le_bytes());
        put(&(self.max_document_bytes as u64).to_le_bytes());
        put(format!("{:?}", self.bad_records).as_bytes());
        for source in found {
            put(source.spec.name.as_bytes());
            put(source.spec.text_key.as_bytes());
            put(format!("{:?}", source.spec.document).as_bytes());
            for revision in &source.hub {
                put(revision.commit.as_bytes());
            }
            for unit in &source.units {
                put(b"unit");
                for file in unit {
                    put(file.label.as_bytes());
                    put(&file.bytes.to_le_bytes());
                }
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}
