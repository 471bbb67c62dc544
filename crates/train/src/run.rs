//! The training program, from top to bottom.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use ttt_kernels::ContextSettings;
use ttt_model::Unit;
use ttt_model::decode::Decoder;
use ttt_parallel::Mesh;

use crate::checkpoint::{self, Checkpoint};
use crate::config::{Config, DeviceKind, OnBadGradient};
use crate::data::Data;
use crate::device::{self, read_scalar};
use crate::error::TrainError;
use crate::evaluate::evaluate;
use crate::generate::{Sampling, continue_text};
use crate::init::initial_values;
use crate::metrics::{self, EvalMetrics, MetricsWriter, StepMetrics};
use crate::optimizer::{UpdateOutput, Updater, scalar};
use crate::plan::Plan;
use crate::progress::Progress;
use crate::schedule::learning_rate;
use crate::signals::Signals;
use crate::start::{BaseModel, read_small_files};
use crate::step::{MicroBatch, Model, RopeCache};
use crate::units::UnitState;

/// Where a run begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At the run's newest checkpoint, if it has one.
    Auto,
    /// At this checkpoint.
    From(PathBuf),
    /// At step 0, in a folder without checkpoints.
    Never,
}

/// Trains the model that `config` describes until `train.steps`, or a signal.
///
/// # Errors
/// With a sentence that says what was wrong and what to do.
pub fn train(config: &Config, resume: &Resume) -> Result<(), TrainError> {
    // ---- where and with whom -----------------------------------------------------------------
    let signals = Signals::install().map_err(TrainError::io("listen for", "signals".as_ref()))?;
    let mesh = Mesh::single();
    let device = device::open(config.run.device)?;
    let compute = device::compute_dtype(config.run.device, config.train.compute);
    ttt_kernels::deterministic::set(config.train.deterministic);
    let run_dir = &config.run.dir;
    std::fs::create_dir_all(run_dir).map_err(TrainError::io("create", run_dir))?;

    // ---- the model to continue, if one is named and the run is new --------------------------------
    let new = match resume {
        Resume::Auto => checkpoint::list(run_dir)?.is_empty(),
        Resume::From(_) => false,
        Resume::Never => true,
    };
    let mut recorded = config.clone();
    let base = match new {
        true => BaseModel::open(&mut recorded)?,
        false => None,
    };
    if !new {
        // A checkpoint holds all of its model; the folder may be gone.
        recorded.init = None;
    }

    // ---- data ----------------------------------------------------------------------------------
    let data = Data::prepare(&recorded)?;
    let fingerprint = data.sampler.fingerprint();

    // ---- model, new or where it was left --------------------------------------------------------
    let plan = Plan::new(config);
    println!("{plan}");
    let start = find_start(config, resume, &fingerprint, &mesh, &device)?;
    let units = match (&start, &base) {
        (Some(checkpoint), _) => checkpoint.load(&config.model, &mesh, &device)?,
        (None, Some(base)) => base.units(&recorded, &mesh, &device)?,
        (None, None) => new_units(config, &mesh, &device),
    };
    if let Some(checkpoint) = &start {
        recorded.init.clone_from(&checkpoint.config.init);
    }
    let tokenizer_files = tokenizer_files(&data, &start, &base)?;
    let mut at = match &start {
        Some(checkpoint) => checkpoint.progress.clone(),
        None => checkpoint::Progress {
            step: 0,
            tokens: 0,
            mean_grad_norm: 0.0,
            data_fingerprint: fingerprint,
        },
    };
    let mut model = Model {
        config: config.model.clone(),
        units,
        compute,
        device: device.clone(),
        rope: RopeCache::default(),
        context: ContextSettings::default(),
    };
    let mut updater = Updater::new(
        &config.optimizer,
        config.train.on_bad_gradient,
        config.train.spike_factor,
        compute,
        at.mean_grad_norm,
        &device,
    );

    // ---- what is told ------------------------------------------------------------------------
    let mut report = Report {
        metrics: MetricsWriter::open(run_dir, at.step)?,
        progress: Progress::new(config.train.steps, at.step),
        peak_flops: metrics::peak_flops(config.run.device),
        plan,
        device: config.run.device,
        on_bad: config.train.on_bad_gradient,
        log_every: config.train.log_every,
        begun: Instant::now(),
        pace: Pace::new(),
        waiting: None,
    };
    if let Some(checkpoint) = &start {
        let path = checkpoint.path().display();
        report
            .progress
            .note(&format!("resumed from {path} at step {}", at.step));
    }
    if let Some(base) = &base {
        for note in &base.notes {
            report.progress.note(note);
        }
        let own = |files: &[(String, Vec<u8>)]| {
            let file = files.iter().find(|(name, _)| name == TOKENIZER);
            file.map(|(_, bytes)| bytes.clone())
        };
        let models = own(&base.small_files()?);
        if models.is_some() && models != own(&tokenizer_files) {
            let note = "the text is tokenized by another tokenizer than the one of [init]";
            report.progress.note(note);
        }
        let row = data.sampler.row(0)?;
        let exact = config.run.device == DeviceKind::Cpu;
        if base.check_unchanged(&mut model, &row, &mesh, exact)? {
            let note = "the new TTT layers change no logit: step 0 is the base model's";
            report.progress.note(note);
        }
    }
    // A step is saved once: a signal may arrive where a checkpoint was due anyway.
    let here = |checkpoint: &&Checkpoint| checkpoint.path().starts_with(run_dir);
    let resumed = start.as_ref().filter(here);
    let mut saved = resumed.map(|checkpoint| checkpoint.progress.step);
    let mut save = |model: &Model, updater: &Updater, at: &mut checkpoint::Progress| {
        if saved.replace(at.step) == Some(at.step) {
            return Ok(checkpoint::path_of(run_dir, at.step));
        }
        at.mean_grad_norm = read_scalar(&updater.mean_norm)? as f32;
        checkpoint::save(&recorded, &model.units, at, &tokenizer_files, &mesh)
    };

    // ---- steps ---------------------------------------------------------------------------------
    let mut loader = data.loader(at.step, &mesh)?;
    let steps = config.train.steps;
    let tokens_per_step = config.train.batch_tokens as u64;
    let nominal = 1.0 / config.train.batch_tokens as f64;
    while at.step < steps {
        let step = at.step;

        // Forward and backward, a few rows at a time. The gradient is that of the loss summed over
        // all ranks' labelled tokens, scaled by a nominal token count until the true one is known.
        let rows = loader.next_batch()?.rows;
        let mut loss = scalar(0.0, &device);
        let mut labelled = 0;
        let mut state_ratios: BTreeMap<usize, Tensor<1>> = BTreeMap::new();
        for rows in rows.chunks(config.train.micro_batch_rows) {
            if let Some(signal) = signals.received() {
                // The gradient in progress is dropped: the checkpoint is the state before this step.
                report.flush()?;
                let path = save(&model, &updater, &mut at)?;
                report
                    .progress
                    .note(&format!("{signal}: saved {}", path.display()));
                report.progress.finish();
                return Ok(());
            }
            let micro = MicroBatch::new(rows, &mesh, &device)?;
            let pass = model.accumulate(&micro, nominal, config.train.activations, &mesh)?;
            loss = loss + pass.loss;
            labelled += micro.labelled;
            for (layer, ratio) in pass.state_ratios {
                let seen = state_ratios.remove(&layer);
                let larger = seen.map_or(ratio.clone(), |seen| seen.max_pair(ratio));
                state_ratios.insert(layer, larger);
            }
        }

        // Update.
        let labelled = mesh.all_reduce_sum(scalar(labelled as f64 * nominal, &device))?;
        let normalizer = labelled.recip();
        let loss = mesh.all_reduce_sum(loss)? * normalizer.clone();
        let lr = learning_rate(&config.optimizer, step, steps);
        let update = updater.update(&mut model.units, normalizer, lr, step, &mesh)?;
        at.step += 1;
        at.tokens += tokens_per_step;

        // Report the step before, which the device has finished by now.
        report.step(Launched {
            step,
            tokens: at.tokens,
            tokens_per_step,
            lr,
            loss,
            update,
            state_ratios,
        })?;

        // Evaluate and save.
        let last = at.step == steps;
        if let Some(validation) = &data.validation
            && (last || at.step.is_multiple_of(config.eval.every))
        {
            report.flush()?;
            let length = config.train.sequence_length;
            let (rows, at_once) = (config.eval.rows, config.train.micro_batch_rows);
            let result = evaluate(&mut model, validation, length, rows, at_once, &mesh)?;
            report.evaluation(at.step, result.loss, result.tokens)?;
        }
        let due = config.checkpoint.every > 0 && at.step.is_multiple_of(config.checkpoint.every);
        if due || (last && config.checkpoint.at_end) {
            report.flush()?;
            let path = save(&model, &updater, &mut at)?;
            report.progress.note(&format!("saved {}", path.display()));
            report.pace.restart();
        }
    }
    report.flush()?;

    // ---- a sample -------------------------------------------------------------------------------
    if let Some(prompt) = &config.eval.sample_prompt {
        let units = Unit::all(&config.model)
            .into_iter()
            .map(|unit| model.params(unit, &mesh));
        let units = units.collect::<Result<Vec<_>, _>>()?;
        let decoder = Decoder::new(&config.model, units, compute, &device);
        let sampling = Sampling {
            temperature: 0.8,
            top_k: None,
            top_p: Some(0.95),
            seed: config.run.seed,
        };
        let tokens = config.eval.sample_tokens;
        let text = continue_text(&decoder, &data.tokenizer, prompt, tokens, sampling)?;
        report.progress.note(&format!("sample: {prompt}{text}"));
    }
    report.progress.finish();
    Ok(())
}

