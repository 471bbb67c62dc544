//! Settings that are each well formed and do not go together.

use std::collections::HashSet;

use ttt_model::RopeScaling;
use ttt_model::params::all_params;

use super::sections::{decay_fraction, min_lr_ratio};
use super::{
    Config, DataConfig, DeviceKind, EvalConfig, LrOverride, OptimizerConfig, ScheduleKind,
    TrainConfig, parallel,
};

/// A key and a sentence about it.
#[derive(Debug)]
pub(super) struct Problem {
    /// With its section.
    pub key: String,
    pub sentence: String,
}

pub(super) type Checked = Result<(), Problem>;

pub(super) fn refuse(key: impl Into<String>, sentence: impl Into<String>) -> Checked {
    Err(Problem {
        key: key.into(),
        sentence: sentence.into(),
    })
}

pub(super) fn validate(config: &Config) -> Checked {
    if config.run.dir.as_os_str().is_empty() {
        refuse("run.dir", "expected a folder, found an empty text")?;
    }
    if config.run.seed > i64::MAX as u64 {
        refuse(
            "run.seed",
            "must be below 2^63, the largest number TOML knows",
        )?;
    }
    if let Some(step) = config.run.profile_step {
        if config.run.device == DeviceKind::Cpu {
            refuse(
                "run.profile_step",
                "times operations of a GPU: leave it out where run.device is \"cpu\"",
            )?;
        }
        if step >= config.train.steps {
            let last = config.train.steps.saturating_sub(1);
            refuse(
                "run.profile_step",
                format!("there is no step {step}: the last is {last}"),
            )?;
        }
    }
    config.model.validate().map_err(|error| Problem {
        key: format!("model.{}", error.key),
        sentence: error.problem,
    })?;
    train(&config.train)?;
    optimizer(&config.optimizer, config.train.steps)?;
    overrides(config)?;
    if config.checkpoint.keep == 0 {
        refuse(
            "checkpoint.keep",
            "must be at least 1: the newest checkpoint is what a resume needs",
        )?;
    }
    data(&config.data)?;
    eval(&config.eval, &config.data)?;
    lengths(config)?;
    parallel::validate(config)
}

fn train(train: &TrainConfig) -> Checked {
    for (key, value) in [
        ("train.steps", train.steps),
        ("train.sequence_length", train.sequence_length as u64),
        ("train.batch_tokens", train.batch_tokens as u64),
        ("train.micro_batch_rows", train.micro_batch_rows as u64),
        ("train.log_every", train.log_every),
    ] {
        if value == 0 {
            refuse(key, "must be at least 1, got 0")?;
        }
        if value > 1 << 48 {
            refuse(key, format!("{value} is beyond any run: at most 2^48"))?;
        }
    }
    let (rows, length, batch) = (
        train.micro_batch_rows,
        train.sequence_length,
        train.batch_tokens,
    );
    let Some(micro) = rows.checked_mul(length) else {
        return refuse(
            "train.micro_batch_rows",
            format!("{rows} rows of {length} tokens are too many"),
        );
    };
    if !batch.is_multiple_of(micro) {
        let below = batch / micro * micro;
        let nearest = match below {
            0 => format!("the least is {micro}"),
            _ => format!(
                "the nearest are {below} and {}",
                below.saturating_add(micro)
            ),
        };
        refuse(
            "train.batch_tokens",
            format!(
                "{batch} is no multiple of the {micro} tokens that go through the model at once \
                 (micro_batch_rows {rows} x sequence_length {length}): {nearest}"
            ),
        )?;
    }
    match train.spike_factor {
        Some(factor) if !(factor.is_finite() && factor > 1.0) => refuse(
            "train.spike_factor",
            format!(
                "must be a number above 1 (a multiple of the mean gradient norm), got {factor}"
            ),
        ),
        _ => Ok(()),
    }
}

