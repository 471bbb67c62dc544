//! Multiprocessors that arithmetic leaves to exchanges between ranks.
//!
//! NCCL's kernels need multiprocessors, too. A product whose blocks stay to the end is laid out over all
//! of those that it is told of: if an exchange holds a few of them, the tiles meant for these wait until
//! the others are done, and the product takes twice as long. So where there are communicators, exchanges
//! get [`EXCHANGES`] multiprocessors at most, and such products do without these. A GPU at its power limit
//! loses little by that: the others run faster.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::stream::Context;

/// Multiprocessors of an exchange. Each moves some 20 GB/s over NVLink; a step asks for a tenth of what
/// eight move.
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
