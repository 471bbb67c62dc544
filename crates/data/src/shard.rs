//! One shard: a header, the documents' first tokens, and the tokens.
//!
//! | bytes | content (little-endian) |
//! |---|---|
//! | 8 | `TTTSHARD` |
//! | 4 | format version, 1 |
//! | 4 | bytes of a token, 2 or 4 |
//! | 8 | documents D |
//! | 8 | tokens T |
//! | 8 D | index of each document's first token, ascending from 0 |
//! | 2 T or 4 T | token ids; every document ends with the end-of-text token |
//!
//! Documents never cross shards.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::manifest::{ShardInfo, TokenType};
use crate::{DataError, durable};

const MAGIC: &[u8; 8] = b"TTTSHARD";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;

/// Documents gathered in memory until they make a shard.
#[derive(Default)]
pub(crate) struct ShardBuilder {
    tokens: Vec<u32>,
    documents: Vec<Pending>,
    text_bytes: u64,
}

struct Pending {
    order: [u8; 32],
    start: usize,
    len: usize,
}

impl ShardBuilder {
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// Adds a document (its end-of-text token included). `order` decides its place among the shard's documents.
    pub fn push(&mut self, order: [u8; 32], pieces: &[Vec<u32>], eos_id: u32, text_bytes: u64) {
        let start = self.tokens.len();
        for piece in pieces {
            self.tokens.extend_from_slice(piece);
        }
        self.tokens.push(eos_id);
        self.documents.push(Pending {
            order,
            start,
            len: self.tokens.len() - start,
        });
        self.text_bytes += text_bytes;
    }

    /// Writes the shard to `dir/file` in shuffled document order and empties the builder.
    pub fn write(
        &mut self,
        dir: &Path,
        file: String,
        dtype: TokenType,
    ) -> Result<ShardInfo, DataError> {
        let Self {
            tokens,
            mut documents,
            text_bytes,
        } = std::mem::take(self);
        documents.sort_unstable_by_key(|document| document.order);
        let (token_count, document_count) = (tokens.len() as u64, documents.len() as u64);
        let path = dir.join(&file);
        let (bytes, hash) = durable::write_atomically(&path, |writer| {
            let mut hasher = blake3::Hasher::new();
            let mut written = 0;
            let mut put = |bytes: &[u8]| {
                hasher.update(bytes);
                written += bytes.len() as u64;
                writer.write_all(bytes)
            };
            put(MAGIC)?;
            put(&VERSION.to_le_bytes())?;
            put(&(dtype.bytes() as u32).to_le_bytes())?;
            put(&document_count.to_le_bytes())?;
            put(&token_count.to_le_bytes())?;
            let mut start = 0u64;
            for document in &documents {
                put(&start.to_le_bytes())?;
                start += document.len as u64;
            }
            let mut encoded = Vec::new();
            for document in &documents {
                for chunk in tokens[document.start..document.start + document.len].chunks(1 << 16) {
                    encoded.clear();
                    match dtype {
                        // `TokenType::for_vocab` chose a type that holds every id.
                        TokenType::U16 => {
                            encoded.extend(chunk.iter().flat_map(|&id| (id as u16).to_le_bytes()))
                        }
                        TokenType::U32 => {
                            encoded.extend(chunk.iter().flat_map(|&id| id.to_le_bytes()))
                        }
                    }
                    put(&encoded)?;
                }
            }
            Ok((written, hasher.finalize()))
        })?;
        Ok(ShardInfo {
            file,
            bytes,
            tokens: token_count,
            documents: document_count,
            text_bytes,
            blake3: hash.to_hex().to_string(),
        })
    }
}

/// A shard mapped into memory. Reads are bounds-checked: a damaged file gives an error, never a panic.
#[derive(Debug)]
pub(crate) struct Shard {
    path: PathBuf,
    map: Mmap,
    dtype: TokenType,
    documents: u64,
    tokens: u64,
}

