//! `metrics.jsonl`: one line per logged step and per evaluation, for programs to read.
//!
//! A resumed run first cuts off what an earlier life wrote beyond the step it resumes at, so that
//! the file looks as if the run had never been interrupted. Numbers are written in the shortest form
//! that an exact reader (Python's, Rust's `str::parse`) takes back to the same bits; what is not
//! finite is `null`, since JSON has no word for it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde::{Deserialize, Deserializer, Serialize};

use crate::config::DeviceKind;
use crate::error::TrainError;
use crate::human::gib;

/// The file's name in the run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// A training step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step, from 0.
    pub step: u64,
    /// Tokens trained on so far, this step's included.
    pub tokens: u64,
    /// Mean loss over the step's tokens, nats.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global norm of the gradients before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Tokens per second over this step.
    #[serde(deserialize_with = "null_is_nan")]
    pub tokens_per_s: f64,
    /// Share of the device's peak used, the fast updates not counted; `None` where the peak is
    /// not known.
    pub mfu: Option<f64>,
    /// The same with the fast updates' arithmetic counted.
    pub mfu_with_ttt: Option<f64>,
    /// Whether the update was left out because of a bad gradient.
    pub skipped: bool,
    /// ‖η S‖_F / ‖W_0‖_F by TTT layer.
    #[serde(deserialize_with = "nulls_are_nan")]
    pub ttt_state_ratio: BTreeMap<usize, f64>,
    /// Bytes that rank 0 sent to others in this step, counted; absent on one rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// Most memory held so far by the process (CPU), or reserved on the device (CUDA), GiB.
    pub memory_gib: Option<f64>,
    /// Seconds since this process began to train.
    pub elapsed_s: f64,
}

/// An evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Steps trained before it.
    pub step: u64,
    /// Mean loss over the validation tokens, nats.
    #[serde(deserialize_with = "null_is_nan")]
    pub validation_loss: f64,
    /// Tokens that were evaluated.
    pub tokens: u64,
}

fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn nulls_are_nan<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<usize, f64>, D::Error> {
    let ratios: BTreeMap<usize, Option<f64>> = BTreeMap::deserialize(deserializer)?;
    let ratios = ratios.into_iter();
    Ok(ratios
        .map(|(layer, ratio)| (layer, ratio.unwrap_or(f64::NAN)))
        .collect())
}

/// A line of the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// With `loss`.
    Step(StepMetrics),
    /// With `validation_loss`.
    Eval(EvalMetrics),
}

/// Appends to `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// The file in `run_dir`, which exists, for a run that has done `steps` steps: later lines are
    /// cut off, and so is a last line that was torn by a crash.
    ///
    /// # Errors
    /// If the file cannot be read or written, or holds something else.
    pub fn open(run_dir: &Path, steps: u64) -> Result<Self, TrainError> {
        let path = run_dir.join(METRICS_FILE);
        if path.exists() {
            cut(&path, steps).map_err(TrainError::io("cut to the resumed step", &path))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(TrainError::io("open", &path))?;
        Ok(Self { path, file })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// If the line cannot be written.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<(), TrainError> {
        self.line(metrics)
    }

    /// Adds an evaluation.
    ///
    /// # Errors
    /// If the line cannot be written.
    pub fn evaluation(&mut self, metrics: &EvalMetrics) -> Result<(), TrainError> {
        self.line(metrics)
    }

    /// One write per line, so that a reader, or a crash, sees whole lines.
    fn line(&mut self, metrics: &impl Serialize) -> Result<(), TrainError> {
        let write = |file: &mut File| {
            let mut line = serde_json::to_vec(metrics)?;
            line.push(b'\n');
            file.write_all(&line)?;
            file.flush()
        };
        write(&mut self.file).map_err(TrainError::io("write", &self.path))
    }
}

/// Reads a metrics file. `serde_json` may miss the last bit of a number; compare lines as text
/// where bits count.
///
/// # Errors
/// If it cannot be read, or a line is no metrics line.
pub fn read(path: &Path) -> Result<Vec<Line>, TrainError> {
    let text = fs::read_to_string(path).map_err(TrainError::io("read", path))?;
    let lines = text.lines().enumerate().map(|(i, line)| parse(i, line));
    let lines: io::Result<Vec<Line>> = lines.collect();
    lines.map_err(TrainError::io("read", path))
}