fn optimizer(optimizer: &OptimizerConfig, steps: u64) -> Checked {
    let positive = |value: f64| value.is_finite() && value > 0.0;
    for (key, value) in [
        ("optimizer.lr", optimizer.lr),
        ("optimizer.eps", optimizer.eps),
    ] {
        if !positive(value) {
            refuse(key, format!("must be a positive number, got {value}"))?;
        }
    }
    for (key, value) in [
        ("optimizer.weight_decay", optimizer.weight_decay),
        ("optimizer.grad_clip", optimizer.grad_clip),
    ] {
        if !(value == 0.0 || positive(value)) {
            refuse(
                key,
                format!("must be zero or a positive number, got {value}"),
            )?;
        }
    }
    for (key, value) in [
        ("optimizer.beta1", optimizer.beta1),
        ("optimizer.beta2", optimizer.beta2),
    ] {
        if !(0.0..1.0).contains(&value) {
            refuse(key, format!("must lie in 0 <= beta < 1, got {value}"))?;
        }
    }
    let (lowest, fall) = (optimizer.min_lr_ratio, optimizer.decay_fraction);
    if !(0.0..=1.0).contains(&lowest) {
        refuse(
            "optimizer.min_lr_ratio",
            format!("must lie between 0 and 1, got {lowest}"),
        )?;
    }
    if !(fall > 0.0 && fall <= 1.0) {
        refuse(
            "optimizer.decay_fraction",
            format!("must lie above 0 and up to 1, got {fall}"),
        )?;
    }
    if optimizer.schedule == ScheduleKind::Constant && lowest != min_lr_ratio() {
        refuse(
            "optimizer.min_lr_ratio",
            "schedule = \"constant\" does not fall: leave it out",
        )?;
    }
    if optimizer.schedule != ScheduleKind::Wsd && fall != decay_fraction() {
        refuse(
            "optimizer.decay_fraction",
            "only schedule = \"wsd\" uses it: leave it out",
        )?;
    }
    let warmup = optimizer.warmup_steps;
    if warmup > steps {
        refuse(
            "optimizer.warmup_steps",
            format!("{warmup} is more than all {steps} steps of the run (train.steps)"),
        )?;
    }
    let falling = (fall * steps as f64).round() as u64;
    if optimizer.schedule == ScheduleKind::Wsd && warmup + falling > steps {
        refuse(
            "optimizer.decay_fraction",
            format!(
                "a warm-up of {warmup} steps and a fall over {falling} are more than all {steps} \
                 steps of the run (train.steps)"
            ),
        )?;
    }
    Ok(())
}

