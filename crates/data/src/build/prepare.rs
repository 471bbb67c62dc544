//! The parallel part of a build: from raw documents to hashes and token ids.

use std::sync::Mutex;

use rayon::prelude::*;

use crate::manifest::Split;
use crate::source::{BadRecords, Content, RawDocument, pieces};
use crate::tokenizer::Encoder;
use crate::{DataError, Tokenizer};

/// What a record became.
pub(super) enum Prepared {
    /// Nothing: it could not be read and may be skipped.
    Bad,
    /// One document or, over `max_document_bytes`, several.
    Documents(Vec<Document>),
}

/// A document on its way into a shard.
pub(super) struct Document {
    pub split: Split,
    /// BLAKE3 of the text.
    pub hash: [u8; 32],
    pub text_bytes: u64,
    /// Token ids, `None` when an earlier run stored the document already.
    pub tokens: Option<Vec<Vec<u32>>>,
}

/// Turns records into tokens on all threads of the current pool.
pub(super) struct Preparer<'c> {
    pub text_key: &'c str,
    pub bad_records: BadRecords,
    pub max_document_bytes: usize,
    pub validation_fraction: f64,
    pub tokenizers: &'c TokenizerPool,
    /// Records before this number are stored already, per split.
    pub stored: [u64; 2],
}

impl Preparer<'_> {
    /// Prepares `records`, the first of which has number `first_record`; the order is kept.
    pub fn prepare(
        &self,
        first_record: u64,
        records: &[RawDocument],
    ) -> Vec<Result<Prepared, DataError>> {
        (records.par_iter().enumerate())
            .map(|(index, record)| self.prepare_one(first_record + index as u64, record))
            .collect()
    }

    fn prepare_one(&self, number: u64, record: &RawDocument) -> Result<Prepared, DataError> {
        let Some(text) = record.text(self.text_key, self.bad_records)? else {
            return Ok(Prepared::Bad);
        };
        let parts = match &record.content {
            Content::Text(_) if record.line == 0 => vec![&*text], // the reader has cut it
            _ => cut(&text, self.max_document_bytes),
        };
        let documents = parts
            .into_iter()
            .map(|part| self.document(number, part))
            .collect::<Result<_, _>>()?;
        Ok(Prepared::Documents(documents))
    }

    fn document(&self, number: u64, text: &str) -> Result<Document, DataError> {
        let hash = *blake3::hash(text.as_bytes()).as_bytes();
        let split = split_of(&hash, self.validation_fraction);
        let tokens = if number < self.stored[split as usize] {
            None
        } else {
            let pieces: Vec<&str> = pieces(text).collect();
            Some(
                pieces
                    .into_par_iter()
                    .with_max_len(1)
                    .map(|piece| self.tokenizers.encode(piece))
                    .collect::<Result<_, _>>()?,
            )
        };
        Ok(Document {
            split,
            hash,
            text_bytes: text.len() as u64,
            tokens,
        })
    }
}

/// The split of a document by the hash of its text: the same text always lies on the same side.
pub(super) fn split_of(hash: &[u8; 32], validation_fraction: f64) -> Split {
    let (head, _) = hash.split_at(8);
    let number = head
        .iter()
        .fold(0u64, |value, &byte| value << 8 | u64::from(byte));
    // 53 bits are what an f64 holds exactly.
    let uniform = (number >> 11) as f64 / (1u64 << 53) as f64;
    if uniform < validation_fraction {
        Split::Validation
    } else {
        Split::Train
    }
}

/// Cuts a record's text into parts of at most `limit` bytes, between characters.
fn cut(mut text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    while text.len() > limit.max(4) {
        let at = (1..=limit.max(4))
            .rev()
            .find(|&at| text.is_char_boundary(at))
            .unwrap_or(text.len());
        let (part, rest) = text.split_at(at);
        parts.push(part);
        text = rest;
    }
    parts.push(text);
    parts
}

/// One encoder for each thread, made when the thread first needs it.
pub(super) struct TokenizerPool {
    original: Tokenizer,
    encoders: Vec<Mutex<Option<Encoder>>>,
}

impl TokenizerPool {
    pub fn new(original: Tokenizer, threads: usize) -> Self {
        Self {
            original,
            encoders: (0..threads).map(|_| Mutex::new(None)).collect(),
        }
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let own = rayon::current_thread_index().and_then(|index| self.encoders.get(index));
        // A thread's encoder is free unless the thread has come here a second time or panicked on the way.
        match own.map(Mutex::try_lock) {
            Some(Ok(mut encoder)) => encoder
                .get_or_insert_with(|| Encoder::new(self.original.clone()))
                .encode(text),
            _ => self.original.encode(text),
        }
    }
}
