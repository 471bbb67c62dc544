//! What a rank's main thread does, so that a rank that hangs can be told from one that works.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the main thread says of itself. Clones are the same one.
///
/// A thread that works passes [`at`](Self::at) again and again, in long tasks too. While it waits for
/// another rank nobody expects that of it.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Where it was last, and the move that brought it there.
    at: (u64, String),
    /// Counts everything that is said here: it changes as long as the thread moves.
    moves: u64,
    /// Waits for others under way.
    waits: usize,
    /// Tasks under way, by the move that declared them.
    tasks: BTreeMap<u64, (Patience, String)>,
    /// Is told of every place, to mark it in what the device has to do.
    mark: Option<fn()>,
    /// Marks that the device has come to, and those before it.
    marks: (u64, usize),
}

/// How long a thread may stand still in what it does; the more patient are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Patience {
    /// As in a step.
    #[default]
    Usual,
    /// Several times as long while its process is at work; and how long it does tells what is usual after it.
    First,
    /// Several times as long while its process is at work.
    Long,
    /// For ever.
    Endless,
}

/// What somebody sees who looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Where the thread is, and in which task.
    pub what: String,
    /// Changes with every mark that the device passes and, while none is before it, with every move of the
    /// thread: one that is ahead of its device says nothing of it.
    pub moves: u64,
    /// Whether the thread waits for another rank.
    pub waits: bool,
    /// Whether the device has marks before it: it is the one that has to move.
    pub device: bool,
    /// That of the most patient task.
    pub patience: Patience,
}

/// A wait or a task, until it is dropped.
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
        state.at = (state.moves, place.to_string());
        if let Some(mark) = state.mark {
            mark();
        }
    }

    /// The thread begins what others rightly wait for, and in which it may stand still for longer
    /// than in a step, as long as its process computes, reads or writes.
    pub fn long(&self, task: impl Display) -> Declared {
        self.task(Patience::Long, task)
    }

    /// As [`long`](Self::long), for what will come again: how long the thread stands still in it tells
    /// what is usual from then on.
    pub fn first(&self, task: impl Display) -> Declared {
        self.task(Patience::First, task)
    }

    /// The thread begins what may take any time without a move, since that is up to something outside:
    /// the size of a text, a network, whoever holds a terminal.
    pub fn endless(&self, task: impl Display) -> Declared {
        self.task(Patience::Endless, task)
    }

    fn task(&self, patience: Patience, task: impl Display) -> Declared {
        let mut state = self.lock();
        state.moves += 1;
        let number = state.moves;
        state.tasks.insert(number, (patience, task.to_string()));
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

    /// From now on `mark` is told of every place that the thread comes to.
    pub(crate) fn mark_with(&self, mark: fn()) {
        self.lock().mark = Some(mark);
    }

    /// The device has passed so many marks by now, and so many are before it.
    pub(crate) fn marks(&self, passed: u64, left: usize) {
        self.lock().marks = (passed, left);
    }

    pub(crate) fn look(&self) -> Seen {
        let state = self.lock();
        let (came, at) = &state.at;
        let what = match state.tasks.last_key_value() {
            None => at.clone(),
            Some((begun, (_, task))) if begun > came => task.clone(),
            Some((_, (_, task))) => format!("{task}, {at}"),
        };
        let (passed, left) = state.marks;
        let patience = state.tasks.values().map(|(patience, _)| *patience);
        Seen {
            what,
            moves: passed + if left == 0 { state.moves } else { 0 },
            waits: state.waits > 0,
            device: left > 0,
            patience: patience.max().unwrap_or_default(),
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
