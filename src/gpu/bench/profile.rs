//! Where the time of one step goes.

use anyhow::{Context, anyhow, bail};
use burn::tensor::Device;
use ttt_kernels::clock::{Clock, median};
use ttt_kernels::doctor;
use ttt_kernels::profile::{Entry, by_name, record};
use ttt_kernels::work::Work;
use ttt_parallel::Mesh;
use ttt_train::metrics::peak_flops;
use ttt_train::step::MicroBatch;

use super::run::Run;
use super::training::{Trainer, random_rows};
use crate::gpu::args::Mode;

/// Prints the operations of one training step of `run`, the longest first.
pub fn of_training(run: &Run, device: &Device) -> anyhow::Result<()> {
    let mut trainer = Trainer::new(run, 1, device)?;
    let rows = random_rows(run, trainer.config.model.vocab_size, 1);
    let micro = MicroBatch::new(&rows, &Mesh::single(), device)?;
    let loss = profile(run, Mode::Train, device, || trainer.step(&micro))?;
    let loss = ttt_train::device::read_scalar(&loss).context("the profiled step")?;
    anyhow::ensure!(loss.is_finite(), "the loss of the profiled step is {loss}");
    Ok(())
}

/// Prints the operations of one `pass` of `run`, and returns that pass's result.
pub fn profile<T>(
    run: &Run,
    mode: Mode,
    device: &Device,
    mut pass: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    for _ in 0..run.warmup {
        pass()?;
    }
    // The undisturbed pass, to which everything is compared.
    let failed = |error: String| anyhow!("the device failed: {error}");
    let mut clock = Clock::new(device);
    clock.mark().map_err(failed)?;
    for _ in 0..run.steps {
        pass()?;
        clock.mark().map_err(failed)?;
    }
    let whole = median(&clock.read().map_err(failed)?);

    let Some(recorded) = record(device, pass) else {
        bail!("a profile needs a GPU: it is made of CUDA events");
    };
    let (done, operations) = recorded.map_err(failed)?;
    let done = done?;
    let limits = Limits {
        flops: peak_flops(run.device),
        bytes_per_s: doctor::bandwidth(),
    };
    println!("{}: {whole:.3} ms per step", run.name(mode));
    print!("{}", table(&by_name(&operations), whole, &limits));
    Ok(done)
}

/// What the GPU can do at most.
struct Limits {
    flops: Option<f64>,
    bytes_per_s: Option<f64>,
}

impl Limits {
    fn share(&self, work: Work, ms: f64) -> Option<f64> {
        let (done, limit) = match work {
            Work::Flops(flops) => (flops, self.flops?),
            Work::Bytes(bytes) => (bytes, self.bytes_per_s?),
        };
        Some(done / (ms / 1e3) / limit)
    }
}

/// One line per operation, then what is left of the `whole` step.
fn table(entries: &[Entry], whole: f64, limits: &Limits) -> String {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let width = entries.iter().map(|e| e.name.chars().count()).max();
    let width = width.unwrap_or(0).max(28);
    let line = |name: &str, calls: &str, ms: f64, rate: &str, of: &str| {
        let share = percent(ms / whole);
        format!("{name:<width$} {calls:>6} {ms:>10.3} {share:>8} {rate:>14} {of:>9}\n")
    };
    let mut text = format!(
        "{:<width$} {:>6} {:>10} {:>8} {:>14} {:>9}\n",
        "operation", "calls", "ms", "share", "rate", "of limit"
    );
    for entry in entries {
        let rate = entry.work.map_or(String::new(), |work| {
            let (rate, unit) = work.rate(entry.ms);
            format!("{rate:.0} {unit}")
        });
        let of = entry.work.and_then(|work| limits.share(work, entry.ms));
        let of = of.map_or(String::new(), percent);
        text += &line(&entry.name, &entry.calls.to_string(), entry.ms, &rate, &of);
    }
    let sum: f64 = entries.iter().map(|entry| entry.ms).sum();
    let calls: usize = entries.iter().map(|entry| entry.calls).sum();
    text += &line("sum of these", &calls.to_string(), sum, "", "");
    text += &line("Burn's own kernels and gaps", "", whole - sum, "", "");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_tells_shares_rates_and_the_rest() {
        let entry = |name: &str, ms, work| Entry {
            name: name.into(),
            calls: 2,
            ms,
            work,
        };
        let limits = Limits {
            flops: Some(1000e12),
            bytes_per_s: None,
        };
        // 6 TFLOP in 8 ms: 750 TFLOP/s, three quarters of the limit.
        let gemm = entry("gemm", 8.0, Some(Work::Flops(6e12)));
        let rope = entry("rope", 1.0, Some(Work::Bytes(2e9)));
        let text = table(&[gemm, rope, entry("scan", 0.5, None)], 20.0, &limits);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let [_, gemm, rope, scan, sum, rest] = lines.as_slice() else {
            panic!("{text}")
        };
        let expected = "gemm 2 8.000 40.0 % 750 TFLOP/s 75.0 %";
        assert_eq!(gemm.join(" "), expected);
        assert_eq!(rope.join(" "), "rope 2 1.000 5.0 % 2000 GB/s");
        assert_eq!(scan.join(" "), "scan 2 0.500 2.5 %");
        assert_eq!(sum.join(" "), "sum of these 6 9.500 47.5 %");
        assert_eq!(rest.join(" "), "Burn's own kernels and gaps 10.500 52.5 %");
    }
}
