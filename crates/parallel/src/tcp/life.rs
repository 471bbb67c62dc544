//! Signs that a process is at work although its main thread comes to no new place: in a long task.
//!
//! Whatever takes long there computes (kernels that are compiled, values that are drawn) or moves bytes to or
//! from a disk (a checkpoint). A process that does neither waits for something that may never come.

use std::time::Duration;

/// Looks that are taken together: the clock of a process moves in hundredths of a second.
const TOGETHER: u32 = 5;
/// Of the time what a process at work computes at least, all threads together. One that waits looks at itself
/// and sends heartbeats, which is far less.
const LEAST: f64 = 0.05;

/// What a process has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Done {
    /// Time in which its threads computed.
    pub computed: Duration,
    /// Bytes that it moved from and to disks. Those of its connections are none: heartbeats go on for ever.
    pub moved: u64,
    /// A thread of it waits for a disk now: such a wait shows in nothing else.
    pub disk: bool,
}

impl Done {
    /// Whether a process that had done `before` was at work in the time `passed` since.
    pub fn works(&self, before: &Self, passed: Duration) -> bool {
        let computed = self.computed.saturating_sub(before.computed);
        self.disk || self.moved != before.moved || computed > passed.mul_f64(LEAST)
    }

    /// Of this process; nothing where that cannot be seen.
    #[cfg(target_os = "linux")]
    pub fn seen() -> Option<Self> {
        use procfs::process::{ProcState, Process};

        let own = Process::myself().ok()?;
        let (stat, io) = (own.stat().ok()?, own.io().ok()?);
        let ticks = (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64;
        // A thread may end while it is looked at.
        let mut states = own.tasks().ok()?.flatten().flat_map(|task| task.stat());
        Some(Self {
            computed: Duration::from_secs_f64(ticks),
            moved: io.read_bytes + io.write_bytes,
            disk: states.any(|stat| stat.state().is_ok_and(|state| state == ProcState::Waiting)),
        })
    }

    /// Of this process; nothing where that cannot be seen.
    #[cfg(not(target_os = "linux"))]
    pub fn seen() -> Option<Self> {
        None
    }
}

/// How long this process has not been at work.
#[derive(Debug, Default)]
pub(super) struct Life {
    before: Done,
    looks: u32,
    passed: Duration,
    idle: Duration,
}

impl Life {
    /// Looks again, `passed` after the look before, at what is `done` by now if it is time to. How long the
    /// process has not been at work, from the end of the looks in which it was; where that cannot be seen, it
    /// is taken to be.
    pub fn idle(&mut self, done: impl FnOnce() -> Option<Done>, passed: Duration) -> Duration {
        self.looks += 1;
        self.passed += passed;
        if self.looks == TOGETHER {
            let seen = done();
            self.idle = match &seen {
                Some(done) if !done.works(&self.before, self.passed) => self.idle + self.passed,
                _ => Duration::ZERO,
            };
            self.before = seen.unwrap_or_default();
            (self.looks, self.passed) = (0, Duration::ZERO);
        }
        self.idle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// After each of four times [`TOGETHER`] looks a second apart, the seconds for which the process did not
    /// work that had done so much by each second.
    fn idle(done: impl Fn(u32) -> Done) -> [u64; 4] {
        let mut life = Life::default();
        let looks = (1..=4 * TOGETHER).map(|second| life.idle(|| Some(done(second)), SECOND));
        let looks: Vec<Duration> = looks.collect();
        std::array::from_fn(|i| looks[(i + 1) * TOGETHER as usize - 1].as_secs())
    }

    #[test]
    fn who_computes_moves_bytes_or_waits_for_a_disk_works() {
        let computed = |part: u32| {
            move |second: u32| Done {
                computed: SECOND * second * part / 100,
                ..Done::default()
            }
        };
        assert_eq!(idle(computed(100)), [0; 4]);
        assert_eq!(idle(computed(6)), [0; 4]);
        assert_eq!(idle(computed(4)), [5, 10, 15, 20]);
        let moves = |second: u32| Done {
            moved: u64::from(second.min(TOGETHER + 1)),
            ..Done::default()
        };
        assert_eq!(idle(moves), [0, 0, 5, 10]);
        let disk = |second: u32| Done {
            disk: second > 2 * TOGETHER,
            ..Done::default()
        };
        assert_eq!(idle(disk), [5, 10, 0, 0]);
        let mut life = Life::default();
        let unseen = (0..20).map(|_| life.idle(|| None, SECOND)).max();
        assert_eq!(unseen, Some(Duration::ZERO));
    }

    /// The process of this test, in fact, while it computes.
    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_seen() {
        use std::time::Instant;

        let long = Duration::from_millis(200);
        let begun = Done::seen().expect("/proc");
        let since = Instant::now();
        let mut sum = 0_u64;
        while since.elapsed() < long {
            sum = std::hint::black_box(sum.wrapping_mul(3) + 1);
        }
        let done = Done::seen().expect("/proc");
        assert!(
            done.computed - begun.computed >= long / 4,
            "{begun:?} {done:?}"
        );
    }
}
