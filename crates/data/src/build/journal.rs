//! `build.jsonl`: what a build has finished, one line per shard, so that the next run goes on from there.
//!
//! A line is appended after its shard was renamed into place, and flushed. Killed in between, the shard is written
//! again, with the same bytes. A line cut short by a kill does not parse and is dropped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::manifest::{ShardInfo, Skipped, Split};
use crate::{DataError, durable};

/// Where in a source a split's next shard begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Position {
    /// Records before this one (counted over the whole source) are stored.
    pub next_record: u64,
    /// The unit that holds the record before `next_record`.
    pub unit: usize,
    /// Number of that unit's first record.
    pub unit_first_record: u64,
    /// Counts at the start of that unit.
    pub skipped_before_unit: Skipped,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Entry {
    /// First line: which build this is.
    Build { fingerprint: String, inputs: String },
    /// A shard is in place.
    Shard {
        source: usize,
        split: Split,
        info: ShardInfo,
        next: Position,
    },
    /// All shards of a source are in place.
    SourceDone { source: usize, skipped: Skipped },
}

/// What earlier runs finished.
#[derive(Debug, Default)]
pub(super) struct Finished {
    entries: Vec<Entry>,
}

impl Finished {
    pub fn shards(&self, source: usize, split: Split) -> Vec<ShardInfo> {
        self.of(source, split)
            .map(|(info, _)| info.clone())
            .collect()
    }

    pub fn position(&self, source: usize, split: Split) -> Position {
        self.of(source, split)
            .last()
            .map(|(_, next)| *next)
            .unwrap_or_default()
    }

    pub fn source_done(&self, source: usize) -> Option<Skipped> {
        self.entries.iter().find_map(|entry| match entry {
            Entry::SourceDone {
                source: done,
                skipped,
            } if *done == source => Some(*skipped),
            _ => None,
        })
    }

    fn of(&self, source: usize, split: Split) -> impl Iterator<Item = (&ShardInfo, &Position)> {
        self.entries.iter().filter_map(move |entry| match entry {
            Entry::Shard {
                source: s,
                split: p,
                info,
                next,
            } if (*s, *p) == (source, split) => Some((info, next)),
            _ => None,
        })
    }

    /// Drops shards that are gone or have another size, and all that came after them in their split.
    fn drop_missing(&mut self, dir: &Path) {
        let mut broken = Vec::new();
        self.entries.retain(|entry| match entry {
            Entry::Shard {
                source,
                split,
                info,
                ..
            } => {
                let there = std::fs::metadata(dir.join(&info.file))
                    .is_ok_and(|file| file.len() == info.bytes);
                if !there {
                    broken.push((*source, *split));
                }
                !broken.contains(&(*source, *split))
            }
            _ => true,
        });
        self.entries.retain(|entry| match entry {
            Entry::SourceDone { source, .. } => !broken.iter().any(|(broken, _)| broken == source),
            _ => true,
        });
    }
}

/// The open journal of a build.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    pub const FILE: &'static str = "build.jsonl";

    /// Opens or starts the journal in `dir`. Refuses a folder in which another build was begun: other settings, or
    /// inputs changed since (`inputs` stamps their sizes and times).
    pub fn open(
        dir: &Path,
        fingerprint: &str,
        inputs: &str,
    ) -> Result<(Self, Finished), DataError> {
        let path = dir.join(Self::FILE);
        let mut finished = Finished::default();
        let header = Entry::Build {
            fingerprint: fingerprint.into(),
            inputs: inputs.into(),
        };
        match std::fs::read(&path) {
            Ok(text) => {
                let mut lines = text
                    .split_inclusive(|&byte| byte == b'\n')
                    .map_while(|line| {
                        serde_json::from_slice::<Entry>(line.strip_suffix(b"\n")?).ok()
                    });
                match lines.next() {
                    Some(found) if found == header => finished.entries = lines.collect(),
                    Some(Entry::Build {
                        fingerprint: found, ..
                    }) => {
                        let reason = if found == fingerprint {
                            "a build was begun here and its input files have changed since"
                        } else {
                            "it holds a dataset of other inputs, settings or tokenizer"
                        };
                        return Err(DataError::OutputInUse {
                            path: dir.into(),
                            reason: reason.into(),
                        });
                    }
                    // Killed while writing the very first line: nothing was finished.
                    _ => {}
                }
                finished.drop_missing(dir);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(DataError::io(&path, "read the build journal")(error)),
        }
        // Written anew without what was dropped, so that appended lines follow whole ones.
        durable::write_atomically(&path, |writer| {
            for entry in std::iter::once(&header).chain(&finished.entries) {
                writeln!(writer, "{}", serde_json::to_string(entry)?)?;
            }
            Ok(())
        })?;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(DataError::io(&path, "open the build journal"))?;
        Ok((Self { path, file }, finished))
    }

    /// Appends a line and flushes it to disk.
    pub fn append(&mut self, entry: &Entry) -> Result<(), DataError> {
        let line = serde_json::to_string(entry)
            .map_err(std::io::Error::from)
            .map(|line| line + "\n");
        line.and_then(|line| self.file.write_all(line.as_bytes()))
            .and_then(|()| self.file.sync_data())
            .map_err(DataError::io(&self.path, "append to the build journal"))
    }
}
