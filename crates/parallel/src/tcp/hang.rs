//! A rank that lives and does not move.
//!
//! Heartbeats have threads of their own: they go on when the main thread waits for ever for a lock or for
//! a GPU. So every rank has one more thread, which looks at its own main thread and device. A clock runs
//! from one move to the next, and not while the main thread waits for another rank ([`Activity`]). At the
//! limit the rank says to all that it hangs, and all end.
//!
//! **A move** is a place that the main thread comes to, several in a block. A GPU's host is ahead of it,
//! and waits for it as long as a step at a time; so there is a mark for every place in what the GPU has to
//! do, and while some are before it, passing one is the only move. Where the device waits for those of other
//! ranks, a move of another rank is one, too: who is faster than the others does not hang.
//!
//! **The limit** is the deadline of silence, or [`SLOWER`] times the longest time between two moves so far,
//! where that is more. In a long task it is [`LONGER`] times the deadline while the process is at work
//! (`life.rs`) and its device has nothing before it, else the deadline as well; and it is the longer one for
//! a rank whose device waits while another is at a long task. Such a rank speaks later ([`FIRST`]): it is not
//! the one to blame.
//!
//! The device is asked by one more thread, since its driver may not answer either (`device.rs`).
//!
//! The clock counts looks and not hours, so that a process that was stopped and goes on has not aged.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::device::Answers;
use super::life::{Done, Life};
use super::{Letter, Received};
use crate::activity::{Activity, Patience, Seen};

/// How many times longer than ever before a rank may stand still. The backward pass of a block that is
/// computed anew takes three times the forward pass, which may be all that was seen before; and what is
/// seen is up to two looks short. With the default deadline this tells where more than 5 s pass between two
/// moves, as they do where a slow CPU computes a large block.
const SLOWER: u32 = 4;
/// Deadlines for which a rank may stand still in a long task, at work: 200 s by default. The longest single things
/// between two moves are a file of 5 GiB that is flushed to disk or hashed, 100 s at 50 MB/s, and a first
/// step's kernels, 11 s to compile.
const LONGER: u32 = 10;
/// How much longer, at least, a rank is silent whose device waits for others. Its clock did not begin
/// before theirs, since it hears of their moves later than they move; so two looks and a letter's way are
/// enough.
const FIRST: Duration = Duration::from_secs(3);
/// Looks per deadline.
const LOOKS: u32 = 20;
/// Characters of what a rank says in a heartbeat.
const WORDS: usize = 200;

/// What the others said of themselves in their last heartbeats, by rank.
pub(super) type Heard = Mutex<Vec<Option<Said>>>;

/// What a rank says in a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said {
    /// How long others may have to wait for it; the usual time where it waits for others itself.
    patience: Patience,
    /// Changes when it moves.
    moves: u64,
    what: String,
}

impl Said {
    pub fn of(seen: &Seen) -> Self {
        Self {
            patience: match seen.waits {
                true => Patience::Usual,
                false => seen.patience,
            },
            moves: seen.moves,
            what: seen.what.chars().take(WORDS).collect(),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.patience as u8];
        bytes.extend(self.moves.to_le_bytes());
        bytes.extend(self.what.as_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (patience, bytes) = bytes.split_first()?;
        let (moves, what) = bytes.split_first_chunk()?;
        use Patience::{Endless, First, Long, Usual};
        let all = [Usual, First, Long, Endless];
        Some(Self {
            patience: *all.iter().find(|one| **one as u8 == *patience)?,
            moves: u64::from_le_bytes(*moves),
            what: String::from_utf8_lossy(what).into_owned(),
        })
    }
}

/// Notes what rank `rank` said; nothing when it has ended.
pub(super) fn hear(heard: &Heard, rank: usize, said: Option<Said>) {
    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    heard[rank] = said;
}

/// Rank `rank` has sent something else since, which is a move: what it was busy with is over, or it will
/// say so again.
pub(super) fn went_on(heard: &Heard, rank: usize) {
    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(said) = &mut heard[rank] {
        said.patience = Patience::Usual;
        said.moves = said.moves.wrapping_add(1);
    }
}

/// What rank `rank` said last, to be put behind a sentence that names it.
pub(super) fn last_words(heard: &Heard, rank: usize) -> String {
    let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    let said = heard[rank].as_ref().filter(|said| !said.what.is_empty());
    said.map_or(String::new(), |said| format!(" (last at: {})", said.what))
}

/// What a rank sees beside itself.
#[derive(Clone, Copy, Debug, Default)]
struct Around {
    /// Its device waits for those of others.
    device_waits: bool,
    /// The most that another asks for.
    patience: Patience,
    /// Changes when another moves.
    moves: u64,
}

/// How long a rank has not moved.
#[derive(Debug)]
struct Clock {
    deadline: Duration,
    moves: u64,
    around: Around,
    still: Duration,
    /// Whether the time since the last move tells how long this rank takes by itself.
    tells: bool,
    /// The longest such time.
    slowest: Duration,
}

impl Clock {
    fn new(deadline: Duration) -> Self {
        Self {
            deadline,
            moves: 0,
            around: Around::default(),
            still: Duration::ZERO,
            tells: true,
            slowest: Duration::ZERO,
        }
    }

