//! Where the time of a step goes: the operations of a GPU, the longest first.

use std::fs;

use burn::tensor::Device;
use ttt_kernels::doctor;
use ttt_kernels::memory::{self, Watch};
use ttt_kernels::profile::{self, Entry, Gap, Recording, Timed, by_name, gaps};
use ttt_kernels::work::Work;
use ttt_parallel::Activity;

use crate::config::{DeviceKind, RunConfig};
use crate::error::TrainError;
use crate::metrics::peak_flops;

/// The step of a run whose operations are timed; each rank writes what its own GPU did, and what its memory
/// held in the step before, since looking at memory takes time.
pub(crate) struct ProfiledStep<'a> {
    config: &'a RunConfig,
    rank: usize,
    device: &'a Device,
    /// In the step before.
    watch: Option<Watch>,
    /// After that step.
    memory: Option<Memory>,
}

/// What a GPU's memory held at most, in bytes.
struct Memory {
    allocated: u64,
    /// Free parts included.
    pools: u64,
}

impl<'a> ProfiledStep<'a> {
    /// Rank `rank`'s.
    pub fn new(config: &'a RunConfig, rank: usize, device: &'a Device) -> Self {
        Self {
            config,
            rank,
            device,
            watch: None,
            memory: None,
        }
    }

    /// Begins to time, if this is the step.
    ///
    /// # Errors
    /// If the device cannot be timed.
    pub fn begin(&mut self, step: u64) -> Result<Option<Recording>, TrainError> {
        if let (Some(watch), Some(usage)) = (self.watch.take(), memory::usage(self.device)) {
            self.memory = Some(Memory {
                allocated: watch.peak(),
                pools: usage.pools,
            });
        }
        if self.config.profile_step == Some(step + 1) {
            self.watch = Watch::begin(self.device);
        }
        if self.config.profile_step != Some(step) {
            return Ok(None);
        }
        match profile::begin(self.device) {
            Some(begun) => begun.map(Some).map_err(TrainError::Execution),
            None => Err(TrainError::Device {
                device: "cpu",
                problem: "run.profile_step times operations of a GPU: leave it out".into(),
            }),
        }
    }

    /// Writes `profile.rank<i>.txt` to the run's folder, if something was timed. Waits for the device.
    ///
    /// # Errors
    /// If an operation failed, or the file cannot be written.
    pub fn end(&self, recording: Option<Recording>, activity: &Activity) -> Result<(), TrainError> {
        let Some(recording) = recording else {
            return Ok(());
        };
        let profile = recording.end().map_err(TrainError::Execution)?;
        let _file = activity.long("writing a profile");
        let path = self
            .config
            .dir
            .join(format!("profile.rank{}.txt", self.rank));
        let mut text = table(
            &profile.operations,
            profile.ms,
            &Limits::of(self.config.device),
        );
        if let Some(memory) = &self.memory {
            let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
            text += &format!(
                "memory in the step before: at most {:.2} GiB for tensors and libraries; {:.2} GiB held for tensors\n",
                gib(memory.allocated),
                gib(memory.pools)
            );
        }
        fs::write(&path, text).map_err(TrainError::io("write", &path))
    }
}

/// What the GPU can do at most.
pub struct Limits {
    /// In bf16 products, FLOP/s.
    pub flops: Option<f64>,
    /// To and from its memory.
    pub bytes_per_s: Option<f64>,
}

impl Limits {
    /// Those of this machine's.
    pub fn of(device: DeviceKind) -> Self {
        Self {
            flops: peak_flops(device),
            bytes_per_s: doctor::bandwidth(),
        }
    }

    fn share(&self, work: Work, ms: f64) -> Option<f64> {
        let (done, limit) = match work {
            Work::Flops(flops) => (flops, self.flops?),
            Work::Bytes(bytes) => (bytes, self.bytes_per_s?),
        };
        Some(done / (ms / 1e3) / limit)
    }
}

/// Most gaps between operations that a table lists.
const GAPS: usize = 8;

/// Share of the step that a gap takes to be listed.
const GAP: f64 = 1e-4;

