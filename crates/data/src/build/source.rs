//! The build of one source: read, prepare in parallel, append in order, close shards.

use std::sync::mpsc::{Receiver, sync_channel};

use super::journal::{Entry, Finished, Journal, Position};
use super::prepare::{Document, Prepared, Preparer, TokenizerPool};
use super::{Bar, BuildConfig, SHARD_FOLDER, source_info};
use crate::manifest::{Skipped, SourceInfo, Split, SplitInfo, TokenType};
use crate::shard::ShardBuilder;
use crate::source::{Discovered, Event, RawDocument, ReadOptions, read_events};
use crate::{DataError, durable};

/// Batches read ahead of the one in work.
const QUEUE: usize = 1;
/// Text of a batch for each thread: some pieces each, so that the threads end together.
const BATCH_BYTES_PER_THREAD: usize = 2 << 20;

pub(super) struct Job<'b> {
    pub config: &'b BuildConfig,
    pub index: usize,
    pub source: &'b Discovered,
    pub pool: &'b rayon::ThreadPool,
    pub tokenizers: &'b TokenizerPool,
    pub eos_id: u32,
    pub dtype: TokenType,
    pub bar: &'b Bar,
}

/// Some records, and what lay between them: `marks` are (records before it in the batch, event).
#[derive(Default)]
struct Batch {
    records: Vec<RawDocument>,
    marks: Vec<(usize, Event)>,
}

impl Job<'_> {
    /// Builds what earlier runs have not finished; returns the source's whole entry for the manifest.
    pub fn run(&self, journal: &mut Journal, finished: &Finished) -> Result<SourceInfo, DataError> {
        let mut writer = Writer::new(self, finished)?;
        if let Some(skipped) = finished.source_done(self.index) {
            self.bar
                .read
                .fetch_add(self.source.bytes(), std::sync::atomic::Ordering::Relaxed);
            return Ok(writer.info(skipped));
        }
        let start = writer.resume_position();
        let options = ReadOptions {
            bad_records: self.config.bad_records,
            max_document_bytes: self.config.max_document_bytes,
            bytes_read: self.bar.read.clone(),
        };
        let before: u64 = self.source.units[..start.unit]
            .iter()
            .flatten()
            .map(|file| file.bytes)
            .sum();
        self.bar
            .read
            .fetch_add(before, std::sync::atomic::Ordering::Relaxed);

        let batch_bytes = BATCH_BYTES_PER_THREAD * self.pool.current_num_threads();
        let (sender, batches) = sync_channel::<Batch>(QUEUE);
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut batch = Batch::default();
                let mut bytes = 0;
                read_events(self.source, &options, start.unit, &mut |event| {
                    match event {
                        Event::Document(record) => {
                            bytes += record.size();
                            batch.records.push(record);
                        }
                        mark => batch.marks.push((batch.records.len(), mark)),
                    }
                    if bytes < batch_bytes {
                        return Ok(true);
                    }
                    bytes = 0;
                    // The receiver is gone when the build failed: stop reading.
                    Ok(sender.send(std::mem::take(&mut batch)).is_ok())
                })?;
                let _ = sender.send(batch);
                Ok(())
            });
            let written = self.write_all(batches, start, &mut writer, journal);
            let read = reader
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // What was read before a reading error is stored by now, but the error decides.
            written.and_then(|skipped| read.map(|()| skipped))
        })
        .and_then(|skipped| {
            for split in Split::ALL {
                writer.close_shard(split, journal)?;
            }
            journal.append(&Entry::SourceDone {
                source: self.index,
                skipped,
            })?;
            Ok(writer.info(skipped))
        })
    }

    /// Takes batches until the reader has ended; returns the counts of what was passed over.
    fn write_all(
        &self,
        batches: Receiver<Batch>,
        start: Position,
        writer: &mut Writer<'_>,
        journal: &mut Journal,
    ) -> Result<Skipped, DataError> {
        let preparer = Preparer {
            text_key: &self.source.spec.text_key,
            bad_records: self.config.bad_records,
            max_document_bytes: self.config.max_document_bytes,
            validation_fraction: self.config.validation_fraction,
            tokenizers: self.tokenizers,
            stored: writer.stored,
        };
        let mut at = Position {
            next_record: start.unit_first_record,
            ..start
        };
        let mut skipped = start.skipped_before_unit;
        for batch in batches {
            let prepared = self
                .pool
                .install(|| preparer.prepare(at.next_record, &batch.records));
            let mut marks = batch.marks.into_iter().peekable();
            for (index, prepared) in prepared.into_iter().enumerate() {
                while let Some((_, mark)) = marks.next_if(|(before, _)| *before <= index) {
                    pass_mark(&mark, &mut at, &mut skipped);
                }
                let number = at.next_record;
                at.next_record += 1;
                match prepared? {
                    Prepared::Bad => skipped.bad_records += 1,
                    Prepared::Documents(documents) => {
                        skipped.cut_documents += u64::from(documents.len() > 1);
                        for (part, document) in documents.into_iter().enumerate() {
                            if document.text_bytes == 0 {
                                skipped.empty_documents += 1;
                            } else {
                                writer.push(number, part, document);
                            }
                        }
                        writer.close_full_shards(at, journal)?;
                    }
                }
            }
            for (_, mark) in marks {
                pass_mark(&mark, &mut at, &mut skipped);
            }
            self.bar.update(&self.source.spec.name, writer.tokens());
        }
        writer.end = at;
        Ok(skipped)
    }
}