/// The checkpoint to begin at; `None` begins anew.
fn find_start(
    config: &Config,
    resume: &Resume,
    fingerprint: &str,
    mesh: &Mesh,
    device: &Device,
) -> Result<Option<Checkpoint>, TrainError> {
    let run_dir = &config.run.dir;
    let found = match resume {
        Resume::Auto => Checkpoint::newest_together(run_dir, mesh, device)?,
        Resume::From(path) => Some(Checkpoint::open_together(path, mesh, device)?),
        Resume::Never => {
            if let Some(path) = checkpoint::list(run_dir)?.last() {
                return Err(TrainError::checkpoint(
                    path,
                    "is in the way of a new run: use --resume auto, name another run.dir, or remove it",
                ));
            }
            None
        }
    };
    if let Some(checkpoint) = &found {
        checkpoint.check(config, fingerprint)?;
        let begin = checkpoint::path_of(run_dir, checkpoint.progress.step);
        if let Some(newer) = checkpoint::list(run_dir)?
            .into_iter()
            .find(|path| *path > begin)
        {
            return Err(TrainError::checkpoint(
                &newer,
                "is newer than the one to resume from: use --resume auto, name another run.dir, or remove it",
            ));
        }
    }
    Ok(found)
}

const TOKENIZER: &str = "tokenizer.json";

