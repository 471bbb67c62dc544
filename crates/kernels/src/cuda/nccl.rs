//! NCCL communicators beside Burn's stream.
//!
//! A communicator has a stream of its own, so that what it carries runs beside the arithmetic. What is
//! sent was computed on Burn's stream: the own stream waits for an event of it first. What is received
//! is used on Burn's stream: that waits for an event of the own one, but only when the result is asked
//! for ([`Started::wait`]). Everything is issued on the device thread; the host never waits.

use std::ffi::CStr;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{DType, Device, Tensor};
use cudarc::driver::result::{DriverError, stream};
use cudarc::driver::sys::CUstream;
use cudarc::nccl::result::{self as nccl, NcclError};
use cudarc::nccl::sys;

use super::event::{Event, Flights};
use super::profile::{timed, timed_beside};
use super::share::{self, EXCHANGES};
use super::stream::{Buffer, on_stream};

/// What all ranks of a communicator know and no others: bytes of rank 0's making.
pub type UniqueId = [u8; 128];

/// Ranks whose tensors travel between GPUs.
#[derive(Debug)]
pub struct Communicator {
    comm: sys::ncclComm_t,
    stream: CUstream,
    /// Memory of the device, by which its thread is found.
    anchor: Buffer,
    flights: Arc<Flights>,
    /// An operation failed, here or elsewhere: nothing may be waited for any more.
    failed: AtomicBool,
}

/// `ncclConfig_t` as NCCL 2.17 knew it: later versions add their own at the end, and take what this one
/// lacks to be unset.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: i32,
    cluster: i32,
    least_blocks: i32,
    most_blocks: i32,
    net: *const std::ffi::c_char,
    split_share: i32,
}

impl Config {
    /// At most so many thread blocks, each of which takes a multiprocessor.
    fn blocks(most: u32) -> Self {
        const UNSET: i32 = i32::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: UNSET,
            cluster: UNSET,
            least_blocks: UNSET,
            most_blocks: most as i32,
            net: std::ptr::null(),
            split_share: UNSET,
        }
    }
}

// SAFETY: the handles are used on the device thread alone, inside of `on_stream`.
unsafe impl Send for Communicator {}
// SAFETY: as above; the device thread does one thing at a time.
unsafe impl Sync for Communicator {}

/// Where an operation reads and writes, on its communicator's stream.
#[derive(Clone, Copy, Debug)]
pub struct Issue<'a> {
    comm: sys::ncclComm_t,
    stream: CUstream,
    /// Addresses of what is read.
    pub reads: &'a [u64],
    /// Addresses of what is written.
    pub writes: &'a [u64],
}

/// Elements of one precision.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The address of the first.
    pub at: u64,
    /// How many.
    pub len: usize,
    /// Their precision, f32 or bf16.
    pub dtype: DType,
}

impl Span {
    fn kind(&self) -> Result<sys::ncclDataType_t, String> {
        match self.dtype {
            DType::F32 => Ok(sys::ncclDataType_t::ncclFloat32),
            DType::BF16 => Ok(sys::ncclDataType_t::ncclBfloat16),
            other => Err(format!("{other:?} does not travel: f32 and bf16 do")),
        }
    }

    /// Part `i` of `len` elements.
    pub fn part(&self, i: usize, len: usize) -> Self {
        Self {
            at: self.at + (i * len * self.dtype.size()) as u64,
            len,
            ..*self
        }
    }
}

