//! Keeps a panic inside a library that reads untrusted content from ending the run.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// The value of `read`, or `None` if it panicked. What `read` worked on must not be used after a panic.
pub(crate) fn guarded<T>(read: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(read)).ok()
}
