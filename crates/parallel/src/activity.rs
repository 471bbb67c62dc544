//! What a rank's main thread does, so that a rank that hangs can be told from one that works.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the main thread says of itself. Clones are the same one.
///
/// A thread that works passes [`at`](Self::at) again and again. While it waits for another rank, or has
/// declared a long task, nobody expects that of it.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Where it was last.
    at: String,
    /// Counts everything that is said here: it changes as long as the thread moves.
    moves: u64,
    /// Waits for others under way.
    waits: usize,
    /// Long tasks under way, by the move that declared them.
    tasks: BTreeMap<u64, String>,
    /// What a step takes, the slowest so far.
    step: Duration,
}

/// What somebody sees who looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Where the thread is, or its newest long task.
    pub what: String,
    /// Changes with every move.
    pub moves: u64,
    /// Whether it waits for another rank.
    pub waits: bool,
    /// Whether it has declared a long task.
    pub long: bool,
    /// The slowest step so far.
    pub step: Duration,
}

/// A wait or a long task, until it is dropped.
#[derive(Debug)]
#[must_use = "it is over when this is dropped"]
pub struct Declared {
    activity: Activity,
    task: Option<u64>,
}

impl Activity {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread moves, and has come to `place`.
    pub fn at(&self, place: impl Display) {
        let mut state = self.lock();
        state.moves += 1;
        state.at = place.to_string();
    }

    /// The thread begins what may take any time, and what others rightly wait for.
    pub fn long(&self, task: impl Display) -> Declared {
        let mut state = self.lock();
        state.moves += 1;
        let number = state.moves;
        state.tasks.insert(number, task.to_string());
        Declared {
            activity: self.clone(),
            task: Some(number),
        }
    }

    /// The thread begins to wait for other ranks.
    pub fn wait(&self) -> Declared {
        let mut state = self.lock();
        state.moves += 1;
        state.waits += 1;
        Declared {
            activity: self.clone(),
            task: None,
        }
    }

    /// A step took so long: what the thread does between two moves takes no longer than a step.
    pub fn step_took(&self, seconds: f64) {
        // What is no duration, such as NaN before the first step, is not one.
        if let Ok(step) = Duration::try_from_secs_f64(seconds) {
            let mut state = self.lock();
            state.step = state.step.max(step);
        }
    }

    pub(crate) fn look(&self) -> Seen {
        let state = self.lock();
        let task = state.tasks.values().next_back();
        Seen {
            what: task.unwrap_or(&state.at).clone(),
            moves: state.moves,
            waits: state.waits > 0,
            long: task.is_some(),
            step: state.step,
        }
    }
}

impl Drop for Declared {
    fn drop(&mut self) {
        let mut state = self.activity.lock();
        state.moves += 1;
        match self.task {
            Some(task) => drop(state.tasks.remove(&task)),
            None => state.waits -= 1,
        }
    }
}
