//! The training program, from top to bottom.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::{DType, Device, Tensor};
use ttt_model::decode::Decoder;
use ttt_model::{ParamSpec, Unit};
use ttt_parallel::{Mesh, Place};

use crate::agree::together;
use crate::checkpoint::{self, Checkpoint};
use crate::config::{Config, DeviceKind};
use crate::data::Data;
use crate::device::{self, read_scalar};
use crate::error::TrainError;
use crate::evaluate::evaluate;
use crate::generate::{Sampling, continue_text};
use crate::init::draw;
use crate::metrics::{self, MetricsWriter};
use crate::optimizer::{Updater, scalar};
use crate::plan::Plan;
use crate::profile::ProfiledStep;
use crate::progress::Progress;
use crate::ranks::Ranks;
use crate::rehearsal::Rehearsal;
use crate::report::{Launched, Pace, Report};
use crate::schedule::learning_rate;
use crate::sent::{self, Comparison};
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

/// Trains the model that `config` describes until `train.steps`, or a signal, as the rank at `place`.
///
/// # Errors
/// With a sentence that says what was wrong and what to do.
pub fn train(config: &Config, resume: &Resume, place: &Place) -> Result<(), TrainError> {
    let signals = Signals::install().map_err(TrainError::io("listen for", "signals".as_ref()))?;
    let mut ranks = Ranks::meet(place, config, &format!("{resume:?}"))?;
    let done = train_on(config, resume, &signals, &mut ranks);
    // Nobody takes its connections away while another still receives.
    let done = done.and_then(|()| Ok(ranks.barrier()?));
    if let Err(error) = &done {
        ranks.tell(error);
    }
    done
}

