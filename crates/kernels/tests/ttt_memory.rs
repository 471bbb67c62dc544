//! Memory of the TTT layer does not grow with the number of chunks.
//!
//! A binary of its own, because it counts every allocation of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::tensor::{DType, Device, Tensor};
use ttt_kernels::Packing;
use ttt_kernels::testing::normal;
use ttt_kernels::ttt::{ScanSpec, fast_weight_scan, oracle};

/// The system's allocator, counting bytes in use and their peak.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    let used = USED.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(used, Relaxed);
}

// SAFETY: every call is passed to the system's allocator unchanged; counting touches atomics only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`, and the pointer came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LENGTH: usize = 1024;
const WIDTH: usize = 256;
const INNER: usize = 512;
/// Bytes of one D × F matrix in f32.
const STATE: usize = WIDTH * INNER * 4;

/// Peak bytes that a forward and a backward pass take beyond their inputs.
fn peak(
    chunks: usize,
    form: impl Fn(Tensor<3>, Tensor<3>, Tensor<2>, ScanSpec) -> Tensor<3>,
) -> usize {
    let device = Device::flex();
    let leaf = |t: Tensor<3>| t.autodiff().require_grad();
    let z = leaf(normal([1, LENGTH, INNER], 0.1, 1, &device, DType::F32));
    let v = leaf(normal([1, LENGTH, WIDTH], 0.1, 2, &device, DType::F32));
    let w0 = normal([WIDTH, INNER], 0.1, 3, &device, DType::F32);
    let w0 = w0.autodiff().require_grad();
    let spec = ScanSpec {
        lr: 0.3,
        chunk: LENGTH / chunks,
        clip: None,
        packing: Packing::whole_rows(1, LENGTH),
        context: None,
    };
    let before = USED.load(Relaxed);
    PEAK.store(before, Relaxed);
    let gradients = form(z, v, w0, spec).sum().backward();
    drop(gradients);
    PEAK.load(Relaxed) - before
}

#[test]
fn memory_does_not_grow_with_the_number_of_chunks() {
    let scan = |chunks| {
        peak(chunks, |z, v, w0, spec| {
            fast_weight_scan(z, v, w0, spec).output
        })
    };
    let stored = |chunks| {
        peak(chunks, |z, v, w0, spec| {
            oracle::stored_states(z, v, w0, &spec)
        })
    };
    // What the process sets up once: thread pools, and the packing buffers of each shape of product.
    for chunks in [4, 16, 64, 256] {
        scan(chunks);
    }
    let (few, many) = (scan(4), scan(64));
    let (stored_few, stored_many) = (stored(4), stored(64));
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    println!(
        "peak MiB of the scan at 4, 16, 64 and 256 chunks: {:.2}, {:.2}, {:.2}, {:.2}",
        mib(few),
        mib(scan(16)),
        mib(many),
        mib(scan(256)),
    );
    println!(
        "of stored states at 4 and 64: {:.2}, {:.2}; one state is {:.2}",
        mib(stored_few),
        mib(stored_many),
        mib(STATE),
    );
    assert!(
        many < few + 3 * STATE,
        "the scan grew from {few} to {many} bytes"
    );
    // Negative control: a state per chunk is seen.
    assert!(
        stored_many > stored_few + 60 * STATE,
        "{stored_few}, {stored_many}"
    );
}
