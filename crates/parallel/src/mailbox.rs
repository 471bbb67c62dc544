//! What has arrived from other ranks and not yet been taken.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Which exchange a letter belongs to, so that ranks that disagree hear of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The sum over all ranks.
    AllReduce,
    /// The shards of all ranks.
    AllGather,
    /// A shard of the sum.
    ReduceScatter,
    /// Parts to all ranks.
    AllToAll,
    /// One rank's tensor.
    Broadcast,
    /// Between single ranks.
    Exchange,
    /// Nothing but presence.
    Barrier,
    /// Making sub-groups.
    Split,
}

impl Operation {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::Broadcast => "broadcast",
            Self::Exchange => "exchange",
            Self::Barrier => "barrier",
            Self::Split => "split",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Letters in the order of their arrival, by group and sender.
#[derive(Debug)]
pub struct Mailbox<P> {
    state: Mutex<State<P>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<P> {
    letters: HashMap<(u32, usize), VecDeque<(Operation, P)>>,
    /// The first failure of any rank: the run cannot go on.
    failed: Option<String>,
}

impl<P> Default for Mailbox<P> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                letters: HashMap::new(),
                failed: None,
            }),
            changed: Condvar::new(),
        }
    }
}

impl<P> Mailbox<P> {
    fn lock(&self) -> MutexGuard<'_, State<P>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a letter from rank `from` in.
    pub fn put(&self, group: u32, from: usize, operation: Operation, payload: P) {
        let mut state = self.lock();
        let queue = state.letters.entry((group, from)).or_default();
        queue.push_back((operation, payload));
        self.changed.notify_all();
    }

    /// Waits for the next letter of rank `from` in `group`. What has arrived is handed out even
    /// when a rank has failed since.
    ///
    /// # Errors
    /// With the reason, once none can come any more.
    pub fn take(&self, group: u32, from: usize) -> Result<(Operation, P), String> {
        let mut state = self.lock();
        loop {
            if let Some(queue) = state.letters.get_mut(&(group, from))
                && let Some(letter) = queue.pop_front()
            {
                return Ok(letter);
            }
            if let Some(reason) = &state.failed {
                return Err(reason.clone());
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says that the run cannot go on. The first reason stays.
    pub fn fail(&self, reason: String) {
        self.lock().failed.get_or_insert(reason);
        self.changed.notify_all();
    }
}
