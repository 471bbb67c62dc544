//! Whether the same computation must give the same bits, at the cost of some speed.
//!
//! One thing here depends on it: cuDNN sums the gradient of attention's queries in whatever order
//! its blocks finish, and a kernel of ours takes its place. All other operations have a fixed order
//! always: sums over rows go through partial sums in a fixed order, no kernel adds atomically, a
//! product's algorithm is chosen by cuBLASLt's heuristic from its shape alone. On the CPU everything
//! is deterministic anyway.

use std::sync::atomic::{AtomicBool, Ordering};

static ON: AtomicBool = AtomicBool::new(false);

/// Whether it must.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// From now on, in all threads.
pub fn set(on: bool) {
    ON.store(on, Ordering::Relaxed);
}