impl Issue<'_> {
    fn stream(&self) -> sys::cudaStream_t {
        self.stream.cast()
    }

    /// The sum of all ranks' `from`, into `to` of the same length.
    ///
    /// # Errors
    /// With NCCL's words.
    pub fn all_reduce(&self, from: Span, to: u64) -> Result<(), String> {
        let kind = from.kind()?;
        let sum = sys::ncclRedOp_t::ncclSum;
        let (stream, comm) = (self.stream(), self.comm);
        // SAFETY: the caller's spans are live memory of this device until the end event.
        let done =
            unsafe { nccl::all_reduce(from.at as _, to as _, from.len, kind, sum, comm, stream) };
        self.told(done)
    }

    /// All ranks' `from` in rank order, into `to` of so many times the length.
    ///
    /// # Errors
    /// With NCCL's words.
    pub fn all_gather(&self, from: Span, to: u64) -> Result<(), String> {
        let kind = from.kind()?;
        let (stream, comm) = (self.stream(), self.comm);
        // SAFETY: the caller's spans are live memory of this device until the end event.
        let done = unsafe { nccl::all_gather(from.at as _, to as _, from.len, kind, comm, stream) };
        self.told(done)
    }

    /// This rank's part of the sum of all ranks' elements at `from`, which are as many times `to`'s.
    ///
    /// # Errors
    /// With NCCL's words.
    pub fn reduce_scatter(&self, from: u64, to: Span) -> Result<(), String> {
        let kind = to.kind()?;
        let sum = sys::ncclRedOp_t::ncclSum;
        let (stream, comm) = (self.stream(), self.comm);
        // SAFETY: the caller's spans are live memory of this device until the end event.
        let done =
            unsafe { nccl::reduce_scatter(from as _, to.at as _, to.len, kind, sum, comm, stream) };
        self.told(done)
    }

    /// Rank `root`'s `from`, into `to` of the same length.
    ///
    /// # Errors
    /// With NCCL's words.
    pub fn broadcast(&self, from: Span, to: u64, root: usize) -> Result<(), String> {
        let kind = from.kind()?;
        let (stream, comm) = (self.stream(), self.comm);
        // SAFETY: the caller's spans are live memory of this device until the end event.
        let done = unsafe {
            nccl::broadcast(
                from.at as _,
                to as _,
                from.len,
                kind,
                root as i32,
                comm,
                stream,
            )
        };
        self.told(done)
    }

    /// Sends and receives, each with the rank at the other end, all at once.
    ///
    /// # Errors
    /// With NCCL's words.
    pub fn exchange(
        &self,
        sends: impl IntoIterator<Item = (usize, Span)>,
        receives: impl IntoIterator<Item = (usize, Span)>,
    ) -> Result<(), String> {
        self.told(nccl::group_start())?;
        let issue = || -> Result<(), String> {
            for (to, span) in sends {
                let (kind, stream) = (span.kind()?, self.stream());
                // SAFETY: the caller's spans are live memory of this device until the end event.
                self.told(unsafe {
                    nccl::send(span.at as _, span.len, kind, to as i32, self.comm, stream)
                })?;
            }
            for (from, span) in receives {
                let (kind, stream) = (span.kind()?, self.stream());
                // SAFETY: as above, and nothing else uses what is received until then.
                self.told(unsafe {
                    nccl::recv(span.at as _, span.len, kind, from as i32, self.comm, stream)
                })?;
            }
            Ok(())
        };
        let issued = issue();
        // A group that was begun is ended in any case.
        let ended = self.told(nccl::group_end());
        issued.and(ended)
    }

    /// A result in NCCL's words.
    fn told(&self, done: Result<nccl::NcclStatus, NcclError>) -> Result<(), String> {
        done.map(|_| ()).map_err(|error| words(&error, self.comm))
    }
}

/// What NCCL says of an error, and which GPU, host or setting it blames.
fn words(error: &NcclError, comm: sys::ncclComm_t) -> String {
    // SAFETY: NCCL returns constant strings of its own, or none.
    let text = |pointer: *const std::ffi::c_char| match pointer.is_null() {
        true => String::new(),
        // SAFETY: not null, so a string that ends.
        false => unsafe { CStr::from_ptr(pointer) }
            .to_string_lossy()
            .into_owned(),
    };
    // SAFETY: an enum's value, and a communicator that is live or null, for which NCCL answers for all.
    let (what, why) = unsafe {
        (
            text(sys::ncclGetErrorString(error.0)),
            text(sys::ncclGetLastError(comm)),
        )
    };
    match why.is_empty() {
        true => format!("NCCL: {what}"),
        false => format!("NCCL: {what} ({})", why.trim()),
    }
}

