//! Everything that can go wrong between a text file and a batch, one variant each.

use std::path::{Path, PathBuf};

/// The crate's error. Every message says what happened, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
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
    /// An input names nothing that exists.
    #[error("source `{name}`: input `{input}` matches no file; check the path or the pattern")]
    NoInput {
        /// Name of the source.
        name: String,
        /// The input as written in the configuration.
        input: String,
    },
    /// A glob pattern does not parse.
    #[error("source `{name}`: `{input}` is not a valid glob pattern: {reason}")]
    BadPattern {
        /// Name of the source.
        name: String,
        /// The pattern.
        input: String,
        /// What the pattern parser said.
        reason: String,
    },
    /// A setting of the build cannot be used.
    #[error("data setting `{key}`: {reason}")]
    BadSetting {
        /// The setting's name.
        key: String,
        /// What is wrong, and what is expected.
        reason: String,
    },
    /// A text file or record is not UTF-8.
    #[error(
        "{location}: the text is not valid UTF-8 (first bad byte at {byte}); convert it, or build with bad_records = \"skip\""
    )]
    InvalidUtf8 {
        /// File, and line where it has lines.
        location: String,
        /// Offset of the first bad byte in the file or line.
        byte: u64,
    },
    /// A line of a JSON Lines file is not a JSON object.
    #[error(
        "{location}: the line is not a JSON object: {reason}; fix it, or build with bad_records = \"skip\""
    )]
    InvalidJson {
        /// File and line.
        location: String,
        /// The parser's reason.
        reason: String,
    },
    /// A record has no text under the configured key.
    #[error(
        "{location}: no text under the key `{key}` ({found}); set text_key, or build with bad_records = \"skip\""
    )]
    MissingText {
        /// File and line, row or schema.
        location: String,
        /// The configured key.
        key: String,
        /// What is there instead.
        found: String,
    },
    /// A line of a JSON Lines file is longer than any sensible record.
    #[error("{location}: the line is longer than {limit} bytes; is this a JSON Lines file?")]
    LineTooLong {
        /// File and line.
        location: String,
        /// The limit.
        limit: u64,
    },
    /// A parquet file does not open or decode.
    #[error("{}: not a readable parquet file: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The decoder's reason.
        reason: String,
    },
    /// A dataset or tokenizer name on the hub does not parse.
    #[error("`{name}` is not a hub name; expected {expected}")]
    BadHubName {
        /// What was written.
        name: String,
        /// The form that is expected.
        expected: &'static str,
    },
    /// Offline, and the hub's cache on this machine does not hold what was asked for.
    #[error(
        "{what} is not in the hub cache {} and this run is offline; fetch it once with network (without HF_HUB_OFFLINE) or point HF_HOME at a cache that has it",
        cache.display()
    )]
    NotCached {
        /// The repository, revision and file.
        what: String,
        /// The cache folder that was searched.
        cache: PathBuf,
    },
    /// The hub could not be reached or refused.
    #[error(
        "hub: cannot fetch {what}: {reason}; check the name, the network and HF_TOKEN, or set HF_HUB_OFFLINE=1 to use the cache alone"
    )]
    Hub {
        /// The repository, revision and file.
        what: String,
        /// The client's reason.
        reason: String,
    },
    /// The tokenizer file does not load.
    #[error("{}: not a usable tokenizer: {reason}", path.display())]
    BadTokenizer {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// Encoding, decoding or training a tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The tokenizer has no known end-of-document token.
    #[error(
        "{}: no end-of-text token found (looked for eos_token in tokenizer_config.json and for {candidates}); set eos_token",
        path.display()
    )]
    NoEos {
        /// The tokenizer file.
        path: PathBuf,
        /// The names that were tried.
        candidates: String,
    },
    /// The tokenizer in hand is not the one that made the shards.
    #[error(
        "{}: the shards were made with another tokenizer (hash {expected}, this one is {found}); use the dataset's own tokenizer.json or rebuild",
        path.display()
    )]
    TokenizerMismatch {
        /// The dataset folder.
        path: PathBuf,
        /// Hash in the manifest.
        expected: String,
        /// Hash of the tokenizer in hand.
        found: String,
    },
    /// The tokenizer's ids do not fit the shards' integer type.
    #[error("vocabulary of {vocab_size} tokens does not fit token type {dtype}")]
    VocabTooLarge {
        /// Ids run from 0 to this, exclusive.
        vocab_size: u64,
        /// The integer type.
        dtype: &'static str,
    },
    /// The inputs hold no text at all.
    #[error("no tokens: the inputs of {} hold no readable text", sources)]
    EmptyDataset {
        /// Names of the sources.
        sources: String,
    },
    /// The output folder belongs to another dataset or another build.
    #[error("{}: {reason}; choose another folder or remove this one", path.display())]
    OutputInUse {
        /// The folder.
        path: PathBuf,
        /// What is in the way.
        reason: String,
    },
    /// Another process builds into the output folder.
    #[error("{}: another build is writing here; wait for it, or choose another folder", path.display())]
    BuildRunning {
        /// The folder.
        path: PathBuf,
    },
    /// The folder holds no finished dataset.
    #[error("{}: no dataset here (manifest.json is missing); run `ttt data build`, also to finish an interrupted build", path.display())]
    NoManifest {
        /// The folder.
        path: PathBuf,
    },
    /// The manifest does not parse or contradicts itself.
    #[error("{}: broken manifest: {reason}; rebuild the dataset", path.display())]
    BadManifest {
        /// The manifest file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The manifest was written by another version of the format.
    #[error("{}: dataset format {found}, this program reads {expected}; rebuild the dataset", path.display())]
    ManifestVersion {
        /// The manifest file.
        path: PathBuf,
        /// Version in the file.
        found: u64,
        /// Version this program reads.
        expected: u64,
    },
    /// A shard that the manifest lists does not exist.
    #[error("{}: shard missing; copy it again, or run the same `ttt data build` again to restore it", path.display())]
    MissingShard {
        /// The shard file.
        path: PathBuf,
    },
    /// A shard is shorter or longer than the manifest says.
    #[error("{}: shard has {found} bytes, the manifest says {expected}; copy it again, or run the same `ttt data build` again to restore it", path.display())]
    ShardSize {
        /// The shard file.
        path: PathBuf,
        /// Bytes in the manifest.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// A shard's content is damaged.
    #[error("{}: damaged shard: {reason}; copy it again, or delete it and run the same `ttt data build` to restore it", path.display())]
    CorruptShard {
        /// The shard file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A source or split is too small to give one row.
    #[error(
        "{}: the {split} split of {what} has {tokens} tokens, one row of sequence_length {sequence_length} needs {}; add data, shorten the sequence{}",
        path.display(), sequence_length + 1,
        if *split == "validation" { ", or raise validation_fraction" } else { "" }
    )]
    TooFewTokens {
        /// The dataset folder.
        path: PathBuf,
        /// `train` or `validation`.
        split: &'static str,
        /// The source, or the whole dataset.
        what: String,
        /// Tokens there are.
        tokens: u64,
        /// Tokens of a row.
        sequence_length: usize,
    },
    /// A row was asked for that does not exist.
    #[error("row {index} of {count} asked for")]
    RowOutOfRange {
        /// The row.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// The loader's background thread has ended (after an error it delivered).
    #[error("the data loader has stopped")]
    LoaderStopped,
}

impl DataError {
    /// For `map_err`: keeps the path and the attempt beside the operating system's reason.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }

    pub(crate) fn setting(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::BadSetting {
            key: key.into(),
            reason: reason.into(),
        }
    }

    /// True for faults of a single record, which `bad_records = "skip"` passes over.
    pub(crate) fn is_record_fault(&self) -> bool {
        matches!(
            self,
            Self::InvalidUtf8 { .. } | Self::InvalidJson { .. } | Self::MissingText { .. }
        )
    }
}
