//! The learning rate as a function of the step.

use crate::config::{OptimizerConfig, ScheduleKind};

/// The learning rate of `step` (counted from 0) in a run of `steps`.
///
/// Linear warm-up to `lr` over the first `warmup_steps` steps, then, down to `min_lr_ratio · lr`
/// at the last step: a cosine; or (`wsd`) constant with a linear decay over the last
/// `decay_fraction` of the run; or constant.
pub fn learning_rate(config: &OptimizerConfig, step: u64, steps: u64) -> f64 {
    let (step, steps) = (step as f64, steps as f64);
    let warmup = config.warmup_steps as f64;
    if step < warmup {
        return config.lr * (step + 1.0) / warmup;
    }
    let from_peak = match config.schedule {
        ScheduleKind::Constant => 0.0,
        ScheduleKind::Cosine => {
            let done = (step - warmup) / (steps - 1.0 - warmup).max(1.0);
            0.5 * (1.0 - (std::f64::consts::PI * done.clamp(0.0, 1.0)).cos())
        }
        ScheduleKind::Wsd => {
            let decay = (config.decay_fraction * steps).max(1.0);
            ((step + 1.0 - (steps - decay)) / decay).clamp(0.0, 1.0)
        }
    };
    config.lr * (1.0 - (1.0 - config.min_lr_ratio) * from_peak)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(schedule: ScheduleKind) -> OptimizerConfig {
        OptimizerConfig {
            lr: 1.0,
            min_lr_ratio: 0.1,
            warmup_steps: 10,
            schedule,
            decay_fraction: 0.2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            grad_clip: 1.0,
            overrides: vec![],
        }
    }

    #[test]
    fn schedules_rise_and_end_where_they_should() {
        for (schedule, middle, end) in [
            (ScheduleKind::Cosine, 0.55, 0.1),
            (ScheduleKind::Wsd, 1.0, 0.1),
            (ScheduleKind::Constant, 1.0, 1.0),
        ] {
            let at = |step| learning_rate(&config(schedule), step, 101);
            assert!((at(0) - 0.1).abs() < 1e-12, "{schedule:?} starts small");
            assert!((at(10) - 1.0).abs() < 1e-12, "{schedule:?} peaks");
            assert!((at(55) - middle).abs() < 1e-9, "{schedule:?}: {}", at(55));
            assert!((at(100) - end).abs() < 1e-9, "{schedule:?}: {}", at(100));
        }
    }
}
