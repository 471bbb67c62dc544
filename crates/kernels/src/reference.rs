//! A switch that sends every operation through its plain reference form, on CUDA too.
//!
//! It is for comparing: a model's whole course with the CUDA forms and without them. The
//! environment variable `TTT_REFERENCE=1` sets it for a whole process.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

static ON: LazyLock<AtomicBool> = LazyLock::new(|| {
    let set = std::env::var_os("TTT_REFERENCE").is_some_and(|v| !v.is_empty() && v != "0");
    AtomicBool::new(set)
});

/// Whether operations take their reference forms.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// From now on, in all threads.
pub fn set(on: bool) {
    ON.store(on, Ordering::Relaxed);
}
