//! Many steps: memory that is taken once must not grow.

use anyhow::{Context, ensure};
use burn::tensor::Device;
use serde_json::json;
use ttt_kernels::memory::{self, Usage};
use ttt_parallel::Mesh;
use ttt_train::device;
use ttt_train::step::MicroBatch;

use super::run::Run;
use super::training::{Trainer, random_rows};
use crate::gpu::args::Mode;

/// What is taken after a step.
#[derive(Clone, Copy, Debug)]
struct Sample {
    step: u64,
    usage: Usage,
}

/// Trains for `steps` steps, each on other rows, and tells the memory after some of them.
///
/// # Errors
/// If it grew.
pub fn soak(run: &Run, steps: u64, device: &Device) -> anyhow::Result<()> {
    let name = format!("soak/{}", run.name(Mode::Train));
    let mut trainer = Trainer::new(run, 1, device)?;
    let vocab = trainer.config.model.vocab_size;
    let mut samples = vec![];
    for step in 1..=steps {
        let micro = MicroBatch::new(&random_rows(run, vocab, step), &Mesh::single(), device)?;
        let loss = trainer.step(&micro)?;
        if ![10, 100, steps].contains(&step) && step % 1000 != 0 {
            continue;
        }
        let loss = device::read_scalar(&loss)?;
        ensure!(loss.is_finite(), "the loss of step {step} is {loss}");
        drop(micro);
        device.sync().context("the device failed")?;
        let usage = memory::usage(device);
        let line = json!({
            "run": name,
            "step": step,
            "loss": loss,
            "tensors_bytes": usage.map(|u| u.tensors),
            "pools_bytes": usage.map(|u| u.pools),
            "scratch_bytes": usage.map(|u| u.scratch),
            "driver_bytes": memory::driver_in_use(0),
            "host_bytes": host_bytes(),
        });
        println!("{line}");
        samples.extend(usage.map(|usage| Sample { step, usage }));
    }
    judge(&samples)
}

/// Resident memory of this process; `None` where the system does not tell.
fn host_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// After the first sample live tensors stay as they are; after the second, pools and libraries too: a
/// pool may still find its shape in the first steps.
fn judge(samples: &[Sample]) -> anyhow::Result<()> {
    let Some(last) = samples.last() else {
        return Ok(());
    };
    let grown = |what: &str, from: &Sample, bytes: fn(&Usage) -> u64| {
        let (before, after) = (bytes(&from.usage), bytes(&last.usage));
        let (a, b) = (from.step, last.step);
        ensure!(
            after <= before,
            "{what} grew from {before} bytes at step {a} to {after} at step {b}"
        );
        Ok(())
    };
    grown("memory of live tensors", &samples[0], |u| u.tensors)?;
    let settled = samples.get(1).unwrap_or(&samples[0]);
    grown("the allocator's pools", settled, |u| u.pools)?;
    grown("the libraries' memory", settled, |u| u.scratch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(step: u64, tensors: u64, pools: u64) -> Sample {
        let usage = Usage {
            tensors,
            pools,
            scratch: 7,
        };
        Sample { step, usage }
    }

    #[test]
    fn growth_is_told_with_its_size() {
        let fine = [sample(10, 5, 50), sample(100, 5, 60), sample(1000, 5, 60)];
        assert!(judge(&fine).is_ok());
        assert!(judge(&[]).is_ok(), "nobody counts on a CPU");
        let leak = [sample(10, 5, 60), sample(100, 5, 60), sample(1000, 6, 60)];
        let error = judge(&leak).unwrap_err().to_string();
        let expected = "memory of live tensors grew from 5 bytes at step 10 to 6 at step 1000";
        assert_eq!(error, expected);
        let pools = [sample(10, 5, 60), sample(100, 5, 60), sample(1000, 5, 61)];
        assert!(judge(&pools).unwrap_err().to_string().contains("pools"));
    }
}
