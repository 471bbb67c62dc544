//! Training steps on one fixed batch of random tokens.

use std::time::Instant;

use anyhow::{Context, bail, ensure};
use burn::tensor::{Device, Tensor};
use serde_json::{Value, json};
use ttt_data::Row;
use ttt_kernels::clock::{Clock, median};
use ttt_kernels::{ContextSettings, memory};
use ttt_model::{ParamSpec, Unit};
use ttt_parallel::Mesh;
use ttt_train::config::{Config, DeviceKind};
use ttt_train::device;
use ttt_train::init::initial_values;
use ttt_train::optimizer::{Updater, scalar};
use ttt_train::step::{MicroBatch, Model, RopeCache};
use ttt_train::units::UnitState;

use super::run::{Run, gib, join, round};
use crate::gpu::args::Mode;

/// A new model with its optimizer.
pub struct Trainer {
    pub config: Config,
    /// The learning rate of every step.
    pub lr: f64,
    mesh: Mesh,
    model: Model,
    updater: Updater,
    steps_done: u64,
}

impl Trainer {
    pub fn new(run: &Run, seed: u64, device: &Device) -> anyhow::Result<Self> {
        Self::with_config(run.config()?, run.device, seed, device)
    }

    pub fn with_config(
        config: Config,
        kind: DeviceKind,
        seed: u64,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let mesh = Mesh::single();
        let compute = device::compute_dtype(kind, None);
        let units = Unit::all(&config.model).into_iter().map(|unit| {
            let values = |spec: &ParamSpec| anyhow::Ok(initial_values(spec, seed));
            UnitState::new(&config.model, unit, &mesh, device, compute, values)
        });
        let model = Model {
            config: config.model.clone(),
            units: units.collect::<Result<_, _>>()?,
            compute,
            device: device.clone(),
            rope: RopeCache::default(),
            context: ContextSettings::default(),
        };
        let on_bad = config.train.on_bad_gradient;
        let updater = Updater::new(&config.optimizer, on_bad, None, 0.0, device);
        Ok(Self {
            config,
            lr: 3e-4,
            mesh,
            model,
            updater,
            steps_done: 0,
        })
    }

    /// One step; its loss, not yet read from the device.
    pub fn step(&mut self, micro: &MicroBatch) -> anyhow::Result<Tensor<1>> {
        let scale = 1.0 / micro.labelled as f64;
        let activations = self.config.train.activations;
        let pass = self
            .model
            .accumulate(micro, scale, activations, &self.mesh)?;
        let one = scalar(1.0, &self.model.device);
        let units = &mut self.model.units;
        self.updater
            .update(units, one, self.lr, self.steps_done, &self.mesh)?;
        self.steps_done += 1;
        Ok(pass.loss)
    }
}

/// Rows of random tokens.
pub fn random_rows(run: &Run, vocab: usize, seed: u64) -> Vec<Row> {
    let mut state = seed;
    let mut draw = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab as u64) as u32
    };
    (0..run.batch)
        .map(|_| {
            let ids: Vec<u32> = (0..=run.seq).map(|_| draw()).collect();
            Row {
                input_ids: ids[..run.seq].to_vec(),
                labels: ids[1..].to_vec(),
                document_starts: vec![0],
            }
        })
        .collect()
}

/// The line of `run`.
pub fn measure(run: &Run, device: &Device) -> anyhow::Result<Value> {
    let begun = Instant::now();
    let mut trainer = Trainer::new(run, 1, device)?;
    let vocab = trainer.config.model.vocab_size;
    let micro = MicroBatch::new(&random_rows(run, vocab, 1), &Mesh::single(), device)?;
    device.sync().context("the device failed")?;
    let init_s = begun.elapsed().as_secs_f64();

    let first = Instant::now();
    let mut losses = vec![trainer.step(&micro)?];
    device::read_scalar(&losses[0])?;
    let first_step_s = first.elapsed().as_secs_f64();
    for _ in 1..run.warmup {
        losses.push(trainer.step(&micro)?);
    }
    let mut clock = Clock::new(device);
    let failed = |error: String| anyhow::anyhow!("the device failed: {error}");
    clock.mark().map_err(failed)?;
    for _ in 0..run.steps {
        losses.push(trainer.step(&micro)?);
        clock.mark().map_err(failed)?;
    }
    let times = clock.read().map_err(failed)?;
    // Once more, untimed: asking for the memory at every operation takes time.
    let (extra, peak) = memory::peak_of(device, || trainer.step(&micro));
    extra?;

    let losses = losses
        .iter()
        .map(device::read_scalar)
        .collect::<Result<Vec<_>, _>>()?;
    check(&losses, vocab)?;
    let mut line = run.line(&trainer.config, Mode::Train, median(&times));
    let slowest = times.iter().copied().fold(0.0, f64::max);
    let more = json!({
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[losses.len() - 1], 4),
        "loss_hash": hash(&losses),
        "ms_slowest": round(slowest, 3),
        "init_s": round(init_s, 2),
        "first_step_s": round(first_step_s, 2),
        "peak_mem_gib": peak.map(gib),
    });
    join(&mut line, more);
    Ok(line)
}

/// Sixteen digits that two runs have in common only if all their losses are the same to the last bit.
fn hash(losses: &[f64]) -> String {
    // FNV-1a.
    let bytes = losses.iter().flat_map(|loss| loss.to_bits().to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// The loss begins near ln V and falls, or what was timed was not training.
fn check(losses: &[f64], vocab: usize) -> anyhow::Result<()> {
    if let Some(bad) = losses.iter().position(|loss| !loss.is_finite()) {
        bail!("the loss of step {bad} is {}", losses[bad]);
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    let expected = (vocab as f64).ln();
    // Random logits of deviation s add s²/2; with initial matrices of 0.02 they stay well below 1.
    ensure!(
        (first - expected).abs() < 1.0,
        "the loss begins at {first}, expected is about ln {vocab} = {expected:.3}"
    );
    ensure!(last < first, "the loss did not fall: {first} to {last}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_changes_the_hash() {
        let losses = [1.5, 2.5];
        assert_eq!(hash(&losses), hash(&[1.5, 2.5]));
        assert_ne!(hash(&losses), hash(&[1.5, 2.5f64.next_up()]));
        assert_ne!(hash(&losses), hash(&[2.5, 1.5]));
    }

    #[test]
    fn a_course_that_is_no_training_is_told() {
        let ln = 512f64.ln();
        assert!(check(&[ln + 0.1, ln], 512).is_ok());
        for (losses, part) in [
            (vec![ln, f64::NAN], "step 1 is NaN"),
            (vec![0.0, 0.0], "begins at 0"),
            (vec![ln, ln], "did not fall"),
        ] {
            let error = check(&losses, 512).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
