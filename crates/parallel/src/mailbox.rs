//! What has arrived from other ranks and not yet been taken.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
    /// All of them; an operation's place here is its number on the wire.
    pub const ALL: [Self; 8] = [
        Self::AllReduce,
        Self::AllGather,
        Self::ReduceScatter,
        Self::AllToAll,
        Self::Broadcast,
        Self::Exchange,
        Self::Barrier,
        Self::Split,
    ];

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

/// What a letter is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The group's number.
    pub group: u32,
    /// The exchange's number in the group, equal on all of its ranks: what one rank asks for late may
    /// be waited for late. All [`Operation::Exchange`] have one: not every rank has a part in them.
    pub ticket: u64,
    /// What the exchange is.
    pub operation: Operation,
}

/// Letters in the order of their arrival, by group, ticket and sender.
#[derive(Debug)]
pub struct Mailbox<P> {
    state: Mutex<State<P>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<P> {
    letters: HashMap<(u32, u64, usize), VecDeque<(Operation, P)>>,
    /// The first failure of any rank: the run cannot go on.
    failed: Option<String>,
    /// Ranks that ended in order: only who waits for one of them fails.
    ended: BTreeMap<usize, String>,
    /// This rank has ended.
    closed: bool,
}

impl<P> Default for Mailbox<P> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                letters: HashMap::new(),
                failed: None,
                ended: BTreeMap::new(),
                closed: false,
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
    pub fn put(&self, from: usize, tag: Tag, payload: P) {
        let mut state = self.lock();
        let key = (tag.group, tag.ticket, from);
        let queue = state.letters.entry(key).or_default();
        queue.push_back((tag.operation, payload));
        self.changed.notify_all();
    }

    /// Waits for the next letter of rank `from` for this exchange, and tells what it was for there.
    /// What has arrived is handed out even when a rank has failed since.
    ///
    /// # Errors
    /// With the reason, once none can come any more.
    pub fn take(&self, from: usize, tag: Tag) -> Result<(Operation, P), String> {
        let key = (tag.group, tag.ticket, from);
        let mut state = self.lock();
        loop {
            if let Some(queue) = state.letters.get_mut(&key)
                && let Some(letter) = queue.pop_front()
            {
                if queue.is_empty() {
                    state.letters.remove(&key);
                }
                return Ok(letter);
            }
            if let Some(reason) = state.failed.as_ref().or(state.ended.get(&from)) {
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

    /// Says that rank `rank` sends nothing any more.
    pub fn end(&self, rank: usize, reason: String) {
        self.lock().ended.insert(rank, reason);
        self.changed.notify_all();
    }

    /// Says that nothing more is sent or received here.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits until the run cannot go on, and tells why; `None` once this rank has closed.
    pub fn wait_for_failure(&self) -> Option<String> {
        let mut state = self.lock();
        loop {
            if state.closed || state.failed.is_some() {
                return state.failed.clone().filter(|_| !state.closed);
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for `time` at most; whether this rank has closed or the run cannot go on.
    pub fn over_within(&self, time: Duration) -> bool {
        let over = |state: &mut State<P>| state.closed || state.failed.is_some();
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| !over(state));
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        over(&mut state)
    }

    /// Why the run cannot go on, if so.
    pub fn failure(&self) -> Option<String> {
        self.lock().failed.clone()
    }
}