/// Refuses where NCCL is not to be found: the bindings would panic.
///
/// # Errors
/// With what to do.
pub fn require() -> Result<(), String> {
    // SAFETY: only asks whether the library can be opened.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => Err(
            "libnccl was not found, with which ranks on GPUs exchange tensors: install libnccl2 or \
             the wheel nvidia-nccl-cu13; TTT_CUDA_LIBS names its folder where the loader does not \
             know it (see `ttt doctor`)"
                .into(),
        ),
    }
}

/// What a new communicator's rank 0 gives to the others.
///
/// # Errors
/// If NCCL cannot listen.
pub fn unique_id() -> Result<UniqueId, String> {
    require()?;
    let id = nccl::get_uniqueid().map_err(|error| words(&error, null_mut()))?;
    Ok(id.internal.map(|byte| byte as u8))
}

impl Communicator {
    /// Rank `rank` of `size` that all have `id`. Returns once all have come.
    ///
    /// # Errors
    /// If the GPUs do not reach each other.
    pub fn new(device: &Device, id: &UniqueId, rank: usize, size: usize) -> Result<Self, String> {
        require()?;
        let anchor = Buffer::of(&Tensor::<1>::zeros([1], (device, DType::F32)));
        let anchor = anchor.ok_or("NCCL joins NVIDIA GPUs alone")?;
        let id = sys::ncclUniqueId {
            internal: id.map(|byte| byte as std::ffi::c_char),
        };
        let mut made = Err("the device thread did not answer".to_string());
        let out = &mut made;
        let own = anchor.clone();
        on_stream(&[], &[&anchor], move |_, _, _| {
            *out = Self::make(own, id, rank, size);
            Ok(())
        });
        made
    }

    /// On the device thread, whose context is current.
    fn make(
        anchor: Buffer,
        id: sys::ncclUniqueId,
        rank: usize,
        size: usize,
    ) -> Result<Self, String> {
        // Exchanges are what others wait for: their kernels go before arithmetic.
        let driver = |error: DriverError| error.to_string();
        let (_, greatest) = stream::get_priority_range().map_err(driver)?;
        let kind = stream::StreamKind::NonBlocking;
        let stream = stream::create_with_priority(kind, greatest).map_err(driver)?;
        let mut comm = null_mut();
        let mut config = Config::blocks(EXCHANGES);
        let config = (&raw mut config).cast();
        // SAFETY: `comm` is written before it is used; the context is current; of the configuration NCCL
        // reads as many bytes as it says that there are.
        let made =
            unsafe { nccl::comm_init_rank_config(&mut comm, size as i32, id, rank as i32, config) };
        made.map_err(|error| words(&error, null_mut()))?;
        Ok(Self {
            comm,
            stream,
            anchor,
            flights: Flights::new()?,
            failed: AtomicBool::new(false),
        })
    }

