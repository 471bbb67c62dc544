//! A background thread that reads batches ahead of the training step.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use crate::{DataError, Row, Sampler};

/// Rows of one step, as the loader hands them over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The step they belong to.
    pub step: u64,
    /// The rows that the loader was asked for, in order.
    pub rows: Vec<Row>,
}

/// Delivers `sampler.batch(step, rows)` for `step = first_step, first_step + 1, ...`, read ahead by a thread.
///
/// It holds no state beyond the step: a loader made anew at step `s` goes on exactly there.
#[derive(Debug)]
pub struct Loader {
    batches: Option<Receiver<Result<Batch, DataError>>>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts reading; keeps at most `prefetch` batches (at least one) waiting.
    pub fn new(
        sampler: Arc<Sampler>,
        rows: Range<usize>,
        first_step: u64,
        prefetch: usize,
    ) -> Result<Self, DataError> {
        sampler.check_rows(&rows)?;
        let (sender, batches) = sync_channel(prefetch.max(1));
        let thread = std::thread::Builder::new()
            .name("data-loader".into())
            .spawn(move || {
                for step in first_step.. {
                    let batch = sampler
                        .batch(step, rows.clone())
                        .map(|rows| Batch { step, rows });
                    let failed = batch.is_err();
                    // The receiver is gone when the loader was dropped: nothing is left to do.
                    if sender.send(batch).is_err() || failed {
                        return;
                    }
                }
            })
            .map_err(DataError::io(
                std::path::Path::new("data-loader"),
                "start the thread",
            ))?;
        Ok(Self {
            batches: Some(batches),
            thread: Some(thread),
        })
    }

    /// The next step's batch; waits for it if need be. After an error the loader has stopped.
    pub fn next_batch(&mut self) -> Result<Batch, DataError> {
        self.batches
            .as_ref()
            .and_then(|batches| batches.recv().ok())
            .unwrap_or(Err(DataError::LoaderStopped))
    }
}

impl Iterator for Loader {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.next_batch())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Closing the queue wakes a thread that waits to send.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