fn parse(index: usize, line: &str) -> io::Result<Line> {
    // Not serde's untagged: it does not turn the keys of `ttt_state_ratio` back into numbers.
    let parsed = match line.contains("\"validation_loss\":") {
        true => serde_json::from_str(line).map(Line::Eval),
        false => serde_json::from_str(line).map(Line::Step),
    };
    parsed.map_err(|_| {
        let number = index + 1;
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("line {number} is no line of metrics"),
        )
    })
}

/// Rewrites the file without the lines of a run beyond `steps` steps: aside, flushed, renamed.
fn cut(path: &Path, steps: u64) -> io::Result<()> {
    let mut reader = BufReader::new(File::open(path)?);
    let aside = path.with_extension("jsonl.new");
    let mut kept = BufWriter::new(File::create(&aside)?);
    let (mut line, mut index, mut dropped) = (String::new(), 0, false);
    while reader.read_line(&mut line)? > 0 {
        let inside = match line.ends_with('\n') {
            // Steps count from 0; an evaluation after the last step done belongs to it.
            true => match parse(index, line.trim_end())? {
                Line::Step(metrics) => metrics.step < steps,
                Line::Eval(metrics) => metrics.step <= steps && steps > 0,
            },
            false => false,
        };
        if inside {
            kept.write_all(line.as_bytes())?;
        }
        dropped |= !inside;
        index += 1;
        line.clear();
    }
    if !dropped {
        return fs::remove_file(&aside);
    }
    kept.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()?;
    fs::rename(&aside, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// In GiB, the most host memory this process has held (CPU), or what it has reserved on the GPU,
/// which in practice does not shrink (CUDA). `None` where the system does not tell.
pub fn memory_gib(kind: DeviceKind, device: &Device) -> Option<f64> {
    match kind {
        DeviceKind::Cpu => host_memory_gib(),
        DeviceKind::Cuda => {
            let usage = device.memory_pool_usage()?;
            Some(gib(usage.bytes_reserved as f64))
        }
    }
}

/// VmHWM of this process, Linux's high-water mark of resident memory.
fn host_memory_gib() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(gib(kib * 1024.0))
}

/// Dense bf16 peak in FLOP/s by a part of the GPU's name, the first match counts. From NVIDIA's
/// data sheets: without sparsity, with f32 accumulation, where no form is named the SXM one.
const PEAKS: [(&str, f64); 16] = [
    ("B200", 2.25e15),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
];

/// Dense bf16 peak of a GPU of this name in FLOP/s, `None` if it is not in the table.
pub fn peak_flops_of(name: &str) -> Option<f64> {
    let words = |text: &str| format!(" {} ", text.replace(['-', '_'], " "));
    let name = words(name);
    // Whole words, so that L4 is not found in L40 nor A40 in A4000.
    let peak = PEAKS.iter().find(|(part, _)| name.contains(&words(part)));
    peak.map(|(_, peak)| *peak)
}

/// Dense bf16 peak of the device a run computes on, the base of MFU; `None` on a CPU and on a GPU
/// that is not in the table.
pub fn peak_flops(device: DeviceKind) -> Option<f64> {
    match device {
        DeviceKind::Cpu => None,
        DeviceKind::Cuda => peak_flops_of(&gpu_name()?),
    }
}

/// The first GPU's name: from the driver's files, else from its tool.
fn gpu_name() -> Option<String> {
    let from_driver = || {
        let folder = fs::read_dir("/proc/driver/nvidia/gpus").ok()?;
        let file = folder.flatten().next()?.path().join("information");
        let text = fs::read_to_string(file).ok()?;
        let model = text.lines().find_map(|line| line.strip_prefix("Model:"))?;
        Some(model.trim().to_string()).filter(|name| peak_flops_of(name).is_some())
    };
    let from_tool = || {
        let output = std::process::Command::new("nvidia-smi")
            .args(["--query-gpu=name", "--format=csv,noheader"])
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        text.lines().next().map(str::to_string)
    };
    from_driver().or_else(from_tool)
}
