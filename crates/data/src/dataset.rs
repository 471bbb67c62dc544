//! An opened dataset: per source one endless-looking stream of tokens, read in windows.
//!
//! N tokens per row (sequence_length). Window `w` of a source covers tokens `w N ..= w N + N` of its stream: N inputs
//! and the label of the last one. Windows overlap by that one token.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::manifest::{Manifest, Split};
use crate::shard::Shard;
use crate::{DataError, Tokenizer};

/// The label of a position whose next token belongs to another document; the loss leaves it out.
pub const IGNORE: u32 = u32::MAX;

/// One row of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Token ids, `[N]`.
    pub input_ids: Vec<u32>,
    /// The next token of each position, `[N]`; [`IGNORE`] where it belongs to another document.
    pub labels: Vec<u32>,
    /// Positions in the row where a document begins, ascending. The first is always 0, also when the row begins
    /// inside a document.
    pub document_starts: Vec<u32>,
}

/// One split of a dataset folder, mapped into memory. Cheap to share; reading needs no lock.
#[derive(Debug)]
pub struct Dataset {
    dir: PathBuf,
    split: Split,
    manifest: Manifest,
    streams: Vec<Stream>,
}

#[derive(Debug)]
struct Stream {
    shards: Vec<Shard>,
    /// Stream position of each shard's first token; one more entry, the total, at the end.
    offsets: Vec<u64>,
}

impl Stream {
    fn tokens(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    fn windows(&self, sequence_length: usize) -> u64 {
        self.tokens().saturating_sub(1) / sequence_length.max(1) as u64
    }
}

impl Dataset {
    /// Opens one split of the dataset in `dir`. Checks the manifest's hash and every shard's size and header;
    /// [`verify`] checks the content.
    pub fn open(dir: &Path, split: Split) -> Result<Self, DataError> {
        let manifest = Manifest::load(dir)?;
        let mut streams = Vec::with_capacity(manifest.sources.len());
        for source in &manifest.sources {
            let (mut shards, mut offsets) = (Vec::new(), vec![0]);
            for info in &source.split(split).shards {
                let shard = Shard::open(dir, info, manifest.dtype)?;
                offsets.push(offsets[offsets.len() - 1] + shard.tokens());
                shards.push(shard);
            }
            streams.push(Stream { shards, offsets });
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            split,
            manifest,
            streams,
        })
    }

    /// The dataset's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Which split this is.
    pub fn split(&self) -> Split {
        self.split
    }

    /// Tokens of this split, over all sources.
    pub fn tokens(&self) -> u64 {
        self.streams.iter().map(Stream::tokens).sum()
    }

    /// What the folder holds, both splits.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Loads the copy of the tokenizer that lies in the folder.
    pub fn tokenizer(&self) -> Result<Tokenizer, DataError> {
        Tokenizer::load_from_dataset(&self.dir, &self.manifest)
    }