/// What a checkpoint keeps of the tokenizer: the shards' own, and the other files that came with it
/// where the run began.
fn tokenizer_files(
    data: &Data,
    start: &Option<Checkpoint>,
    base: &Option<BaseModel>,
) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
    let path = &data.tokenizer_path;
    let own = std::fs::read(path).map_err(TrainError::io("read", path))?;
    let files = match (start, base) {
        (Some(checkpoint), _) => read_small_files(checkpoint.path())?,
        (None, Some(base)) => base.small_files()?,
        (None, None) => vec![],
    };
    // Another tokenizer's settings and chat template do not fit this one.
    match files
        .iter()
        .any(|(name, bytes)| name == TOKENIZER && *bytes == own)
    {
        true => Ok(files),
        false => Ok(vec![(TOKENIZER.into(), own)]),
    }
}

/// Initial weights of every unit.
fn new_units(config: &Config, mesh: &Mesh, device: &Device) -> Vec<UnitState> {
    let units = Unit::all(&config.model).into_iter();
    units
        .map(|unit| {
            let values = |spec: &ttt_model::ParamSpec| {
                Ok::<_, Infallible>(initial_values(spec, config.run.seed))
            };
            match UnitState::new(&config.model, unit, mesh, device, values) {
                Ok(state) => state,
                Err(never) => match never {},
            }
        })
        .collect()
}

