//! How long work takes on the GPU: events between the operations of Burn's stream.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use cudarc::driver::result::{DriverError, event};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream};

use super::share;
use super::stream::{Buffer, on_stream};
use crate::profile::{Profile, Timed};
use crate::work::Work;

fn failed(what: &str) -> impl Fn(DriverError) -> String + '_ {
    move |e| format!("{what} a CUDA event: {e}")
}

/// An event recorded on `stream`.
fn record(stream: CUstream) -> Result<CUevent, String> {
    let made = event::create(CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("making"))?;
    // SAFETY: the event was just made, the stream is live.
    unsafe { event::record(made, stream) }.map_err(failed("recording"))?;
    Ok(made)
}

/// Milliseconds from one event to a later one of the same stream; waits for the later one.
fn between(from: CUevent, to: CUevent) -> Result<f64, String> {
    // SAFETY: both were recorded on one stream and are destroyed later.
    unsafe {
        event::synchronize(to).map_err(failed("waiting for"))?;
        event::elapsed(from, to)
    }
    .map(f64::from)
    .map_err(failed("reading"))
}

fn destroy(event: CUevent) {
    // SAFETY: not used again. A failure leaks a few bytes.
    let _ = unsafe { event::destroy(event) };
}

/// Runs `issue` on the device thread with Burn's stream.
fn on_thread<T: Send>(
    probe: &Buffer,
    issue: impl FnOnce(CUstream) -> Result<T, String> + Send,
) -> Result<T, String> {
    let mut done = Err("the device thread did not answer".to_string());
    on_stream(&[], &[probe], |cx, _, _| {
        done = issue(cx.stream);
        Ok(())
    });
    done
}

/// Marks in Burn's stream.
#[derive(Debug)]
pub struct Events {
    probe: Buffer,
    /// Addresses of `CUevent`s, which are used on the device thread alone.
    marks: Vec<usize>,
}

impl Events {
    /// `None` if `device` is no CUDA device.
    pub fn new(device: &Device) -> Option<Self> {
        Some(Self {
            probe: Buffer::probe(device)?,
            marks: vec![],
        })
    }

    /// Marks the end of what has been issued so far.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn mark(&mut self) -> Result<(), String> {
        let mark = on_thread(&self.probe, |stream| Ok(record(stream)? as usize))?;
        self.marks.push(mark);
        Ok(())
    }

    /// Milliseconds between neighbouring marks, which are forgotten; waits for the last.
    ///
    /// # Errors
    /// If work before the last mark failed.
    pub fn read(&mut self) -> Result<Vec<f64>, String> {
        let marks = std::mem::take(&mut self.marks);
        on_thread(&self.probe, |_| {
            let events: Vec<CUevent> = marks.iter().map(|&at| at as CUevent).collect();
            let times = events.windows(2).map(|pair| between(pair[0], pair[1]));
            let times = times.collect();
            events.into_iter().for_each(destroy);
            times
        })
    }
}

static ON: AtomicBool = AtomicBool::new(false);

/// Whether operations are being timed.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

struct Record {
    name: String,
    work: Option<Work>,
    beside: bool,
    from: CUevent,
    to: CUevent,
}

thread_local! {
    /// Lives on the device thread.
    static RECORDS: RefCell<Vec<Record>> = const { RefCell::new(vec![]) };
}

/// Calls `issue`, between two events of `stream`, Burn's, while a profile is taken. `describe` names the
/// operation and what it does, which exchanges under way hear of, too.
pub(super) fn timed(
    stream: CUstream,
    describe: impl Fn() -> (String, Option<Work>),
    issue: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    if share::is_under_way() {
        share::pass(describe().1);
    }
    timed_on(stream, false, describe, issue)
}

/// The same of what a stream beside Burn's does.
pub(super) fn timed_beside(
    stream: CUstream,
    describe: impl FnOnce() -> (String, Option<Work>),
    issue: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    timed_on(stream, true, describe, issue)
}

fn timed_on(
    stream: CUstream,
    beside: bool,
    describe: impl FnOnce() -> (String, Option<Work>),
    issue: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    if !is_on() {
        return issue();
    }
    let from = record(stream)?;
    issue()?;
    let to = record(stream)?;
    let (name, work) = describe();
    RECORDS.with_borrow_mut(|records| {
        records.push(Record {
            name,
            work,
            beside,
            from,
            to,
        });
    });
    Ok(())
}

/// Operations are timed while this is there.
#[derive(Debug)]
pub struct Recording {
    probe: Buffer,
    /// The beginning: the address of a `CUevent` of Burn's stream.
    from: usize,
}

impl Recording {
    /// Begins behind what was issued so far. `None` if `device` is no CUDA device.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn begin(device: &Device) -> Option<Result<Self, String>> {
        let probe = Buffer::probe(device)?;
        let begun = on_thread(&probe, |stream| {
            let from = record(stream)?;
            RECORDS.with_borrow_mut(Vec::clear);
            ON.store(true, Ordering::Relaxed);
            Ok(from as usize)
        });
        Some(begun.map(|from| Self { probe, from }))
    }

    /// Waits for what was issued and tells how long it took.
    ///
    /// # Errors
    /// If an operation failed.
    pub fn end(self) -> Result<Profile, String> {
        let begin = self.from;
        on_thread(&self.probe, |stream| {
            ON.store(false, Ordering::Relaxed);
            let (begin, end) = (begin as CUevent, record(stream)?);
            let ms = between(begin, end);
            let records = RECORDS.take();
            let mut before = begin;
            let operations = records.iter().map(|record| {
                let gap = match record.beside {
                    true => 0.0,
                    false => between(std::mem::replace(&mut before, record.to), record.from)?,
                };
                Ok(Timed {
                    name: record.name.clone(),
                    ms: between(record.from, record.to)?,
                    work: record.work,
                    beside: record.beside,
                    gap,
                })
            });
            let operations = operations.collect::<Result<_, String>>();
            for record in &records {
                destroy(record.from);
                destroy(record.to);
            }
            destroy(begin);
            destroy(end);
            let operations = operations?;
            Ok(Profile {
                ms: ms?,
                operations,
            })
        })
    }
}
