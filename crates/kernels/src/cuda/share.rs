//! Multiprocessors that arithmetic leaves to exchanges between ranks.
//!
//! NCCL's kernels need multiprocessors, too. A product whose blocks stay to the end is laid out over all
//! of those that it is told of: if an exchange holds a few of them, the tiles meant for these wait until
//! the others are done. So an exchange gets [`EXCHANGES`] multiprocessors at most, and products that run
//! beside it do without as many. Those alone: with fewer multiprocessors a product may need another round
//! of tiles (docs/benchmarks.md).
//!
//! Which products run beside an exchange is reckoned as they are issued, on the device thread: an exchange
//! begins with what is issued after it, and goes on for its bytes at [`BYTES_PER_NS`] while the operations
//! that follow take their work at the rates that most of them reach.

use std::cell::Cell;

use super::stream::Context;
use crate::work::Work;

/// Multiprocessors of an exchange.
pub const EXCHANGES: u32 = 8;

/// Of an exchange beside arithmetic: 93 GB/s were seen of sums of 55 MB between two H200, the time in which
/// one waits for the other included.
const BYTES_PER_NS: f64 = 93.0;
/// Of a product, in a step.
const FLOPS_PER_NS: f64 = 600e3;
/// Of what waits for memory.
const MEMORY_PER_NS: f64 = 2500.0;

thread_local! {
    /// Nanoseconds that the exchanges begun so far are reckoned to go on; of the device thread.
    static AHEAD: Cell<f64> = const { Cell::new(0.0) };
}

/// An exchange of so many bytes begins.
pub fn begin(bytes: usize) {
    AHEAD.set(AHEAD.get() + bytes as f64 / BYTES_PER_NS);
}

/// Whether one is under way.
pub fn is_under_way() -> bool {
    AHEAD.get() > 0.0
}

/// An operation that does this much, where that is known, is issued.
pub fn pass(work: Option<Work>) {
    let time = match work {
        Some(Work::Flops(flops)) => flops / FLOPS_PER_NS,
        Some(Work::Bytes(bytes)) => bytes / MEMORY_PER_NS,
        None => 0.0,
    };
    AHEAD.set((AHEAD.get() - time).max(0.0));
}

impl Context<'_> {
    /// Multiprocessors for a product whose blocks stay to the end.
    pub fn processors_for_products(&mut self) -> Result<u32, String> {
        let all = self.processors()?;
        Ok(match is_under_way() {
            true => all.saturating_sub(EXCHANGES).max(2),
            false => all,
        })
    }

    /// The same where that is not all of them.
    pub fn processors_beside_exchanges(&mut self) -> Result<Option<u32>, String> {
        match is_under_way() {
            false => Ok(None),
            true => self.processors_for_products().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_is_under_way_for_its_bytes() {
        assert!(!is_under_way());
        let millisecond = (BYTES_PER_NS * 1e6) as usize;
        begin(millisecond);
        begin(millisecond);
        let product = Some(Work::Flops(FLOPS_PER_NS * 1e6));
        pass(product);
        pass(None);
        assert!(is_under_way(), "one of two");
        pass(Some(Work::Bytes(MEMORY_PER_NS * 0.9e6)));
        assert!(is_under_way(), "a tenth of one");
        pass(product);
        assert!(!is_under_way());
        // What was more than that does not count for the next.
        begin(millisecond);
        assert!(is_under_way());
    }
}
