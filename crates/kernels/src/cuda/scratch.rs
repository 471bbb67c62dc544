//! Memory that NVIDIA's libraries work in, taken from the driver beside Burn's allocator.
//!
//! It is counted, so that a figure of peak memory can include it.

use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{result as driver, sys::CUstream};

static HELD: AtomicU64 = AtomicU64::new(0);

/// Bytes held by all threads.
pub fn held() -> u64 {
    HELD.load(Ordering::Relaxed)
}

/// The address of `bytes` of memory. Call it where a context is current.
///
/// # Errors
/// If the GPU's memory is exhausted.
pub(super) fn allocate(bytes: usize, what: &str) -> Result<u64, String> {
    // SAFETY: a context is current on the device thread; the caller keeps or frees the memory.
    let at = unsafe { driver::malloc_sync(bytes) }
        .map_err(|e| format!("{what} workspace of {bytes} bytes: {e}"))?;
    HELD.fetch_add(bytes as u64, Ordering::Relaxed);
    Ok(at)
}

/// Waits for what is queued on `stream`, then gives `bytes` at `at` back.
///
/// # Errors
/// If work on the stream failed.
pub(super) fn release(at: u64, bytes: usize, stream: CUstream) -> Result<(), String> {
    // SAFETY: the stream is live; the memory came from `allocate`, is freed once, and nothing queued
    // uses it any more.
    unsafe {
        driver::stream::synchronize(stream).map_err(|e| format!("workspace: {e}"))?;
        driver::free_sync(at).map_err(|e| format!("workspace: {e}"))?;
    }
    HELD.fetch_sub(bytes as u64, Ordering::Relaxed);
    Ok(())
}
