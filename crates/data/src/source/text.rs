//! Text files: whole files or whole directories as documents, and the cutting of long texts.

use std::io::Read;
use std::sync::Arc;

use super::decompress;
use super::discover::InputFile;
use super::read::{Content, Event, RawDocument, ReadOptions, Sink};
use crate::{BadRecords, DataError};

/// So many bytes at the head of a file decide whether it is binary: a zero byte says so.
const BINARY_PROBE_BYTES: usize = 8 << 10;

/// Hands out the document made of `files` (one file, or a directory's). A longer one than `max_document_bytes` becomes
/// several: a file is cut at a line end, a directory between files where possible.
pub(super) fn read(
    files: &[InputFile],
    options: &ReadOptions,
    sink: &mut Sink<'_>,
) -> Result<bool, DataError> {
    let path = match files {
        [file] => file.path.to_string_lossy(),
        _ => files[0]
            .path
            .parent()
            .unwrap_or(&files[0].path)
            .to_string_lossy(),
    };
    let mut output = Output {
        path: path.into(),
        emitted: 0,
        sink,
    };
    let mut document = String::new();
    let mut any_text = false;
    for file in files {
        let Some(mut chunks) = Chunks::open(file, options)? else {
            if !(output.sink)(Event::BinaryFile)? {
                return Ok(false);
            }
            continue;
        };
        any_text = true;
        let mut first_chunk = true;
        while let Some(chunk) = chunks.next_chunk().transpose() {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error)
                    if options.bad_records == BadRecords::Skip && error.is_record_fault() =>
                {
                    if !(output.sink)(Event::BadRecord)? {
                        return Ok(false);
                    }
                    break;
                }
                Err(error) => return Err(error),
            };
            if !document.is_empty() && document.len() + chunk.len() + 2 > options.max_document_bytes
            {
                if !output.emit(std::mem::take(&mut document))? {
                    return Ok(false);
                }
            } else if first_chunk && !document.is_empty() {
                // A blank line between the files of a directory.
                document.push_str(if document.ends_with('\n') {
                    "\n"
                } else {
                    "\n\n"
                });
            }
            first_chunk = false;
            document.push_str(&chunk);
        }
    }
    // An empty file gives an empty document, so that the build can count it.
    if !document.is_empty() || (any_text && output.emitted == 0) {
        return output.emit(document);
    }
    Ok(true)
}

struct Output<'a, 'b> {
    path: Arc<str>,
    emitted: u64,
    sink: &'a mut Sink<'b>,
}

impl Output<'_, '_> {
    fn emit(&mut self, text: String) -> Result<bool, DataError> {
        self.emitted += 1;
        if self.emitted == 2 && !(self.sink)(Event::Cut)? {
            return Ok(false);
        }
        let content = Content::Text(text);
        (self.sink)(Event::Document(RawDocument {
            content,
            path: Arc::clone(&self.path),
            line: 0,
        }))
    }
}

/// A file's text in chunks of at most `limit` bytes.
struct Chunks<'f> {
    file: &'f InputFile,
    reader: Box<dyn Read + Send>,
    limit: usize,
    buffer: Vec<u8>,
    /// Bytes of the file before the buffer.
    consumed: u64,
}

impl<'f> Chunks<'f> {
    /// `None` for a binary file.
    fn open(file: &'f InputFile, options: &ReadOptions) -> Result<Option<Self>, DataError> {
        let reader = decompress::open(file, &options.bytes_read)?;
        let mut chunks = Self {
            file,
            reader,
            limit: options.max_document_bytes.max(4),
            buffer: Vec::new(),
            consumed: 0,
        };
        chunks.fill(BINARY_PROBE_BYTES.min(chunks.limit))?;
        if chunks.buffer.contains(&0) {
            return Ok(None);
        }
        if chunks.buffer.starts_with("\u{feff}".as_bytes()) {
            chunks.buffer.drain(..3); // a byte order mark is no text
            chunks.consumed = 3;
        }
        Ok(Some(chunks))
    }

    fn fill(&mut self, size: usize) -> Result<(), DataError> {
        let missing = size.saturating_sub(self.buffer.len()) as u64;
        (&mut self.reader)
            .take(missing)
            .read_to_end(&mut self.buffer)
            .map_err(DataError::io(&self.file.path, "read"))?;
        Ok(())
    }

    fn next_chunk(&mut self) -> Result<Option<String>, DataError> {
        self.fill(self.limit)?;
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let full = self.buffer.len() >= self.limit;
        let end = if full {
            cut_point(&self.buffer)
        } else {
            self.buffer.len()
        };
        let rest = self.buffer.split_off(end);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        let consumed = self.consumed;
        self.consumed += bytes.len() as u64;
        String::from_utf8(bytes)
            .map(Some)
            .map_err(|error| DataError::InvalidUtf8 {
                location: self.file.path.display().to_string(),
                byte: consumed + error.utf8_error().valid_up_to() as u64,
            })
    }
}

/// Where to cut a full buffer: after the last line end of its second half, else before the last character begun.
fn cut_point(bytes: &[u8]) -> usize {
    let half = bytes.len() / 2;
    if let Some(newline) = bytes[half..].iter().rposition(|&byte| byte == b'\n') {
        return half + newline + 1;
    }
    // A character has at most four bytes; in invalid text any place will do.
    let tail = bytes.len() - 4.min(bytes.len());
    match (tail.max(1)..bytes.len())
        .rev()
        .find(|&at| !is_continuation(bytes[at]))
    {
        Some(at) => at,
        None => bytes.len(),
    }
}

fn is_continuation(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

/// So long are the pieces that a text is tokenised in: long enough that their seams do not matter, short enough to keep
/// all cores busy on one long document and to bound the tokenizer's memory.
pub(crate) const PIECE_BYTES: usize = 128 << 10;

/// Cuts `text` into pieces for the tokenizer; joined they are `text` again.
///
/// Cuts lie before the last space, or after a single line feed, before a word: the usual pre-tokenizers cut there as
/// well, so the ids are those of the whole text. Text without such a place in half a piece is cut anywhere between
/// characters.
pub(crate) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, after) = rest.split_at(piece_end(rest, PIECE_BYTES));
        rest = after;
        Some(piece)
    })
}

fn piece_end(text: &str, limit: usize) -> usize {
    if text.len() <= limit {
        return text.len();
    }
    let bytes = text.as_bytes();
    let word_at = |at: usize| bytes[at].is_ascii_alphanumeric();
    (limit / 2..limit)
        .rev()
        .find(|&at| match (bytes[at - 1], bytes[at]) {
            (_, b' ') => word_at(at + 1),
            (b'\n', _) => bytes[at - 2].is_ascii_graphic() && word_at(at),
            _ => false,
        })
        .or_else(|| (1..=limit).rev().find(|&at| text.is_char_boundary(at)))
        .unwrap_or(text.len())
}