fn overrides(config: &Config) -> Checked {
    let params = all_params(&config.model);
    for LrOverride { pattern, lr_scale } in &config.optimizer.overrides {
        let key = format!("optimizer.overrides (pattern {pattern:?})");
        if !(lr_scale.is_finite() && *lr_scale >= 0.0) {
            let sentence =
                format!("lr_scale must be 0 (frozen) or a positive number, got {lr_scale}");
            refuse(&key, sentence)?;
        }
        match glob::Pattern::new(pattern) {
            Err(error) => refuse(
                &key,
                format!("not a pattern of names with * and ?: {error}"),
            )?,
            Ok(matcher) if !params.iter().any(|spec| matcher.matches(&spec.name)) => {
                let example = &params[params.len() / 2].name;
                refuse(
                    &key,
                    format!("matches no parameter; one is named {example}"),
                )?;
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

fn data(data: &DataConfig) -> Checked {
    if data.path.as_os_str().is_empty() {
        refuse(
            "data.path",
            "expected a folder for the token shards, found an empty text",
        )?;
    }
    if !(0.0..1.0).contains(&data.validation_fraction) {
        let given = data.validation_fraction;
        refuse(
            "data.validation_fraction",
            format!("must lie in 0 <= fraction < 1, got {given}"),
        )?;
    }
    if data.tokenizer.as_ref().is_some_and(String::is_empty) {
        refuse(
            "data.tokenizer",
            "expected a file, a folder or a hub id, found an empty text",
        )?;
    }
    if let Some(size) = data.tokenizer_vocab_size {
        if data.tokenizer.is_some() {
            refuse(
                "data.tokenizer_vocab_size",
                "data.tokenizer names a tokenizer, so none is trained: give one of the two",
            )?;
        }
        // A byte-level BPE has the 256 bytes and its end-of-text token.
        if size < 257 {
            refuse(
                "data.tokenizer_vocab_size",
                format!("must be at least 257 (the bytes and an end token), got {size}"),
            )?;
        }
    }
    let mut names = HashSet::new();
    for (i, source) in data.sources.iter().enumerate() {
        let key = |field: &str| format!("data.sources[{i}].{field}");
        if source.name.is_empty() {
            refuse(key("name"), "expected a name, found an empty text")?;
        }
        if !names.insert(&source.name) {
            refuse(
                key("name"),
                format!("two sources are called \"{}\"", source.name),
            )?;
        }
        if source.inputs.is_empty() {
            refuse(
                key("inputs"),
                format!("source \"{}\" lists no input", source.name),
            )?;
        }
        if !(source.weight.is_finite() && source.weight > 0.0) {
            let weight = source.weight;
            refuse(
                key("weight"),
                format!("must be a positive number, got {weight}"),
            )?;
        }
    }
    Ok(())
}

fn eval(eval: &EvalConfig, data: &DataConfig) -> Checked {
    if eval.rows == 0 {
        refuse(
            "eval.rows",
            "must be at least 1, got 0; eval.every = 0 is what turns evaluation off",
        )?;
    }
    if eval.every > 0 && data.validation_fraction == 0.0 {
        refuse(
            "data.validation_fraction",
            "must be above 0 where eval.every is not 0",
        )?;
    }
    match (&eval.sample_prompt, eval.sample_tokens) {
        (Some(prompt), _) if prompt.is_empty() => refuse(
            "eval.sample_prompt",
            "expected a text to continue, found an empty one",
        ),
        (Some(_), 0) => refuse(
            "eval.sample_tokens",
            "must be at least 1 where there is a sample_prompt",
        ),
        _ => Ok(()),
    }
}

/// What rows, vocabulary and shards ask of each other.
fn lengths(config: &Config) -> Checked {
    let (model, length) = (&config.model, config.train.sequence_length);
    if length > model.max_position_embeddings {
        let positions = model.max_position_embeddings;
        refuse(
            "train.sequence_length",
            format!(
                "{length} is beyond model.max_position_embeddings, {positions}: raise that to at least {length}"
            ),
        )?;
    }
    if let Some(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings,
        ..
    }) = &model.rope_scaling
    {
        let reach = factor * *original_max_position_embeddings as f64;
        if length as f64 > reach {
            refuse(
                "model.rope_scaling",
                format!(
                    "yarn with factor {factor} reaches {reach} positions, train.sequence_length is \
                     {length}: raise the factor"
                ),
            )?;
        }
    }
    let chunk = model.ttt.chunk;
    if model.ttt.enabled && chunk >= length {
        refuse(
            "model.ttt.chunk",
            format!(
                "with chunks of {chunk} tokens a row of {length} (train.sequence_length) never reads \
                 what it learned: at most {} makes sense",
                length.saturating_sub(1).max(1)
            ),
        )?;
    }
    if let Some(size) = config
        .data
        .tokenizer_vocab_size
        .filter(|size| *size > model.vocab_size)
    {
        let rows = model.vocab_size;
        refuse(
            "data.tokenizer_vocab_size",
            format!(
                "{size} ids do not fit model.vocab_size, {rows}: raise the one or lower the other"
            ),
        )?;
    }
    if config.data.shard_tokens <= length {
        let shard = config.data.shard_tokens;
        refuse(
            "data.shard_tokens",
            format!(
                "a shard of {shard} tokens does not hold one row of {length} and its last target"
            ),
        )?;
    }
    Ok(())
}
