//! What an operation does at least, and how fast it therefore ran.

/// The least that an operation does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    /// Floating-point operations.
    Flops(f64),
    /// Bytes read and written once.
    Bytes(f64),
}

impl Work {
    /// The rate of doing this in `ms` milliseconds, with its unit.
    pub fn rate(self, ms: f64) -> (f64, &'static str) {
        match self {
            Self::Flops(flops) => (flops / ms / 1e9, "TFLOP/s"),
            Self::Bytes(bytes) => (bytes / ms / 1e6, "GB/s"),
        }
    }

    /// Both together; `None` if they are not of one kind.
    pub fn plus(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Flops(a), Self::Flops(b)) => Some(Self::Flops(a + b)),
            (Self::Bytes(a), Self::Bytes(b)) => Some(Self::Bytes(a + b)),
            _ => None,
        }
    }
}
