//! Multiprocessors that arithmetic leaves to exchanges between ranks.
//!
//! NCCL's kernels need multiprocessors, too. A product whose blocks stay to the end is laid out over all
//! of those that it is told of: if an exchange holds a few of them, the tiles meant for these wait until
//! the others are done. So where there are communicators, each exchange gets [`EXCHANGES`] multiprocessors
//! at most, and such products do without as many. What that gains or costs was not measured apart
//! (docs/benchmarks.md).

use std::sync::atomic::{AtomicUsize, Ordering};

use super::stream::Context;

/// Multiprocessors of an exchange. A step of the 4B over two shards asks for 9 GB/s; what eight move at most
/// was not measured.
pub const EXCHANGES: u32 = 8;

/// Communicators of this process.
static COMMUNICATORS: AtomicUsize = AtomicUsize::new(0);

/// Somebody exchanges, as long as this lives.
#[derive(Debug)]
pub struct Exchanging(());

impl Exchanging {
    pub fn begin() -> Self {
        COMMUNICATORS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Exchanging {
    fn drop(&mut self) {
        COMMUNICATORS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Multiprocessors that are left to exchanges.
fn left() -> u32 {
    match COMMUNICATORS.load(Ordering::Relaxed) {
        0 => 0,
        _ => EXCHANGES,
    }
}

impl Context<'_> {
    /// Multiprocessors for a product whose blocks stay to the end.
    pub fn processors_for_products(&mut self) -> Result<u32, String> {
        let all = self.processors()?;
        Ok(all.saturating_sub(left()).max(2))
    }

    /// The same where that is not all of them.
    pub fn processors_beside_exchanges(&mut self) -> Result<Option<u32>, String> {
        match left() {
            0 => Ok(None),
            _ => self.processors_for_products().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_lasts_as_long_as_somebody_exchanges() {
        assert_eq!(left(), 0);
        let first = Exchanging::begin();
        let second = Exchanging::begin();
        drop(first);
        assert_eq!(left(), EXCHANGES);
        drop(second);
        assert_eq!(left(), 0);
    }
}
