//! What a rank's device shows of itself.
//!
//! A driver that is in one thread's call for ever may keep others waiting that only ask. So a thread of its own
//! asks, and who looks at the rank takes its last answer: a device that no longer answers is one that does not
//! go on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Received;

/// What is seen of a rank's device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSigns {
    /// Whether it waits for those of other ranks.
    pub waits: fn() -> bool,
    /// Marks the place that the main thread has come to in what the device has to do.
    pub mark: fn(),
    /// How many marks it has passed, and how many are before it.
    pub marks: fn() -> (u64, usize),
}

impl DeviceSigns {
    /// Those of a device that computes while the main thread waits.
    pub const NONE: Self = Self {
        waits: || false,
        mark: || (),
        marks: || (0, 0),
    };
}

/// What a device has shown.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answer {
    /// See [`DeviceSigns::waits`].
    pub waits: bool,
    /// See [`DeviceSigns::marks`].
    pub marks: (u64, usize),
}

/// The last answer; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Answers(Arc<Mutex<Answer>>);

impl Answers {
    /// The last one; nothing before the first.
    pub fn last(&self) -> Answer {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks `device` now and again, `between` apart, until the run is over.
    pub fn ask(&self, device: DeviceSigns, mailbox: &Received, between: Duration) {
        loop {
            let (waits, marks) = ((device.waits)(), (device.marks)());
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Answer { waits, marks };
            if mailbox.over_within(between) {
                return;
            }
        }
    }
}