/// A step whose results are still on their way from the device.
struct Launched {
    step: u64,
    tokens: u64,
    tokens_per_step: u64,
    lr: f64,
    loss: Tensor<1>,
    update: UpdateOutput,
    state_ratios: BTreeMap<usize, Tensor<1>>,
}

/// Tells how the run goes, one step behind the device so that it never waits.
struct Report {
    metrics: MetricsWriter,
    progress: Progress,
    plan: Plan,
    peak_flops: Option<f64>,
    device: DeviceKind,
    on_bad: OnBadGradient,
    log_every: u64,
    begun: Instant,
    pace: Pace,
    waiting: Option<Launched>,
}

/// How long steps take. The device works in order, so reading the results of one step waits for
/// every step launched by then: the time between two reads is that of the steps launched between.
struct Pace {
    last_read: Instant,
    launched: u32,
    step_seconds: f64,
}

impl Pace {
    fn new() -> Self {
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
    fn restart(&mut self) {
        self.last_read = Instant::now();
        self.launched = 0;
    }
}

impl Report {
    fn step(&mut self, launched: Launched) -> Result<(), TrainError> {
        self.pace.launched += 1;
        let before = self.waiting.replace(launched);
        before.map_or(Ok(()), |launched| self.read(launched))
    }

    /// Waits for the last step.
    fn flush(&mut self) -> Result<(), TrainError> {
        let last = self.waiting.take();
        last.map_or(Ok(()), |launched| self.read(launched))
    }

    fn read(&mut self, launched: Launched) -> Result<(), TrainError> {
        let loss = read_scalar(&launched.loss)?;
        let grad_norm = read_scalar(&launched.update.grad_norm)?;
        let applied = read_scalar(&launched.update.applied)? != 0.0;
        let mut ttt_state_ratio = BTreeMap::new();
        for (layer, ratio) in &launched.state_ratios {
            ttt_state_ratio.insert(*layer, read_scalar(ratio)?);
        }
        let tokens_per_s = launched.tokens_per_step as f64 / self.pace.read();
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
            memory_gib: metrics::memory_gib(self.device),
            elapsed_s: self.begun.elapsed().as_secs_f64(),
        };
        if launched.step.is_multiple_of(self.log_every) || !applied {
            self.metrics.step(&metrics)?;
        }
        self.progress.step(&metrics);
        if !applied && self.on_bad == OnBadGradient::Abort {
            return Err(TrainError::BadGradient {
                step: launched.step,
                grad_norm,
            });
        }
        Ok(())
    }

    fn evaluation(&mut self, step: u64, loss: f64, tokens: u64) -> Result<(), TrainError> {
        self.metrics.evaluation(&EvalMetrics {
            step,
            validation_loss: loss,
            tokens,
        })?;
        self.progress.note(&format!(
            "step {step}: validation loss {loss:.4} over {tokens} tokens"
        ));
        self.pace.restart();
        Ok(())
    }
}
