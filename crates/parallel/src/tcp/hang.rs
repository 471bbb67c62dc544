//! A rank that lives and does not move.
//!
//! Heartbeats have threads of their own: they go on when the main thread waits for ever for a lock or for
//! a GPU. So every rank has one more thread, which looks at its own main thread. A clock runs while the
//! main thread neither moves, nor waits for another rank, nor has declared a long task
//! ([`Activity`]); and not while another rank is at a long task, for which this one's GPU may have
//! to wait. At the limit the rank says to all that it hangs, and all end. One whose GPU only waits for
//! others' lets them speak first ([`FIRST`]): it is not the one to blame.
//!
//! The limit is the deadline of silence, or [`SLOWER`] times the slowest step so far where that is more:
//! between two moves the main thread does no more than a step. The clock counts looks and not hours, so
//! that a process that was stopped and goes on has not aged.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Letter, Received};
use crate::activity::{Activity, Seen};

/// How many times slower than all before it a step may be.
const SLOWER: u32 = 4;
/// How much longer a rank is silent whose device waits for others.
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
    /// It is at a long task, and does not itself wait for others in it.
    busy: bool,
    what: String,
}

impl Said {
    pub fn of(seen: &Seen) -> Self {
        Self {
            busy: seen.long && !seen.waits,
            what: seen.what.chars().take(WORDS).collect(),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![u8::from(self.busy)];
        bytes.extend(self.what.as_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (busy, what) = bytes.split_first()?;
        Some(Self {
            busy: *busy == 1,
            what: String::from_utf8_lossy(what).into_owned(),
        })
    }
}

/// Notes what rank `rank` said; nothing when it has ended.
pub(super) fn hear(heard: &Heard, rank: usize, said: Option<Said>) {
    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    heard[rank] = said;
}

/// Rank `rank` has sent something else since: what it was busy with is over, or it will say so again.
pub(super) fn went_on(heard: &Heard, rank: usize) {
    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(said) = &mut heard[rank] {
        said.busy = false;
    }
}

/// What rank `rank` said last, to be put behind a sentence that names it.
pub(super) fn last_words(heard: &Heard, rank: usize) -> String {
    let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    let said = heard[rank].as_ref().filter(|said| !said.what.is_empty());
    said.map_or(String::new(), |said| format!(" (last at: {})", said.what))
}

/// How long a rank has not moved.
#[derive(Debug)]
struct Clock {
    deadline: Duration,
    moves: u64,
    still: Duration,
}

impl Clock {
    fn new(deadline: Duration) -> Self {
        Self {
            deadline,
            moves: 0,
            still: Duration::ZERO,
        }
    }

    /// Looks again after `passed`; how far beyond the limit the clock is.
    fn look(&mut self, seen: &Seen, others_busy: bool, passed: Duration) -> Option<Duration> {
        let moved = seen.moves != self.moves;
        self.moves = seen.moves;
        if moved || seen.waits || seen.long || others_busy {
            self.still = Duration::ZERO;
            return None;
        }
        // More than two looks apart, this process was stopped, or starved.
        self.still += passed.min(2 * self.between());
        self.still
            .checked_sub(self.deadline.max(SLOWER * seen.step))
    }

    fn between(&self) -> Duration {
        self.deadline / LOOKS
    }
}

/// What the thread needs of the connections, without keeping them open.
pub(super) struct Watched {
    pub rank: usize,
    pub activity: Activity,
    pub mailbox: Arc<Received>,
    pub heard: Arc<Heard>,
    pub queues: Vec<Sender<Letter>>,
    /// Whether the device waits for those of other ranks.
    pub device_waits: fn() -> bool,
}

impl Watched {
    /// Looks until the run is over; says that this rank hangs if so.
    pub fn watch(self, deadline: Duration) {
        let mut clock = Clock::new(deadline);
        let mut last = Instant::now();
        while !self.mailbox.over_within(clock.between()) {
            let passed = last.elapsed();
            last = Instant::now();
            let seen = self.activity.look();
            if let Some(beyond) = clock.look(&seen, self.others_busy(), passed) {
                let waits = (self.device_waits)();
                if waits && beyond < FIRST {
                    continue;
                }
                let reason = self.sentence(&seen, clock.still, waits);
                for queue in &self.queues {
                    // A writer that is gone has told of its connection's end.
                    let _gone = queue.send(Letter::Failed(reason.clone()));
                }
                return self.mailbox.fail(reason);
            }
        }
    }

    fn others_busy(&self) -> bool {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.iter().flatten().any(|said| said.busy)
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
            "rank {rank} hangs: {who} for {seconds} s at: {what}; others: {}",
            others.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// The look at which the limit is reached, a second apart, of at most 1000.
    fn ends(activity: &Activity, busy: bool, mut each: impl FnMut(u32)) -> Option<u32> {
        let mut clock = Clock::new(DEADLINE);
        (1..=1000).find(|&look| {
            each(look);
            let beyond = clock.look(&activity.look(), busy, Duration::from_secs(1));
            beyond.is_some()
        })
    }

    #[test]
    fn who_does_not_move_is_seen() {
        let activity = Activity::default();
        activity.at("step 7");
        // The first look sees the move.
        assert_eq!(ends(&activity, false, |_| ()), Some(21));
        assert_eq!(
            ends(&activity, false, |look| {
                if look <= 30 && look % 15 == 0 {
                    activity.at("step 8");
                }
            }),
            Some(50)
        );
    }

    #[test]
    fn who_waits_or_is_busy_is_not() {
        let activity = Activity::default();
        activity.at("step 7");
        assert_eq!(ends(&activity, true, |_| ()), None);
        let task = activity.long("saving");
        assert_eq!(ends(&activity, false, |_| ()), None);
        let wait = activity.wait();
        drop(task);
        assert_eq!(ends(&activity, false, |_| ()), None);
        drop(wait);
        assert_eq!(ends(&activity, false, |_| ()), Some(21));
    }

    #[test]
    fn a_slow_step_has_its_time() {
        let activity = Activity::default();
        activity.step_took(f64::NAN);
        activity.step_took(10.0);
        activity.step_took(2.0);
        assert_eq!(ends(&activity, false, |_| ()), Some(40));
    }

    /// Stopped for an hour, the process has aged by two looks.
    #[test]
    fn who_was_stopped_has_not_aged() {
        let activity = Activity::default();
        let mut clock = Clock::new(DEADLINE);
        let hour = Duration::from_secs(3600);
        assert_eq!(clock.look(&activity.look(), false, hour), None);
        assert_eq!(clock.still, Duration::from_secs(2));
    }

    #[test]
    fn only_who_does_not_wait_is_busy() {
        let activity = Activity::default();
        activity.at("step 3");
        let said = || Said::of(&activity.look());
        assert!(!said().busy);
        let _task = activity.long("evaluating");
        assert_eq!(
            said(),
            Said {
                busy: true,
                what: "evaluating".into()
            }
        );
        let waits = activity.wait();
        assert!(!said().busy);
        drop(waits);
        assert_eq!(Said::decode(&said().encode()), Some(said()));
        assert_eq!(Said::decode(&[]), None);
    }
}