impl Shard {
    /// Maps the file and checks its size and header against the manifest; does not read the tokens.
    pub fn open(dir: &Path, info: &ShardInfo, dtype: TokenType) -> Result<Self, DataError> {
        let path = dir.join(&info.file);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(DataError::MissingShard { path });
            }
            Err(error) => return Err(DataError::io(&path, "open the shard")(error)),
        };
        let found = file
            .metadata()
            .map_err(DataError::io(&path, "read the size of the shard"))?
            .len();
        if found != info.bytes {
            return Err(DataError::ShardSize {
                path,
                expected: info.bytes,
                found,
            });
        }
        // SAFETY: the map is read-only and private to this struct. Shards are immutable once renamed into place, and
        // only a build into this folder could replace them, which it does by rename: the mapped file stays as it was.
        // Someone who truncates the file in place from outside can make a later read fault; that is the accepted
        // limit of memory-mapped data.
        let map = unsafe { Mmap::map(&file) }
            .map_err(DataError::io(&path, "map the shard into memory"))?;
        let shard = Self {
            path,
            map,
            dtype,
            documents: info.documents,
            tokens: info.tokens,
        };
        shard.check_header()?;
        Ok(shard)
    }

    fn check_header(&self) -> Result<(), DataError> {
        let corrupt = |reason: &str| Err(self.corrupt(reason));
        let header = match self.map.first_chunk::<HEADER_BYTES>() {
            Some(header) if header.starts_with(MAGIC) => header,
            _ => return corrupt("it does not begin with a shard header"),
        };
        let number = |at: usize, len: usize| {
            header[at..at + len]
                .iter()
                .rev()
                .fold(0u64, |value, &byte| value << 8 | u64::from(byte))
        };
        if number(8, 4) != u64::from(VERSION) {
            return corrupt("its format version is unknown");
        }
        if number(12, 4) != self.dtype.bytes() as u64 {
            return corrupt("its token type is not the manifest's");
        }
        if number(16, 8) != self.documents || number(24, 8) != self.tokens {
            return corrupt("its counts are not the manifest's");
        }
        let size = (self.documents.checked_mul(8))
            .zip(self.tokens.checked_mul(self.dtype.bytes() as u64))
            .and_then(|(documents, tokens)| {
                documents
                    .checked_add(tokens)?
                    .checked_add(HEADER_BYTES as u64)
            });
        if size != Some(self.map.len() as u64) {
            return corrupt("its size does not follow from its counts");
        }
        Ok(())
    }

    pub fn corrupt(&self, reason: impl Into<String>) -> DataError {
        DataError::CorruptShard {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Index of document `d`'s first token.
    fn start(&self, d: u64) -> u64 {
        let at = HEADER_BYTES + 8 * d as usize; // d < documents, and the size was checked
        self.map[at..at + 8]
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// Appends the tokens `from..to` to `out`.
    pub fn read_tokens(&self, from: u64, to: u64, out: &mut Vec<u32>) {
        let base = HEADER_BYTES + 8 * self.documents as usize;
        let width = self.dtype.bytes();
        let bytes = &self.map[base + from as usize * width..base + to as usize * width];
        match self.dtype {
            TokenType::U16 => out.extend(
                bytes
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|&b| u32::from(u16::from_le_bytes(b))),
            ),
            TokenType::U32 => out.extend(
                bytes
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|&b| u32::from_le_bytes(b)),
            ),
        }
    }

    /// Calls `found` with each document start in `from..to`, in order; refuses starts that do not ascend.
    pub fn for_each_start(
        &self,
        from: u64,
        to: u64,
        mut found: impl FnMut(u64),
    ) -> Result<(), DataError> {
        let (mut low, mut high) = (0, self.documents);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.start(middle) < from {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let mut last = None;
        for d in low..self.documents {
            let start = self.start(d);
            if start >= to {
                break;
            }
            if start < from || last.is_some_and(|last| start <= last) {
                return Err(self.corrupt(format!("the start of document {d} is out of order")));
            }
            last = Some(start);
            found(start);
        }
        Ok(())
    }

    /// Reads everything: starts ascend from 0, ids lie inside the vocabulary, every document ends with `eos_id`.
    pub fn check_content(&self, vocab_size: u64, eos_id: u32) -> Result<(), DataError> {
        let mut ends = Vec::with_capacity(self.documents as usize);
        self.for_each_start(0, self.tokens, |start| ends.push(start))?;
        if ends.len() as u64 != self.documents || ends.first().is_some_and(|&first| first != 0) {
            return Err(self.corrupt("its document starts do not cover its tokens"));
        }
        ends.push(self.tokens);
        let mut tokens = Vec::new();
        for pair in ends.windows(2) {
            tokens.clear();
            self.read_tokens(pair[0], pair[1], &mut tokens);
            if let Some(id) = tokens.iter().find(|&&id| u64::from(id) >= vocab_size) {
                return Err(self.corrupt(format!(
                    "token {id} is outside the vocabulary of {vocab_size}"
                )));
            }
            if tokens.last() != Some(&eos_id) {
                return Err(self.corrupt("a document does not end with the end-of-text token"));
            }
        }
        Ok(())
    }
}
