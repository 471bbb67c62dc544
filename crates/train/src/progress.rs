//! How the run goes, for people: a live line on a terminal, a log line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::human;
use crate::metrics::StepMetrics;

/// Time between log lines where there is no terminal.
const QUIET: Duration = Duration::from_secs(10);

/// Weight of the newest step in the time per step that the remaining time is told from.
const FOLLOW: f64 = 0.1;

/// The live line, while there is one.
static LIVE: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Runs `print` with the live line out of the way: everything else that writes to the terminal
/// while a run goes on belongs in here.
pub fn above_live_line<T>(print: impl FnOnce() -> T) -> T {
    let bar = LIVE.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match bar {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// Tells how a run goes.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    steps: u64,
    step_s: Option<f64>,
    last_elapsed_s: f64,
    last_log: Option<Instant>,
}

impl Progress {
    /// For a run of `steps` steps, of which `done` are done. A rank that does not speak has no live
    /// line: its notes are log lines.
    pub fn new(steps: u64, done: u64, speaks: bool) -> Self {
        let bar = (speaks && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {wide_msg}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(steps)
                .with_style(style)
                .with_position(done)
        });
        *LIVE.lock().unwrap_or_else(PoisonError::into_inner) = bar.clone();
        Self {
            bar,
            steps,
            step_s: None,
            last_elapsed_s: 0.0,
            last_log: None,
        }
    }

    /// A step is done.
    pub fn step(&mut self, metrics: &StepMetrics) {
        let took = (metrics.elapsed_s - self.last_elapsed_s).max(0.0);
        self.last_elapsed_s = metrics.elapsed_s;
        let step_s = self
            .step_s
            .map_or(took, |mean| mean + FOLLOW * (took - mean));
        self.step_s = Some(step_s);
        let done = metrics.step + 1;
        let remaining = self.steps.saturating_sub(done) as f64 * step_s;
        let text = describe(metrics, Duration::try_from_secs_f64(remaining).ok());
        match &self.bar {
            Some(bar) => {
                bar.set_message(text);
                bar.set_position(done);
            }
            None => {
                let due = self.last_log.is_none_or(|last| last.elapsed() >= QUIET);
                if due || done == self.steps || metrics.skipped {
                    tracing::info!("step {done}/{}: {text}", self.steps);
                    self.last_log = Some(Instant::now());
                }
            }
        }
    }

    /// Says something once.
    pub fn note(&self, text: &str) {
        match &self.bar {
            // Not ProgressBar::println: it draws only as often as the bar may.
            Some(bar) => bar.suspend(|| {
                let _ = writeln!(std::io::stderr(), "{text}"); // nobody to tell if stderr is gone
            }),
            None => tracing::info!("{text}"),
        }
    }

    /// Leaves the line as it is.
    pub fn finish(&self) {
        if let Some(bar) = self.bar.as_ref().filter(|bar| !bar.is_finished()) {
            bar.abandon();
        }
        *LIVE.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn describe(metrics: &StepMetrics, remaining: Option<Duration>) -> String {
    let mut text = format!("loss {:.4}", metrics.loss);
    text += &format!("  grad {:.3}", metrics.grad_norm);
    text += &format!("  {} tok/s", human::count(metrics.tokens_per_s));
    if let Some(mfu) = metrics.mfu {
        text += &format!("  MFU {:.1}%", 100.0 * mfu);
    }
    if let Some(memory) = metrics.memory_gib {
        text += &format!("  {memory:.1} GiB");
    }
    if let Some(remaining) = remaining {
        text += &format!("  ETA {}", human::duration(remaining));
    }
    if metrics.skipped {
        text += "  update skipped: bad gradient";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_known() {
        let metrics = StepMetrics {
            step: 4,
            tokens: 5120,
            loss: 3.21416,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens_per_s: 12_345.0,
            mfu: Some(0.4213),
            mfu_with_ttt: None,
            skipped: true,
            ttt_state_ratio: Default::default(),
            sent_bytes: None,
            memory_gib: Some(1.25),
            elapsed_s: 10.0,
        };
        let text = describe(&metrics, Some(Duration::from_secs(90)));
        assert_eq!(
            text,
            "loss 3.2142  grad 0.500  12.3 k tok/s  MFU 42.1%  1.2 GiB  ETA 1m30s  update skipped: bad gradient"
        );
        let bare = StepMetrics {
            mfu: None,
            memory_gib: None,
            skipped: false,
            ..metrics
        };
        assert_eq!(
            describe(&bare, None),
            "loss 3.2142  grad 0.500  12.3 k tok/s"
        );
    }
}