/// One line per operation, the longest first, then what is left of a step of `whole` ms and where most of
/// that lies, then what ran beside these.
pub fn table(operations: &[Timed], whole: f64, limits: &Limits) -> String {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let (beside, entries): (Vec<Entry>, Vec<Entry>) =
        by_name(operations).into_iter().partition(|e| e.beside);
    let long = |gap: &Gap| gap.ms > GAP * whole;
    let gaps: Vec<Gap> = gaps(operations)
        .into_iter()
        .take(GAPS)
        .filter(long)
        .collect();
    let between = |gap: &Gap| {
        let after = gap.after.as_deref().unwrap_or("the beginning");
        format!("  between {after} and {}", gap.before)
    };
    let names = entries.iter().chain(&beside).map(|e| e.name.clone());
    let names = names.chain(gaps.iter().map(between));
    let width = names.map(|name| name.chars().count()).max();
    let width = width.unwrap_or(0).max(28);
    let line = |name: &str, calls: &str, ms: f64, rate: &str, of: &str| {
        let share = percent(ms / whole);
        format!("{name:<width$} {calls:>6} {ms:>10.3} {share:>8} {rate:>14} {of:>9}\n")
    };
    let line_of = |entry: &Entry| {
        let rate = entry.work.map_or(String::new(), |work| {
            let (rate, unit) = work.rate(entry.ms);
            format!("{rate:.0} {unit}")
        });
        let of = entry.work.and_then(|work| limits.share(work, entry.ms));
        let of = of.map_or(String::new(), percent);
        line(&entry.name, &entry.calls.to_string(), entry.ms, &rate, &of)
    };
    let mut text = format!(
        "{:<width$} {:>6} {:>10} {:>8} {:>14} {:>9}\n",
        "operation", "calls", "ms", "share", "rate", "of limit"
    );
    text.extend(entries.iter().map(line_of));
    let sum: f64 = entries.iter().map(|entry| entry.ms).sum();
    let calls: usize = entries.iter().map(|entry| entry.calls).sum();
    text += &line("sum of these", &calls.to_string(), sum, "", "");
    text += &line("Burn's own kernels and gaps", "", whole - sum, "", "");
    text.extend(gaps.iter().map(|gap| {
        let calls = gap.calls.to_string();
        line(&between(gap), &calls, gap.ms, "", "")
    }));
    if !beside.is_empty() {
        text += "beside them, from when this rank is ready to when all are done\n";
        text.extend(beside.iter().map(line_of));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_tells_shares_rates_and_the_rest() {
        let timed = |name: &str, ms, work| Timed {
            name: name.into(),
            ms,
            work,
            beside: name == "all_reduce",
            gap: if name == "rope" { 2.0 } else { 0.0 },
        };
        let limits = Limits {
            flops: Some(1000e12),
            bytes_per_s: None,
        };
        // 6 TFLOP in 8 ms: 750 TFLOP/s, three quarters of the limit.
        let gemm = timed("gemm", 4.0, Some(Work::Flops(3e12)));
        let operations = [
            timed("scan", 0.5, None),
            timed("all_reduce", 30.0, None),
            timed("rope", 1.0, Some(Work::Bytes(2e9))),
            gemm.clone(),
            gemm,
        ];
        let text = table(&operations, 20.0, &limits);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let [_, gemm, rope, scan, sum, rest, gap, _, beside] = lines.as_slice() else {
            panic!("{text}")
        };
        let expected = "gemm 2 8.000 40.0 % 750 TFLOP/s 75.0 %";
        assert_eq!(gemm.join(" "), expected);
        assert_eq!(rope.join(" "), "rope 1 1.000 5.0 % 2000 GB/s");
        assert_eq!(scan.join(" "), "scan 1 0.500 2.5 %");
        assert_eq!(sum.join(" "), "sum of these 4 9.500 47.5 %");
        assert_eq!(rest.join(" "), "Burn's own kernels and gaps 10.500 52.5 %");
        assert_eq!(gap.join(" "), "between scan and rope 1 2.000 10.0 %");
        assert_eq!(beside.join(" "), "all_reduce 1 30.000 150.0 %");
    }
}
