//! `ttt doctor`.

use anyhow::bail;
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
    Ok(())
}
