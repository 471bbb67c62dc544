//! Walks through a source's files in order and hands out raw documents.
//!
//! Reading is one cheap sequential pass (decompress, cut into records); parsing, hashing and tokenising the records is
//! left to whoever receives them, on as many cores as there are.

use std::borrow::Cow;
use std::sync::Arc;

use super::decompress::BytesRead;
use super::discover::{Discovered, Format};
use super::{BadRecords, jsonl, parquet, text};
use crate::DataError;

/// How to read.
#[derive(Clone, Debug)]
pub(crate) struct ReadOptions {
    pub bad_records: BadRecords,
    /// Text files and directories longer than this give several documents.
    pub max_document_bytes: usize,
    pub bytes_read: BytesRead,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            bad_records: BadRecords::default(),
            max_document_bytes: crate::build::DEFAULT_MAX_DOCUMENT_BYTES,
            bytes_read: BytesRead::default(),
        }
    }
}

/// What the reader meets, in order.
#[derive(Debug)]
pub(crate) enum Event {
    /// The unit with this index begins.
    Unit(usize),
    /// A document or record.
    Document(RawDocument),
    /// A file with a text name and binary content was passed over.
    BinaryFile,
    /// A record that cannot be read was passed over (`bad_records = "skip"`).
    BadRecord,
    /// The file or directory before was longer than `max_document_bytes` and gave several documents.
    Cut,
}

/// A document as it was read: text, or a line that still has to be parsed.
#[derive(Debug)]
pub(crate) struct RawDocument {
    pub content: Content,
    /// The file, for error messages.
    pub path: Arc<str>,
    /// Line or row, counted from 1; 0 for whole files.
    pub line: u64,
}

#[derive(Debug)]
pub(crate) enum Content {
    Text(String),
    JsonLine(Vec<u8>),
}

impl RawDocument {
    /// Bytes held in memory.
    pub fn size(&self) -> usize {
        match &self.content {
            Content::Text(text) => text.len(),
            Content::JsonLine(line) => line.len(),
        }
    }

    /// The text; `None` for a record that cannot be read and may be skipped.
    pub fn text(
        &self,
        text_key: &str,
        bad_records: BadRecords,
    ) -> Result<Option<Cow<'_, str>>, DataError> {
        match &self.content {
            Content::Text(text) => Ok(Some(Cow::Borrowed(text))),
            Content::JsonLine(line) => {
                let location = || format!("{}:{}", self.path, self.line);
                match jsonl::text_of(line, text_key, location) {
                    Ok(text) => Ok(Some(text)),
                    Err(error) if bad_records == BadRecords::Skip && error.is_record_fault() => {
                        Ok(None)
                    }
                    Err(error) => Err(error),
                }
            }
        }
    }
}

/// Receives events; answers whether to go on.
pub(super) type Sink<'a> = dyn FnMut(Event) -> Result<bool, DataError> + 'a;

/// Reads `source` from its unit `first_unit` on.
pub(crate) fn read_events(
    source: &Discovered,
    options: &ReadOptions,
    first_unit: usize,
    sink: &mut Sink<'_>,
) -> Result<(), DataError> {
    for (index, files) in source.units.iter().enumerate().skip(first_unit) {
        if !sink(Event::Unit(index))? {
            return Ok(());
        }
        // A unit of several files is a directory of text files; one of a single file may be anything.
        let go_on = match files.first().map(|file| file.format) {
            Some(Format::JsonLines) => jsonl::read(&files[0], options, sink)?,
            Some(Format::Parquet) => {
                parquet::read(&files[0], &source.spec.text_key, options, sink)?
            }
            Some(Format::Text) => text::read(files, options, sink)?,
            None => true,
        };
        if !go_on {
            return Ok(());
        }
    }
    Ok(())
}

/// Like [`read_events`], documents alone.
pub(crate) fn read_documents(
    source: &Discovered,
    options: &ReadOptions,
    first_unit: usize,
    sink: &mut dyn FnMut(RawDocument) -> Result<bool, DataError>,
) -> Result<(), DataError> {
    read_events(source, options, first_unit, &mut |event| match event {
        Event::Document(document) => sink(document),
        _ => Ok(true),
    })
}
