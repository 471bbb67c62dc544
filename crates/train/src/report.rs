//! What a run tells, one step behind the device.

use std::collections::BTreeMap;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use ttt_parallel::{Activity, Declared};

use crate::config::{DeviceKind, OnBadGradient};
use crate::device::read_scalar;
use crate::error::TrainError;
use crate::metrics::{self, EvalMetrics, MetricsWriter, StepMetrics};
use crate::optimizer::UpdateOutput;
use crate::plan::Plan;
use crate::progress::Progress;

/// A step whose results are still on their way from the device.
pub(crate) struct Launched {
    pub step: u64,
    pub tokens: u64,
    pub tokens_per_step: u64,
    pub lr: f64,
    pub loss: Tensor<1>,
    pub update: UpdateOutput,
    pub state_ratios: BTreeMap<usize, Tensor<1>>,
    /// Bytes that this rank sent; `None` on one rank.
    pub sent: Option<u64>,
}

/// Tells how the run goes, one step behind the device so that it never waits.
pub(crate) struct Report {
    /// Rank 0's.
    pub metrics: Option<MetricsWriter>,
    pub progress: Progress,
    pub plan: Plan,
    pub peak_flops: Option<f64>,
    pub kind: DeviceKind,
    pub device: Device,
    pub on_bad: OnBadGradient,
    pub log_every: u64,
    pub begun: Instant,
    pub pace: Pace,
    /// What this rank's main thread says of itself.
    pub activity: Activity,
    pub waiting: Option<Launched>,
}

/// How long steps take. The device works in order, so reading the results of one step waits for
/// every step launched by then: the time between two reads is that of the steps launched between.
pub(crate) struct Pace {
    last_read: Instant,
    launched: u32,
    step_seconds: f64,
}

impl Pace {
    pub fn new() -> Self {
        Self {
            last_read: Instant::now(),
            launched: 0,
            step_seconds: f64::NAN,
        }
    }

    /// Seconds per step, after a read; where nothing was launched since the last, as before.
    fn read(&mut self) -> f64 {
        if self.launched > 0 {
            let seconds = self.last_read.elapsed().as_secs_f64();
            self.step_seconds = seconds / f64::from(self.launched);
        }
        self.restart();
        self.step_seconds
    }

    /// What was done since the last read is no step's time.
    pub fn restart(&mut self) {
        self.last_read = Instant::now();
        self.launched = 0;
    }
}

impl Report {
    /// Tells the step before; this one is on its way.
    pub fn step(&mut self, launched: Launched) -> Result<(), TrainError> {
        self.pace.launched += 1;
        let before = self.waiting.replace(launched);
        before.map_or(Ok(()), |launched| self.read(launched))
    }

    /// Waits for the last step.
    pub fn flush(&mut self) -> Result<(), TrainError> {
        let last = self.waiting.take();
        last.map_or(Ok(()), |launched| self.read(launched))
    }

    fn read(&mut self, launched: Launched) -> Result<(), TrainError> {
        let step = launched.step;
        self.activity.at(format_args!("the results of step {step}"));
        let loss = read_scalar(&launched.loss)?;
        let grad_norm = read_scalar(&launched.update.grad_norm)?;
        let applied = read_scalar(&launched.update.applied)? != 0.0;
        let mut ttt_state_ratio = BTreeMap::new();
        for (layer, ratio) in &launched.state_ratios {
            ttt_state_ratio.insert(*layer, read_scalar(ratio)?);
        }
        let seconds = self.pace.read();
        let tokens_per_s = launched.tokens_per_step as f64 / seconds;
        let flops = &self.plan.flops;
        let share = |flops: f64| self.peak_flops.map(|peak| tokens_per_s * flops / peak);
        let metrics = StepMetrics {
            step: launched.step,
            tokens: launched.tokens,
            loss,
            lr: launched.lr,
            grad_norm,
            tokens_per_s,
            mfu: share(flops.training()),
            mfu_with_ttt: share(flops.training_with_ttt()),
            skipped: !applied,
            ttt_state_ratio,
            sent_bytes: launched.sent,
            memory_gib: metrics::memory_gib(self.kind, &self.device),
            elapsed_s: self.begun.elapsed().as_secs_f64(),
        };
        let files = self.activity.long("telling a step");
        if let Some(lines) = &mut self.metrics
            && (launched.step.is_multiple_of(self.log_every) || !applied)
        {
            lines.step(&metrics)?;
        }
        drop(files);
        let _telling = self.telling();
        self.progress.step(&metrics);
        if !applied && self.on_bad == OnBadGradient::Abort {
            return Err(TrainError::BadGradient {
                step: launched.step,
                grad_norm,
            });
        }
        Ok(())
    }

    /// The others write files; the terminal of the rank that speaks may be held.
    fn telling(&self) -> Declared {
        match self.metrics {
            Some(_) => self.activity.endless("telling how it goes"),
            None => self.activity.long("telling how it goes"),
        }
    }

    /// Tells something else.
    pub fn note(&self, text: &str) {
        let _telling = self.telling();
        self.progress.note(text);
    }

    /// Tells what an evaluation found.
    pub fn evaluation(&mut self, step: u64, loss: f64, tokens: u64) -> Result<(), TrainError> {
        if let Some(lines) = &mut self.metrics {
            lines.evaluation(&EvalMetrics {
                step,
                validation_loss: loss,
                tokens,
            })?;
        }
        self.note(&format!(
            "step {step}: validation loss {loss:.4} over {tokens} tokens"
        ));
        self.pace.restart();
        Ok(())
    }
}
