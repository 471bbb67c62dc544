//! What the machine offers, and whether every CUDA operation computes what its reference does.

mod cases;
mod compare;
mod halves;
mod mirror;
mod system;

pub use compare::{Comparison, Op, compare};
pub use system::{Finding, bandwidth, gpu_count, system};

use burn::tensor::Device;

/// Every operation once on `device` against its reference on the CPU, `report`ed as it is done.
/// Returns whether all agree.
pub fn check(device: &Device, mut report: impl FnMut(&Comparison)) -> bool {
    let mut sound = true;
    for case in cases::all() {
        for comparison in compare(&case, device) {
            sound &= comparison.passed();
            report(&comparison);
        }
    }
    for comparison in cases::optimizer(device) {
        sound &= comparison.passed();
        report(&comparison);
    }
    sound
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The comparisons themselves, where both sides are the reference: only rounding may differ. The
    /// halves of a block have no form here.
    #[test]
    fn the_reference_agrees_with_itself() {
        let halves: Vec<String> = halves::all().into_iter().map(|op| op.name).collect();
        let mut cases = cases::all();
        cases.retain(|op| !halves.contains(&op.name));
        assert!(!cases.is_empty());
        for case in cases {
            for comparison in compare(&case, &Device::flex()) {
                assert!(comparison.passed(), "{comparison}");
            }
        }
    }
}