    /// Issues an operation of this `name` from `reads` to `writes`, after all that Burn's stream computes by
    /// now.
    ///
    /// # Errors
    /// If NCCL refuses it, or an earlier one failed.
    pub fn start(
        self: &Arc<Self>,
        name: &'static str,
        reads: Vec<Buffer>,
        writes: Vec<Buffer>,
        operation: impl FnOnce(Issue) -> Result<(), String> + Send,
    ) -> Result<Started, String> {
        let mut started = Err("the device thread did not answer".to_string());
        let out = &mut started;
        let from: Vec<&Buffer> = reads.iter().collect();
        // The device thread is found by what is written; there may be nothing else.
        let to: Vec<&Buffer> = writes.iter().chain([&self.anchor]).collect();
        // What is sent is about what is read, or what is written where others send it.
        let bytes = |all: &[Buffer]| -> usize {
            let each = all.iter().map(|b| b.len() * b.dtype().size());
            each.sum()
        };
        let bytes = bytes(&reads).max(bytes(&writes));
        on_stream(&from, &to, |context, reads, writes| {
            share::begin(bytes);
            *out = self.issue(name, context.stream, reads, writes, operation);
            out.as_ref().map(|_| ()).map_err(Clone::clone)
        });
        match started {
            Ok(end) => Ok(Started {
                name,
                communicator: self.clone(),
                end: Some(end),
                _reads: reads,
                writes,
            }),
            Err(reason) => {
                self.failed.store(true, Ordering::Relaxed);
                Err(reason)
            }
        }
    }

    /// On the device thread: the operation between two events. Returns that of its end.
    fn issue(
        &self,
        name: &'static str,
        compute: CUstream,
        reads: &[u64],
        writes: &[u64],
        operation: impl FnOnce(Issue) -> Result<(), String>,
    ) -> Result<Arc<Event>, String> {
        let driver = |error: DriverError| error.to_string();
        let computed = Event::on(compute).map_err(driver)?;
        computed.before(self.stream).map_err(driver)?;
        let begin = Event::on(self.stream).map_err(driver)?;
        let issue = Issue {
            comm: self.comm,
            stream: self.stream,
            reads,
            writes,
        };
        // From when the data is there; so the time in which others come, too.
        timed_beside(self.stream, || (name.into(), None), || operation(issue))?;
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is live; `state` is written.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.comm, &mut state) };
        issue.told(asked.result())?;
        issue.told(state.result())?;
        let end = Arc::new(Event::on(self.stream).map_err(driver)?);
        self.flights.note(begin, end.clone());
        Ok(end)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let failed = self.failed.load(Ordering::Relaxed) || std::thread::panicking();
        let this = &*self;
        on_stream(&[], &[&self.anchor], move |_, _, _| {
            this.flights.clear();
            // SAFETY: made by `make` and not used again. What has failed is aborted, since its end
            // would be waited for in vain. A failure to clean up has nobody to tell it to.
            let _gone = unsafe {
                match failed {
                    true => nccl::comm_abort(this.comm),
                    false => nccl::comm_destroy(this.comm),
                }
            };
            // SAFETY: made by `make` and not used again; nothing is issued on it any more.
            let _gone = unsafe { stream::destroy(this.stream) };
            Ok(())
        });
    }
}

/// An operation under way. Its memory is held until Burn's stream is known to come after it.
#[derive(Debug)]
pub struct Started {
    name: &'static str,
    communicator: Arc<Communicator>,
    end: Option<Arc<Event>>,
    _reads: Vec<Buffer>,
    writes: Vec<Buffer>,
}

impl Started {
    /// What was written; whatever Burn computes from now on comes after it.
    ///
    /// # Errors
    /// If the device failed.
    pub fn wait(mut self) -> Result<Vec<Buffer>, String> {
        self.join()?;
        Ok(std::mem::take(&mut self.writes))
    }

    fn join(&mut self) -> Result<(), String> {
        let Some(end) = self.end.take() else {
            return Ok(());
        };
        let mut joined = Err("the device thread did not answer".to_string());
        let out = &mut joined;
        let (name, anchor) = (self.name, &self.communicator.anchor);
        let to: Vec<&Buffer> = self.writes.iter().chain([anchor]).collect();
        on_stream(&[], &to, move |context, _, _| {
            let stream = context.stream;
            let wait = || end.before(stream).map_err(|error| error.to_string());
            *out = timed(stream, || (format!("wait for {name}"), None), wait);
            out.clone()
        });
        joined
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // Nobody wants the result, but its memory must not be given to something else before. An
        // error has tainted the memory already.
        let _tainted = self.join();
    }
}