fn pass_mark(mark: &Event, at: &mut Position, skipped: &mut Skipped) {
    match mark {
        Event::Unit(unit) => {
            *at = Position {
                next_record: at.next_record,
                unit: *unit,
                unit_first_record: at.next_record,
                skipped_before_unit: *skipped,
            };
        }
        Event::BinaryFile => skipped.binary_files += 1,
        Event::BadRecord => skipped.bad_records += 1,
        Event::Cut => skipped.cut_documents += 1,
        Event::Document(_) => {}
    }
}

/// The open shard of each split, and what is closed.
struct Writer<'b> {
    job: &'b Job<'b>,
    open: [ShardBuilder; 2],
    closed: [SplitInfo; 2],
    positions: [Position; 2],
    stored: [u64; 2],
    end: Position,
}

impl<'b> Writer<'b> {
    fn new(job: &'b Job<'b>, finished: &Finished) -> Result<Self, DataError> {
        let dir = job
            .config
            .out
            .join(SHARD_FOLDER)
            .join(&job.source.spec.name);
        std::fs::create_dir_all(&dir).map_err(DataError::io(&dir, "create the folder"))?;
        remove_partial(&dir)?;
        let mut closed = [SplitInfo::default(), SplitInfo::default()];
        for split in Split::ALL {
            for shard in finished.shards(job.index, split) {
                add_shard(&mut closed[split as usize], shard);
            }
        }
        let positions = Split::ALL.map(|split| finished.position(job.index, split));
        let stored = positions.map(|position| position.next_record);
        Ok(Self {
            job,
            open: Default::default(),
            closed,
            positions,
            stored,
            end: Position::default(),
        })
    }

    /// Where reading has to begin so that no split misses a document.
    fn resume_position(&self) -> Position {
        let [train, validation] = self.positions;
        let first = if train.next_record <= validation.next_record {
            train
        } else {
            validation
        };
        if first.next_record == 0 {
            return Position {
                skipped_before_unit: self.job.source.skipped,
                ..Position::default()
            };
        }
        first
    }

    fn tokens(&self) -> u64 {
        let open: usize = self.open.iter().map(ShardBuilder::tokens).sum();
        self.closed.iter().map(|split| split.tokens).sum::<u64>() + open as u64
    }

    fn push(&mut self, number: u64, part: usize, document: Document) {
        let Some(tokens) = document.tokens else {
            return; // an earlier run stored it
        };
        // Neighbours in the input become strangers in the shard; equal texts get different places.
        let mut order = blake3::Hasher::new();
        order
            .update(&document.hash)
            .update(&number.to_le_bytes())
            .update(&(part as u64).to_le_bytes());
        let order = *order.finalize().as_bytes();
        self.open[document.split as usize].push(
            order,
            &tokens,
            self.job.eos_id,
            document.text_bytes,
        );
    }

    fn close_full_shards(&mut self, at: Position, journal: &mut Journal) -> Result<(), DataError> {
        self.end = at;
        for split in Split::ALL {
            if self.open[split as usize].tokens() >= self.job.config.shard_tokens {
                self.close_shard(split, journal)?;
            }
        }
        Ok(())
    }

    /// Writes the open shard of `split`, if it holds anything, and notes it in the journal.
    fn close_shard(&mut self, split: Split, journal: &mut Journal) -> Result<(), DataError> {
        let open = &mut self.open[split as usize];
        if open.is_empty() {
            return Ok(());
        }
        let closed = &mut self.closed[split as usize];
        let name = &self.job.source.spec.name;
        let file = format!(
            "{SHARD_FOLDER}/{name}/{}-{:05}.bin",
            split.name(),
            closed.shards.len()
        );
        let info = open.write(&self.job.config.out, file, self.job.dtype)?;
        add_shard(closed, info.clone());
        journal.append(&Entry::Shard {
            source: self.job.index,
            split,
            info,
            next: self.end,
        })
    }

    fn info(self, skipped: Skipped) -> SourceInfo {
        let [train, validation] = self.closed;
        SourceInfo {
            skipped,
            ..source_info(self.job.source, train, validation)
        }
    }
}

fn add_shard(split: &mut SplitInfo, shard: crate::manifest::ShardInfo) {
    split.tokens += shard.tokens;
    split.documents += shard.documents;
    split.text_bytes += shard.text_bytes;
    split.shards.push(shard);
}

/// Removes what a killed run was writing.
fn remove_partial(dir: &std::path::Path) -> Result<(), DataError> {
    for entry in std::fs::read_dir(dir).map_err(DataError::io(dir, "list the folder"))? {
        let path = entry.map_err(DataError::io(dir, "list the folder"))?.path();
        if path.to_string_lossy().ends_with(durable::PARTIAL_SUFFIX) {
            std::fs::remove_file(&path).map_err(DataError::io(&path, "remove"))?;
        }
    }
    Ok(())
}
