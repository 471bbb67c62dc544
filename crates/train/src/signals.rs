//! SIGINT and SIGTERM: the first asks the run to save and end, the second ends it at once.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// A request to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT, Ctrl-C.
    Interrupt = SIGINT as isize,
    /// SIGTERM.
    Terminate = SIGTERM as isize,
}

impl Signal {
    /// The signal of this number.
    pub fn of(number: i32) -> Option<Self> {
        match number {
            0 => None,
            SIGINT => Some(Self::Interrupt),
            _ => Some(Self::Terminate),
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        })
    }
}

/// Listens for requests to end.
#[derive(Debug)]
pub struct Signals {
    /// The signal's number, 0 before the first.
    received: Arc<AtomicUsize>,
}

impl Signals {
    /// Begins to listen. A second signal ends the process with code 130 (SIGINT) or 143 (SIGTERM).
    ///
    /// # Errors
    /// If the system takes no handler.
    pub fn install() -> io::Result<Self> {
        let received = Arc::new(AtomicUsize::new(0));
        let armed = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the shutdown must see the flag as the signal before left it.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&armed))?;
            flag::register(signal, Arc::clone(&armed))?;
            flag::register_usize(signal, Arc::clone(&received), signal as usize)?;
        }
        Ok(Self { received })
    }

    /// The request, once there is one.
    pub fn received(&self) -> Option<Signal> {
        Signal::of(self.received.load(Ordering::Relaxed) as i32)
    }
}