    /// Looks again after `passed`; for how long the process has been `idle`. How far beyond the limit the clock
    /// is.
    fn look(
        &mut self,
        seen: &Seen,
        idle: Duration,
        around: &Around,
        passed: Duration,
    ) -> Option<Duration> {
        // A wait of the device that is over was its last move.
        let mut moved =
            seen.moves != self.moves || (self.around.device_waits && !around.device_waits);
        let mut patience = seen.patience;
        if around.device_waits {
            moved |= around.moves != self.around.moves;
            patience = patience.max(around.patience);
        }
        (self.moves, self.around) = (seen.moves, *around);
        if moved || seen.waits || patience == Patience::Endless {
            if self.tells {
                self.slowest = self.slowest.max(self.still);
            }
            self.still = Duration::ZERO;
            self.tells = true;
            return None;
        }
        self.tells &= patience <= Patience::First && !around.device_waits;
        // More than two looks apart, this process was stopped, or starved.
        self.still += passed.min(2 * self.between());
        let least = match patience {
            Patience::Usual => self.deadline,
            _ => LONGER * self.deadline,
        };
        let idle = match (around.device_waits, seen.device) {
            (true, _) => Duration::ZERO,
            // Who waits for a device computes, too, or seems to.
            (false, true) => self.still,
            (false, false) => idle.min(self.still),
        };
        let usual = SLOWER * self.slowest;
        let beyond = self.still.checked_sub(least.max(usual));
        let idle = idle.checked_sub(self.deadline.max(usual));
        beyond.max(idle)
    }

    fn between(&self) -> Duration {
        between(self.deadline)
    }
}

/// How far apart looks are.
pub(super) fn between(deadline: Duration) -> Duration {
    deadline / LOOKS
}

/// What the thread needs of the connections, without keeping them open.
pub(super) struct Watched {
    pub rank: usize,
    pub activity: Activity,
    pub mailbox: Arc<Received>,
    pub heard: Arc<Heard>,
    pub queues: Vec<Sender<Letter>>,
    pub device: Answers,
}

impl Watched {
    /// Looks until the run is over; says that this rank hangs if so.
    pub fn watch(self, deadline: Duration) {
        let (mut clock, mut life) = (Clock::new(deadline), Life::default());
        let mut last = Instant::now();
        while !self.mailbox.over_within(clock.between()) {
            let passed = last.elapsed();
            last = Instant::now();
            let device = self.device.last();
            let (marks, left) = device.marks;
            self.activity.marks(marks, left);
            let (seen, around) = (self.activity.look(), self.around(device.waits));
            let idle = life.idle(Done::seen, passed);
            if let Some(beyond) = clock.look(&seen, idle, &around, passed) {
                if around.device_waits && beyond < FIRST.max(2 * clock.between()) {
                    continue;
                }
                let reason = self.sentence(&seen, clock.still, around.device_waits);
                for queue in &self.queues {
                    // A writer that is gone has told of its connection's end.
                    let _gone = queue.send(Letter::Failed(reason.clone()));
                }
                return self.mailbox.fail(reason);
            }
        }
    }

    fn around(&self, device_waits: bool) -> Around {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let all = heard.iter().flatten();
        let patience = all.clone().map(|said| said.patience).max();
        Around {
            device_waits,
            patience: patience.unwrap_or_default(),
            moves: all.map(|said| said.moves).fold(0, u64::wrapping_add),
        }
    }

    fn sentence(&self, seen: &Seen, still: Duration, waits: bool) -> String {
        let who = match waits {
            false => "its main thread, or its device, has not moved",
            true => "its device has waited for other ranks, of which none says that it hangs,",
        };
        let (rank, seconds, what) = (self.rank, still.as_secs(), &seen.what);
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let others = heard.iter().enumerate().filter_map(|(rank, said)| {
            let what = &said.as_ref()?.what;
            Some(format!("rank {rank} at: {what}"))
        });
        let others: Vec<String> = others.take(8).collect();
        format!(
            "rank {rank} hangs: {who} for {seconds} s at: {what}; others: {} (if it is only slow, raise \
             parallel.timeout_s)",
            others.join(", ")
        )
    }
}

#[cfg(test)]
mod tests;
