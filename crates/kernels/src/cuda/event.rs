//! Events on streams, and what they tell of a GPU that does not answer.
//!
//! A GPU that hangs and one that waits for it in an exchange look alike from the host: neither answers.
//! What tells them apart are two events around every exchange. Where one has begun and not ended, the
//! GPU waits for other ranks; where none has, it is still at its own work.
//!
//! A GPU that works has seconds of work before it, and the host does not hear of it before the end. So
//! there are events between, the marks ([`mark`]), which it passes as it goes on.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use burn::tensor::{DType, Device, Tensor};
use cudarc::driver::result::{DriverError, ctx, event, stream};
use cudarc::driver::sys::{CUcontext, CUevent, CUevent_flags, CUevent_wait_flags, CUstream};

use super::stream::{Arg, Buffer, on_stream};

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

/// A mark is asked for.
static DUE: AtomicBool = AtomicBool::new(false);

/// Those of this process; none before the first.
static MARKS: Mutex<Option<Marks>> = Mutex::new(None);

#[derive(Debug)]
struct Marks {
    context: CUcontext,
    /// Not yet seen to be passed, oldest first.
    coming: VecDeque<Event>,
    passed: u64,
}

// SAFETY: a context may be made current on any thread.
unsafe impl Send for Marks {}

/// Puts a mark behind the work that the device has, before what it is given next. Costs the host nothing
/// here, and an event on the device thread then.
pub fn mark() {
    DUE.store(true, Ordering::Relaxed);
}

/// The mark that is due, on the stream that is given work now; on the device thread.
pub(super) fn keep_mark(stream: CUstream) {
    if !DUE.swap(false, Ordering::Relaxed) {
        return;
    }
    // Where the driver refuses, what is done next fails and tells; a mark alone is not missed.
    let (Ok(Some(context)), Ok(event)) = (ctx::get_current(), Event::on(stream)) else {
        return;
    };
    let mut marks = locked(&MARKS);
    let marks = marks.get_or_insert_with(|| Marks {
        context,
        coming: VecDeque::new(),
        passed: 0,
    });
    marks.coming.push_back(event);
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
        while marks.coming.front().is_some_and(Event::reached) {
            marks.coming.pop_front();
            marks.passed += 1;
        }
    }
    (marks.passed, marks.coming.len())
}

/// Makes the device stand still for ever behind the work it has, in a kernel that does not end: to rehearse what
/// happens then.
///
/// # Errors
/// If it is no GPU.
pub fn stall(device: &Device) -> Result<(), String> {
    let never: Tensor<1> = Tensor::zeros([1], (device, DType::F32));
    let never = Buffer::of(&never).ok_or("only a GPU can be made to stand still")?;
    let mut stalled = Err("the device thread did not answer".to_string());
    let out = &mut stalled;
    on_stream(&[], &[&never], move |cx, _, to| {
        *out = cx.launch("stall", (1, 1, 1), 1, &[Arg::Ptr(to[0])]);
        out.clone()
    });
    stalled
}
