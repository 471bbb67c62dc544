//! Events on streams, and what they tell of a GPU that does not answer.
//!
//! A GPU that hangs and one that waits for it in an exchange look alike from the host: neither answers.
//! What tells them apart are two events around every exchange. Where one has begun and not ended, the
//! GPU waits for other ranks; where none has, it is still at its own work.
//!
//! A GPU that works has seconds of work before it, and the host does not hear of it before the end. So
//! there are events between, the marks ([`mark`]), which it passes as it goes on.
//!
//! The driver takes some thousand launches of a stream and keeps the next waiting, and with it, it seems, every
//! thread that asks for an event. So a host that is [`AHEAD`] of its device waits before it comes to that, for
//! an event, which keeps nobody else.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use burn::tensor::Device;
use cudarc::driver::result::{DriverError, ctx, event, stream};
use cudarc::driver::sys::{
    CUcontext, CUevent, CUevent_flags, CUevent_wait_flags, CUstream, cuEventCreate,
    cuLaunchHostFunc,
};

use super::stream::{Buffer, on_stream};

/// A point in the work of a stream.
#[derive(Debug)]
pub(super) struct Event(CUevent);

// SAFETY: an event belongs to a context, not to a thread.
unsafe impl Send for Event {}
// SAFETY: the driver may be asked for an event by any thread at any time.
unsafe impl Sync for Event {}

