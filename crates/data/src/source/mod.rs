//! What to read: files, folders, globs and hub datasets become an ordered list of documents.

mod decompress;
mod discover;
pub mod hub;
mod jsonl;
mod parquet;
mod read;
mod text;

use serde::{Deserialize, Serialize};

pub(crate) use decompress::BytesRead;
pub(crate) use discover::{Discovered, discover};
pub(crate) use read::{Content, Event, RawDocument, ReadOptions, read_documents, read_events};
pub(crate) use text::pieces;

/// One source of text and its weight in the mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceSpec {
    /// A name for reports, metrics and the manifest; unique in a build.
    pub name: String,
    /// Paths, folders, globs, or `hub:owner/dataset[@revision][/glob]`.
    pub inputs: Vec<String>,
    /// Share of the training rows, relative to the other sources' weights.
    #[serde(default = "one")]
    pub weight: f64,
    /// The key (JSON Lines) or column (parquet) that holds the text.
    #[serde(default = "text")]
    pub text_key: String,
    /// What makes a document; `None`: a file for text formats, a record for JSON Lines and parquet.
    #[serde(default)]
    pub document: Option<DocumentUnit>,
}

fn one() -> f64 {
    1.0
}

fn text() -> String {
    "text".into()
}

impl SourceSpec {
    /// A source with weight 1 and the defaults.
    pub fn new(
        name: impl Into<String>,
        inputs: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        Self {
            name: name.into(),
            inputs: inputs.into_iter().map(Into::into).collect(),
            weight: one(),
            text_key: text(),
            document: None,
        }
    }
}

/// What makes a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DocumentUnit {
    /// A text file.
    File,
    /// All text files of one directory, sorted by name and joined: long documents from source trees.
    Directory,
    /// A line of JSON Lines or a row of parquet.
    Record,
}

/// What to do with a record that cannot be read (not UTF-8, not JSON, no text).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BadRecords {
    /// Stop with an error that names file and line.
    #[default]
    Refuse,
    /// Pass over it and count it.
    Skip,
}