    /// Refuses a tokenizer that did not make this dataset.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<(), DataError> {
        if tokenizer.hash() == self.manifest.tokenizer_hash {
            return Ok(());
        }
        Err(DataError::TokenizerMismatch {
            path: self.dir.clone(),
            expected: self.manifest.tokenizer_hash.clone(),
            found: tokenizer.hash().to_string(),
        })
    }

    /// Entropy of this split's token frequencies, in nats per token: the loss of a model that knows nothing of context.
    /// Reads every token; 0 for an empty split.
    pub fn unigram_entropy(&self) -> Result<f64, DataError> {
        let mut counts = vec![0u64; self.manifest.vocab_size as usize];
        let mut tokens = Vec::new();
        for shard in self.streams.iter().flat_map(|stream| &stream.shards) {
            for from in (0..shard.tokens()).step_by(1 << 16) {
                tokens.clear();
                shard.read_tokens(from, shard.tokens().min(from + (1 << 16)), &mut tokens);
                for &id in &tokens {
                    match counts.get_mut(id as usize) {
                        Some(count) => *count += 1,
                        None => {
                            return Err(
                                shard.corrupt(format!("token {id} is outside the vocabulary"))
                            );
                        }
                    }
                }
            }
        }
        let total = self.tokens() as f64;
        let used = counts.into_iter().filter(|&count| count > 0);
        Ok(used
            .map(|count| count as f64 / total)
            .map(|share| -share * share.ln())
            .sum())
    }

    /// Whole windows of `sequence_length` in source `source` (index into the manifest's list).
    pub fn source_windows(&self, source: usize, sequence_length: usize) -> u64 {
        self.streams
            .get(source)
            .map_or(0, |stream| stream.windows(sequence_length))
    }

    /// Window `window` of one source.
    pub fn window(
        &self,
        source: usize,
        window: u64,
        sequence_length: usize,
    ) -> Result<Row, DataError> {
        let count = self.source_windows(source, sequence_length);
        let stream = match self.streams.get(source) {
            Some(stream) if window < count => stream,
            _ => {
                return Err(DataError::RowOutOfRange {
                    index: window,
                    count,
                });
            }
        };
        let from = window * sequence_length as u64;
        let to = from + sequence_length as u64 + 1;
        let mut tokens = Vec::with_capacity(sequence_length + 1);
        // Position 0 always starts a piece; `starts` also holds N when the last label begins a document.
        let mut starts: Vec<u32> = vec![0];
        // The first shard that reaches beyond `from`: offsets ascend strictly, since no shard is empty.
        let first = stream.offsets.partition_point(|&offset| offset <= from) - 1;
        for (shard, &base) in stream.shards.iter().zip(&stream.offsets).skip(first) {
            if base >= to {
                break;
            }
            let within = from.max(base) - base..(to - base).min(shard.tokens());
            shard.for_each_start(within.start, within.end, |start| {
                let position = (base + start - from) as u32;
                if position > 0 {
                    starts.push(position);
                }
            })?;
            let read = tokens.len();
            shard.read_tokens(within.start, within.end, &mut tokens);
            if let Some(id) = tokens[read..]
                .iter()
                .find(|&&id| u64::from(id) >= self.manifest.vocab_size)
            {
                return Err(shard.corrupt(format!("token {id} is outside the vocabulary")));
            }
        }
        let mut labels = tokens[1..].to_vec();
        for &start in &starts[1..] {
            labels[start as usize - 1] = IGNORE;
        }
        tokens.truncate(sequence_length);
        starts.retain(|&start| (start as usize) < sequence_length);
        Ok(Row {
            input_ids: tokens,
            labels,
            document_starts: starts,
        })
    }

    /// All windows in order, source after source: what evaluation walks through. Refuses a split without any.
    pub fn sequential(
        self: &Arc<Self>,
        sequence_length: usize,
    ) -> Result<SequentialRows, DataError> {
        check_sequence_length(sequence_length)?;
        let mut ends = Vec::with_capacity(self.streams.len());
        let mut total = 0;
        for stream in &self.streams {
            total += stream.windows(sequence_length);
            ends.push(total);
        }
        if total == 0 {
            return Err(self.too_few("the dataset", self.tokens(), sequence_length));
        }
        Ok(SequentialRows {
            dataset: Arc::clone(self),
            sequence_length,
            ends,
        })
    }

    pub(crate) fn too_few(&self, what: &str, tokens: u64, sequence_length: usize) -> DataError {
        DataError::TooFewTokens {
            path: self.dir.clone(),
            split: self.split.name(),
            what: what.to_string(),
            tokens,
            sequence_length,
        }
    }
}

pub(crate) fn check_sequence_length(sequence_length: usize) -> Result<(), DataError> {
    if (1..u32::MAX as usize).contains(&sequence_length) {
        return Ok(());
    }
    Err(DataError::setting(
        "sequence_length",
        format!("{sequence_length} is not a length between 1 and 2^32 - 2"),
    ))
}

/// The windows of a split in stored order: row `i` is the same on every run.
#[derive(Clone, Debug)]
pub struct SequentialRows {
    dataset: Arc<Dataset>,
    sequence_length: usize,
    /// Windows up to and including each source.
    ends: Vec<u64>,
}

impl SequentialRows {
    /// How many rows there are, at least one.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Index range of the rows of source `source` (may be empty).
    pub fn source_rows(&self, source: usize) -> Range<u64> {
        let end = self.ends.get(source).copied().unwrap_or(self.len());
        let start = if source == 0 {
            0
        } else {
            self.ends.get(source - 1).copied().unwrap_or(end)
        };
        start..end
    }

    /// Row `index`.
    pub fn row(&self, index: u64) -> Result<Row, DataError> {
        let source = self.ends.partition_point(|&end| end <= index);
        if source == self.ends.len() {
            return Err(DataError::RowOutOfRange {
                index,
                count: self.len(),
            });
        }
        self.dataset.window(
            source,
            index - self.source_rows(source).start,
            self.sequence_length,
        )
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = Result<Row, DataError>> + '_ {
        (0..self.len()).map(|index| self.row(index))
    }
}

/// Reads every file of the dataset in `dir` on all cores and checks its hash and content. Returns the bytes read.
pub fn verify(dir: &Path) -> Result<u64, DataError> {
    let manifest = Manifest::load(dir)?;
    Tokenizer::load_from_dataset(dir, &manifest)?;
    let shards: Vec<_> = (manifest.sources.iter())
        .flat_map(|source| {
            Split::ALL
                .into_iter()
                .flat_map(|split| &source.split(split).shards)
        })
        .collect();
    shards
        .par_iter()
        .map(|info| {
            let shard = Shard::open(dir, info, manifest.dtype)?;
            let found = blake3::hash(shard.bytes()).to_hex();
            if found.as_str() != info.blake3 {
                return Err(shard.corrupt(format!(
                    "its hash is {found}, the manifest says {}",
                    info.blake3
                )));
            }
            shard.check_content(manifest.vocab_size, manifest.eos_id)?;
            Ok(info.bytes)
        })
        .sum()
}