impl Event {
    fn new() -> Result<Self, DriverError> {
        event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).map(Self)
    }

    /// The same for a thread that sleeps while it waits for it.
    fn to_wait_for(stream: CUstream) -> Result<Self, DriverError> {
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        let mut made = std::ptr::null_mut();
        // SAFETY: the driver writes an event there.
        unsafe { cuEventCreate(&mut made, flags) }.result()?;
        let event = Self(made);
        // SAFETY: both are live and of the current context.
        unsafe { event::record(event.0, stream) }?;
        Ok(event)
    }

    /// Waits until the device has come to it.
    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: live, and was recorded.
        unsafe { event::synchronize(self.0) }
    }

    /// The point that `stream` has been given work up to.
    pub fn on(stream: CUstream) -> Result<Self, DriverError> {
        let event = Self::new()?;
        // SAFETY: both are live and of the current context.
        unsafe { event::record(event.0, stream) }?;
        Ok(event)
    }

    /// Makes what is issued on `stream` from now on come after it.
    pub fn before(&self, stream: CUstream) -> Result<(), DriverError> {
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are live and of the current context.
        unsafe { stream::wait_event(stream, self.0, flags) }
    }

    /// Whether the device has come to it.
    fn reached(&self) -> bool {
        // SAFETY: made by `new`, and live.
        unsafe { event::query(self.0) }.is_ok()
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new` and not used again; the driver keeps it while a stream waits for it.
        // That it cannot be given back is no reason to fail.
        let _kept = unsafe { event::destroy(self.0) };
    }
}

/// The exchanges of one communicator that were not yet seen to end, oldest first.
#[derive(Debug)]
pub(super) struct Flights {
    context: CUcontext,
    flying: Mutex<VecDeque<Flight>>,
}

#[derive(Debug)]
struct Flight {
    begin: Event,
    end: Arc<Event>,
}

// SAFETY: a context may be made current on any thread.
unsafe impl Send for Flights {}
// SAFETY: as above; what changes is behind the lock.
unsafe impl Sync for Flights {}

/// Those of this process.
static ALL: Mutex<Vec<Weak<Flights>>> = Mutex::new(vec![]);

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flights {
    /// Of a new communicator; on the device thread.
    pub fn new() -> Result<Arc<Self>, String> {
        let context = ctx::get_current().map_err(|error| error.to_string())?;
        let flights = Arc::new(Self {
            context: context.ok_or("the device thread has no context")?,
            flying: Mutex::default(),
        });
        locked(&ALL).push(Arc::downgrade(&flights));
        Ok(flights)
    }

    /// Notes an exchange between two events; on the device thread, which also forgets what has ended.
    pub fn note(&self, begin: Event, end: Arc<Event>) {
        let mut flying = locked(&self.flying);
        while flying.front().is_some_and(|flight| flight.end.reached()) {
            flying.pop_front();
        }
        flying.push_back(Flight { begin, end });
    }

    /// Forgets all; on the device thread.
    pub fn clear(&self) {
        locked(&self.flying).clear();
    }

    fn wait(&self) -> bool {
        // SAFETY: the context of the device thread, which is not given back while the process lives.
        if unsafe { ctx::set_current(self.context) }.is_err() {
            return false;
        }
        let flying = locked(&self.flying);
        let oldest = flying.iter().find(|flight| !flight.end.reached());
        oldest.is_some_and(|flight| flight.begin.reached())
    }
}

/// Whether this process's GPU has begun an exchange that has not ended, and so waits for other ranks.
/// May be asked by a thread of its own while others wait for the device.
pub fn waits_for_others() -> bool {
    let all: Vec<_> = locked(&ALL).iter().filter_map(Weak::upgrade).collect();
    all.iter().any(|flights| flights.wait())
}

/// Marks that may be before a device. Ranks mark every pass over a block, of which the longest, backward and
/// computed anew, is some hundred launches; and six of them are work for long enough to read rows meanwhile.
const AHEAD: usize = 6;

/// A mark is asked for.
static DUE: AtomicBool = AtomicBool::new(false);

/// Those of this process; none before the first.
static MARKS: Mutex<Option<Marks>> = Mutex::new(None);

#[derive(Debug)]
struct Marks {
    context: CUcontext,
    /// Not yet seen to be passed, oldest first.
    coming: VecDeque<Arc<Event>>,
    passed: u64,
}

// SAFETY: a context may be made current on any thread.
unsafe impl Send for Marks {}

/// Puts a mark behind the work that the device has, before what it is given next. Costs the host nothing
/// here, and an event on the device thread then.
pub fn mark() {
    DUE.store(true, Ordering::Relaxed);
}

/// The mark that is due, on the stream that is given work now; on the device thread, which then waits until
/// the device is no more than [`AHEAD`] of them behind.
pub(super) fn keep_mark(stream: CUstream) {
    if !DUE.swap(false, Ordering::Relaxed) {
        return;
    }
    // Where the driver refuses, what is done next fails and tells; a mark alone is not missed.
    let (Ok(Some(context)), Ok(event)) = (ctx::get_current(), Event::to_wait_for(stream)) else {
        return;
    };
    let behind = {
        let mut marks = locked(&MARKS);
        let marks = marks.get_or_insert_with(|| Marks {
            context,
            coming: VecDeque::new(),
            passed: 0,
        });
        marks.coming.push_back(Arc::new(event));
        let most = marks.coming.len().checked_sub(1 + AHEAD);
        most.map(|at| marks.coming[at].clone())
    };
    // Without the lock: others count the marks meanwhile.
    if let Some(mark) = behind {
        let _refused = mark.wait();
    }
}

/// How many marks the device has passed, and how many are before it. May be asked by a thread of its own
/// while others wait for the device.
pub fn marks() -> (u64, usize) {
    let mut marks = locked(&MARKS);
    let Some(marks) = &mut *marks else {
        return (0, 0);
    };
    // SAFETY: the context of the device thread, which is not given back while the process lives.
    if unsafe { ctx::set_current(marks.context) }.is_ok() {
        while marks.coming.front().is_some_and(|mark| mark.reached()) {
            marks.coming.pop_front();
            marks.passed += 1;
        }
    }
    (marks.passed, marks.coming.len())
}

/// Makes the device stand still for ever behind the work it has: to rehearse what happens then.
///
/// # Errors
/// If it is no GPU.
pub fn stall(device: &Device) -> Result<(), String> {
    unsafe extern "C" fn for_ever(_: *mut std::ffi::c_void) {
        loop {
            std::thread::park();
        }
    }
    let anchor = Buffer::probe(device).ok_or("only a GPU can be made to stand still")?;
    let mut stalled = Err("the device thread did not answer".to_string());
    let out = &mut stalled;
    on_stream(&[], &[&anchor], move |context, _, _| {
        // SAFETY: the function reads nothing, and the stream is live.
        let launched =
            unsafe { cuLaunchHostFunc(context.stream, Some(for_ever), std::ptr::null_mut()) };
        *out = launched.result().map_err(|error| error.to_string());
        out.clone()
    });
    stalled
}
