//! How much memory tensors take on a GPU: now, and at their fullest.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use burn::tensor::Device;

/// What is taken of a GPU's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Handed out to live tensors by Burn's allocator.
    pub tensors: u64,
    /// What the allocator holds, free parts of its pools included.
    pub pools: u64,
    /// Working memory of NVIDIA's libraries.
    pub scratch: u64,
}

impl Usage {
    /// What PyTorch calls allocated memory: its allocator also serves its libraries.
    pub fn allocated(&self) -> u64 {
        self.tensors + self.scratch
    }
}

/// What is taken on `device` now; `None` where nobody counts.
pub fn usage(device: &Device) -> Option<Usage> {
    #[cfg(feature = "cuda")]
    return crate::cuda::stream::usage(device);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
}

/// Runs `make` on `input`; what it allocates on `device` gets memory of just its size. For what lives as long as
/// a run: the pools for all else have pages as large as the largest tensor, and would keep rests between such.
/// Freed, this memory serves only what is made here as well, and has the same size.
pub fn lasting<I: Send, T: Send>(device: &Device, input: I, make: impl Fn(I) -> T + Send) -> T {
    device.memory_persistent_allocations(input, make)
}

/// Whether a [`Watch`] is kept.
static WATCHED: AtomicBool = AtomicBool::new(false);
/// The most that was seen meanwhile.
static PEAK: AtomicU64 = AtomicU64::new(0);

/// Whether operations should report what is taken.
pub fn is_watched() -> bool {
    WATCHED.load(Ordering::Relaxed)
}

/// Notes that `bytes` are taken.
pub fn seen(bytes: u64) {
    PEAK.fetch_max(bytes, Ordering::Relaxed);
}

/// While it is there, the most bytes are noted that are [allocated](Usage::allocated) at any CUDA operation,
/// when its inputs and outputs all live: the counterpart of PyTorch's `max_memory_allocated`. One at a time.
///
/// Asking takes time at every operation, so nothing should be timed meanwhile.
#[derive(Debug)]
pub struct Watch(());

impl Watch {
    /// `None` where nobody counts.
    pub fn begin(device: &Device) -> Option<Self> {
        let before = usage(device)?;
        PEAK.store(before.allocated(), Ordering::Relaxed);
        WATCHED.store(true, Ordering::Relaxed);
        Some(Self(()))
    }

    /// The most so far, in bytes.
    pub fn peak(&self) -> u64 {
        PEAK.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        WATCHED.store(false, Ordering::Relaxed);
    }
}

/// Runs `work` and returns with its result what a [`Watch`] saw meanwhile.
pub fn peak_of<T>(device: &Device, work: impl FnOnce() -> T) -> (T, Option<u64>) {
    let watch = Watch::begin(device);
    let done = work();
    (done, watch.map(|watch| watch.peak()))
}

/// Bytes of GPU `ordinal`'s memory that the driver says are taken: by this process, its libraries and
/// its context, and by every other process.
#[cfg(feature = "cuda")]
pub fn driver_in_use(ordinal: i32) -> Option<u64> {
    use cudarc::driver::{result as driver, sys};
    // SAFETY: only asks whether the library can be opened.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    driver::init().ok()?;
    let device = driver::device::get(ordinal).ok()?;
    // SAFETY: `device` is valid; the context is the one that Burn uses, which stays.
    let context = unsafe { driver::primary_ctx::retain(device) }.ok()?;
    // SAFETY: `context` is live.
    unsafe { driver::ctx::set_current(context) }.ok()?;
    let (free, total) = driver::mem_get_info().ok()?;
    Some((total - free) as u64)
}

/// Not known without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn driver_in_use(_ordinal: i32) -> Option<u64> {
    None
}