fn train_on(
    config: &Config,
    resume: &Resume,
    signals: &Signals,
    ranks: &mut Ranks,
) -> Result<(), TrainError> {
    // ---- where and with whom -----------------------------------------------------------------
    let (mesh, ledger) = sent::counted(ranks.mesh.clone());
    let device = ranks.device.clone();
    let speaks = ranks.first();
    let compute = device::compute_dtype(config.run.device, config.train.compute);
    ttt_kernels::deterministic::set(config.train.deterministic);
    let run_dir = &config.run.dir;
    std::fs::create_dir_all(run_dir).map_err(TrainError::io("create", run_dir))?;

    // ---- the model to continue, if one is named and the run is new --------------------------------
    let new = match resume {
        Resume::Auto => checkpoint::list(run_dir).map(|all| all.is_empty()),
        Resume::From(_) => Ok(false),
        Resume::Never => Ok(true),
    };
    // As rank 0 sees it: a shared file system may show the others an older state.
    let new = together(&mesh, &device, new)?[0];
    let mut recorded = config.clone();
    let base = match new {
        true => ranks.first_then_all(|_| {
            let _hub = mesh.activity.endless("opening the model of [init]");
            BaseModel::open(&mut recorded)
        })?,
        false => None,
    };
    if !new {
        // A checkpoint holds all of its model; the folder may be gone.
        recorded.init = None;
    }

    // ---- data ----------------------------------------------------------------------------------
    let data = ranks.first_then_all(|first| {
        // There may be any amount of text, and it may lie on the hub.
        let _text = mesh.activity.endless("preparing data");
        Data::prepare(&recorded, first)
    })?;
    let fingerprint = data.sampler.fingerprint();

    // ---- model, new or where it was left --------------------------------------------------------
    let context = config.parallel.context_settings();
    let plan = Plan::on(config, mesh.layout);
    if speaks {
        println!("{plan}");
    }
    let start = find_start(config, resume, &fingerprint, &mesh, &device)?;
    let units = match (&start, &base) {
        (Some(checkpoint), _) => checkpoint.load(&config.model, &mesh, &device, compute)?,
        (None, Some(base)) => base.units(&recorded, &mesh, &device)?,
        (None, None) => new_units(config, &mesh, &device, compute),
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
        context,
    };
    let mut updater = Updater::new(
        &config.optimizer,
        config.train.on_bad_gradient,
        config.train.spike_factor,
        at.mean_grad_norm,
        &device,
    );

    // ---- what is told ------------------------------------------------------------------------
    let mut report = Report {
        metrics: match speaks {
            true => Some(MetricsWriter::open(run_dir, at.step)?),
            false => None,
        },
        progress: Progress::new(config.train.steps, at.step, speaks),
        peak_flops: metrics::peak_flops(config.run.device).map(|one| one * ranks.count() as f64),
        plan,
        kind: config.run.device,
        device: device.clone(),
        on_bad: config.train.on_bad_gradient,
        log_every: config.train.log_every,
        begun: Instant::now(),
        pace: Pace::new(),
        activity: mesh.activity.clone(),
        waiting: None,
    };
    if let Some(checkpoint) = &start {
        let path = checkpoint.path().display();
        report.note(&format!("resumed from {path} at step {}", at.step));
    }
    if let Some(base) = &base {
        for note in &base.notes {
            report.note(note);
        }
        let own = |files: &[(String, Vec<u8>)]| {
            let file = files.iter().find(|(name, _)| name == TOKENIZER);
            file.map(|(_, bytes)| bytes.clone())
        };
        let models = own(&base.small_files()?);
        if models.is_some() && models != own(&tokenizer_files) {
            let note = "the text is tokenized by another tokenizer than the one of [init]";
            report.note(note);
        }
        let row = data.sampler.row(0)?;
        let exact = config.run.device == DeviceKind::Cpu;
        if base.check_unchanged(&mut model, &row, &mesh, exact)? {
            let note = "the new TTT layers change no logit: step 0 is the base model's";
            report.note(note);
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
        let _files = mesh.activity.long("saving a checkpoint");
        at.mean_grad_norm = read_scalar(&updater.mean_norm)? as f32;
        checkpoint::save(&recorded, &model.units, at, &tokenizer_files, &mesh)
    };

    // ---- steps ---------------------------------------------------------------------------------
    let mut loader = data.loader(at.step, &mesh)?;
    let rehearsal = Rehearsal::from_environment()?;
    let steps = config.train.steps;
    let tokens_per_step = config.train.batch_tokens as u64;
    let nominal = 1.0 / config.train.batch_tokens as f64;
    let begin = at.step;
    // Others would wait for it. A GPU's compiles and tunes; a CPU's tells what is usual.
    let mut first_step = Some(match config.run.device {
        DeviceKind::Cpu => mesh.activity.first("the first step"),
        DeviceKind::Cuda => mesh.activity.long("the first step"),
    });
    let mut evaluated = false;
    let mut profiled = ProfiledStep::new(&config.run, ranks.rank(), &device);
    if let Some(step) = config.run.profile_step.filter(|&step| step < begin) {
        report.note(&format!(
            "nothing is timed: run.profile_step = {step} is before step {begin}, where this run goes on"
        ));
    }
    ranks.started();
    while at.step < steps {
        let step = at.step;
        let first = step == begin;
        // What was sent between steps is none of theirs.
        ledger.take();
        mesh.activity.at(format_args!("step {step}"));
        rehearsal.perform(ranks.rank(), step, &mesh.activity, &device)?;
        let recording = profiled.begin(step)?;

        // Forward and backward, a few rows at a time. The gradient is that of the loss summed over
        // all ranks' labelled tokens, scaled by a nominal token count until the true one is known.
        let files = mesh.activity.long("reading rows");
        let rows = loader.next_batch()?.rows;
        drop(files);
        let mut loss = scalar(0.0, &device);
        let mut labelled = 0;
        let mut state_ratios: BTreeMap<usize, Tensor<1>> = BTreeMap::new();
        let micro_batches = rows.chunks(config.train.micro_batch_rows);
        let last = micro_batches.len() - 1;
        for (number, rows) in micro_batches.enumerate() {
            if let Some(signal) = ranks.agree_on(signals.received())? {
                // The gradient in progress is dropped: the checkpoint is the state before this step.
                report.flush()?;
                let path = save(&model, &updater, &mut at)?;
                report.note(&format!("{signal}: saved {}", path.display()));
                report.progress.finish();
                return Ok(());
            }
            let micro = MicroBatch::new(rows, &mesh, &device)?.last(number == last);
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
        mesh.activity.at(format_args!("the sums of step {step}"));
        let labelled = scalar(labelled as f64 * nominal, &device);
        let all = |value| sent::of(sent::LOSS, || mesh.all_reduce_sum(value));
        let labelled = all(labelled)?;
        let normalizer = labelled.recip();
        let loss = all(loss)? * normalizer.clone();
        let lr = learning_rate(&config.optimizer, step, steps);
        let update = updater.update(&mut model.units, normalizer, lr, step, &mesh)?;
        profiled.end(recording, &mesh.activity)?;
        at.step += 1;
        at.tokens += tokens_per_step;
        let sent = ledger.take();
        if first && ranks.count() > 1 {
            let compared = Comparison::new(&sent, config, mesh.layout, mesh.context.rank());
            report.note(&format!(
                "bytes that this rank sent in step {step}, and those planned for rows of one document each\
                 {compared}"
            ));
        }

        // Report the step before, which the device has finished by now.
        report.step(Launched {
            step,
            tokens: at.tokens,
            tokens_per_step,
            lr,
            loss,
            update,
            state_ratios,
            sent: (ranks.count() > 1).then(|| sent.values().sum()),
        })?;
        if first {
            report.flush()?;
            drop(first_step.take());
        }

        // Evaluate and save.
        let last = at.step == steps;
        if let Some(validation) = &data.validation
            && (last || at.step.is_multiple_of(config.eval.every))
        {
            report.flush()?;
            // It compiles what training has no use for; those after it are as fast as a step.
            let again = std::mem::replace(&mut evaluated, true);
            let _compiles = (!again).then(|| mesh.activity.long("the first evaluation"));
            let length = config.train.sequence_length;
            let (rows, at_once) = (config.eval.rows, config.train.micro_batch_rows);
            let result = evaluate(&mut model, validation, length, rows, at_once, &mesh)?;
            report.evaluation(at.step, result.loss, result.tokens)?;
        }
        let due = config.checkpoint.every > 0 && at.step.is_multiple_of(config.checkpoint.every);
        if due || (last && config.checkpoint.at_end) {
            report.flush()?;
            let path = save(&model, &updater, &mut at)?;
            report.note(&format!("saved {}", path.display()));
            report.pace.restart();
        }
    }
    report.flush()?;

    // ---- a sample -------------------------------------------------------------------------------
    if let Some(prompt) = &config.eval.sample_prompt {
        let _sample = mesh.activity.long("a sample");
        let mut units = vec![];
        for unit in Unit::all(&config.model) {
            mesh.activity.at(format_args!("{unit:?}"));
            // All ranks gather it, one needs it whole.
            let params = model.params(unit, &mesh)?;
            units.extend(speaks.then_some(params));
        }
        if speaks {
            let decoder = Decoder::new(&config.model, units, compute, &device);
            let sampling = Sampling {
                temperature: 0.8,
                top_k: None,
                top_p: Some(0.95),
                seed: config.run.seed,
            };
            let tokens = config.eval.sample_tokens;
            let each = |token| mesh.activity.at(format_args!("token {token}"));
            let text = continue_text(&decoder, &data.tokenizer, prompt, tokens, sampling, each)?;
            report.note(&format!("sample: {prompt}{text}"));
        }
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
fn new_units(config: &Config, mesh: &Mesh, device: &Device, compute: DType) -> Vec<UnitState> {
    let units = Unit::all(&config.model).into_iter();
    units
        .map(|unit| {
            let fill = |spec: &ParamSpec, range, values: &mut [f32]| {
                mesh.activity.at(&spec.name);
                draw(spec, config.run.seed, range, values);
                Ok::<_, Infallible>(())
            };
            match UnitState::filled(&config.model, unit, mesh, device, compute, fill) {
                Ok(state) => state,
                Err(never) => match never {},
            }
        })
        .collect()
}
