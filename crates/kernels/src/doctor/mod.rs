//! What the machine offers, and whether every CUDA operation computes what its reference does.

mod cases;
mod compare;
mod halves;
mod mirror;
mod optimizer;
mod system;

pub use compare::{Comparison, Op, Rate, compare, repeated};
pub use mirror::Mirror;
pub use system::{Finding, bandwidth, gpu_count, gpu_name, system};

use burn::tensor::Device;

use crate::deterministic;

/// Every operation once on `device` against its reference on the CPU, `report`ed as it is done.
/// Returns whether all agree.
pub fn check(device: &Device, mut report: impl FnMut(&Comparison)) -> bool {
    let mut sound = true;
    let mut tell = |comparisons: Vec<Comparison>| {
        for comparison in comparisons {
            sound &= comparison.passed();
            report(&comparison);
        }
    };
    let set = deterministic::is_on();
    deterministic::set(false);
    for case in cases::all() {
        tell(compare(&case, device));
    }
    leave_out_always(true);
    for case in halves::left_out() {
        tell(compare(&case, device));
    }
    leave_out_always(false);
    let (bytes, case) = cases::few_places();
    spend_ahead(Some(bytes));
    tell(compare(&case, device));
    spend_ahead(None);
    tell(optimizer::all(device));
    deterministic::set(true);
    for case in cases::attentions() {
        let name = format!("{}, deterministic", case.name);
        tell(compare(&Op { name, ..case }, device));
    }
    // Large enough that blocks finish in another order each time.
    for case in cases::long_attentions() {
        tell(repeated(&case, device, 5));
    }
    deterministic::set(set);
    sound
}

/// See `leave_out_always` of the CUDA scan, the only one that weighs whether to.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
fn leave_out_always(on: bool) {
    #[cfg(feature = "cuda")]
    crate::cuda::ttt::leave_out_always(on);
}

/// See `spend_ahead` of the CUDA scan.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
fn spend_ahead(bytes: Option<usize>) {
    #[cfg(feature = "cuda")]
    crate::cuda::ttt::spend_ahead(bytes);
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
