//! `ttt doctor`.

use anyhow::bail;
use ttt_kernels::bench::{self, Row};
use ttt_kernels::doctor;
use ttt_train::config::DeviceKind;
use ttt_train::device;

pub fn doctor() -> anyhow::Result<()> {
    let mut fine = true;
    for finding in doctor::system() {
        println!("{:<14} {}", finding.what, finding.answer);
        fine &= finding.fine;
    }
    if !fine {
        bail!("something that training on a GPU needs is missing");
    }
    let device = device::open(DeviceKind::Cuda, 0)?;
    if !doctor::check(&device, |comparison| println!("{comparison}")) {
        bail!("an operation on this GPU disagrees with its reference: do not train with it");
    }
    println!("\nrates at the sizes of a 500M model (those above are at sizes that take no time):");
    bench::micro(
        &device,
        |_| true,
        |(name, measured)| {
            let line = match measured {
                Ok(row) => passes(&row),
                // A small GPU may have no room for it.
                Err(error) => error,
            };
            println!("{name:<20} {line}");
        },
    );
    Ok(())
}

/// Forward alone, and forward and backward together.
fn passes(row: &Row) -> String {
    let timed = [
        ("forward", row.forward_ms, row.work),
        ("with backward", row.both_ms, row.both_work()),
    ];
    let parts = timed.into_iter().filter_map(|(pass, ms, work)| {
        let (rate, unit) = work.rate(ms?);
        Some(format!("{pass} {:.3} ms, {rate:.0} {unit}", ms?))
    });
    parts.collect::<Vec<_>>().join("; ")
}
