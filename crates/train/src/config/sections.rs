//! The sections of the configuration beside `[model]`, which is [`ttt_model::ModelConfig`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use ttt_data::SourceSpec as SourceConfig;

/// `[run]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Folder for everything the run writes: checkpoints, `metrics.jsonl`.
    pub dir: PathBuf,
    /// What computes.
    #[serde(default)]
    pub device: DeviceKind,
    /// Seed of the initial weights and of the order of the data.
    #[serde(default)]
    pub seed: u64,
    /// A step whose operations are timed on a GPU: where its time goes is written to
    /// `profile.rank<i>.txt` in `dir`. Default: none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile_step: Option<u64>,
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The processor, in f32.
    #[default]
    Cpu,
    /// An NVIDIA GPU; needs a build with the feature `cuda`.
    Cuda,
}

/// `[init]`: the weights that the run begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// A folder as transformers saves it, or `hub:owner/model`. What `[model]` leaves out comes from
    /// its `config.json`.
    pub from: String,
    /// The hub's branch, tag or commit; in a checkpoint, the commit that was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Folder of the token shards. If it holds none, `ttt train` builds them from `sources`.
    pub path: PathBuf,
    /// A `tokenizer.json`, a folder that has one, or a hub id; default that of `[init]`, else
    /// `<path>/tokenizer.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Trains a byte-level BPE of this size on the sources if `<path>` has no tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_vocab_size: Option<usize>,
    /// Share of the documents, chosen by their hash, that are kept for validation.
    #[serde(default = "validation_fraction")]
    pub validation_fraction: f64,
    /// Tokens of a shard.
    #[serde(default = "shard_tokens")]
    pub shard_tokens: usize,
    /// What to build the shards from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceConfig>,
}

fn validation_fraction() -> f64 {
    0.01
}

fn shard_tokens() -> usize {
    1 << 26
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run, those before a resume included.
    pub steps: u64,
    /// Tokens of a row, N.
    pub sequence_length: usize,
    /// Tokens of a step; micro-batches are accumulated until it is reached.
    pub batch_tokens: usize,
    /// Rows that go through the model at once, B.
    #[serde(default = "one_usize")]
    pub micro_batch_rows: usize,
    /// What the backward pass finds of the forward pass.
    #[serde(default)]
    pub activations: Activations,
    /// Precision of activations and matrix products; default f32 on the CPU, bf16 on CUDA.
    /// Master weights, moments and fast weights are f32 in both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute: Option<Precision>,
    /// Whether the same run gives the same losses to the last bit on a GPU too, at the cost of some
    /// speed. On the CPU it always does.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deterministic: bool,
    /// What happens at a step whose gradients are not finite, or spike.
    #[serde(default)]
    pub on_bad_gradient: OnBadGradient,
    /// A gradient norm beyond this multiple of its running mean is bad; default: none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spike_factor: Option<f64>,
    /// Steps between lines of metrics.
    #[serde(default = "one_u64")]
    pub log_every: u64,
}

fn one_usize() -> usize {
    1
}

fn one_u64() -> u64 {
    1
}

impl TrainConfig {
    /// Micro-batches of a step.
    pub fn micro_batches(&self) -> usize {
        self.batch_tokens / (self.sequence_length * self.micro_batch_rows).max(1)
    }

    /// Rows of a step.
    pub fn batch_rows(&self) -> usize {
        self.batch_tokens / self.sequence_length.max(1)
    }
}

/// What the backward pass finds of the forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// Everything it needs: fastest.
    #[default]
    Keep,
    /// Each block's input; the block runs again: a third more arithmetic, far less memory.
    Recompute,
}

/// Precision of activations and matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits with f32's range.
    Bf16,
}

impl Precision {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// What happens at a step whose gradients are not finite, or spike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadGradient {
    /// The weights stay as they are and the run goes on.
    #[default]
    Skip,
    /// The run ends with an error.
    Abort,
}

/// `[optimizer]`: AdamW with decay on matrices only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Learning rate at the end, relative to the peak; not used by `constant`.
    #[serde(default = "min_lr_ratio")]
    pub min_lr_ratio: f64,
    /// Steps of the linear rise from zero.
    #[serde(default)]
    pub warmup_steps: u64,
    /// The course after the warm-up.
    #[serde(default)]
    pub schedule: ScheduleKind,
    /// Share of all steps over which `wsd` falls; used by it alone.
    #[serde(default = "decay_fraction")]
    pub decay_fraction: f64,
    /// Decay of the mean of gradients.
    #[serde(default = "beta1")]
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[serde(default = "eps")]
    pub eps: f64,
    /// Decoupled weight decay.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// Largest global norm of the gradients; 0: no limit.
    #[serde(default = "grad_clip")]
    pub grad_clip: f64,
    /// Parameters with a learning rate of their own; the last that matches counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<LrOverride>,
}

/// `[[optimizer.overrides]]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LrOverride {
    /// Names of parameters, with `*` and `?`: `model.layers.*.mlp.ttt_*`.
    pub pattern: String,
    /// Multiplies the learning rate; 0 freezes.
    pub lr_scale: f64,
}

pub(super) fn min_lr_ratio() -> f64 {
    0.1
}
pub(super) fn decay_fraction() -> f64 {
    0.2
}
fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.95
}
fn eps() -> f64 {
    1e-8
}
fn weight_decay() -> f64 {
    0.1
}
fn grad_clip() -> f64 {
    1.0
}

/// The course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine down to the end.
    #[default]
    Cosine,
    /// Warm-up, stable, decay: a plateau, then a straight fall over the last `decay_fraction`.
    Wsd,
    /// The peak until the end.
    Constant,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: none but those at the end and at a signal.
    pub every: u64,
    /// Newest checkpoints that are kept.
    pub keep: usize,
    /// Whether the last step is saved.
    pub at_end: bool,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            every: 1000,
            keep: 3,
            at_end: true,
        }
    }
}

/// `[eval]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Steps between evaluations; 0: never.
    pub every: u64,
    /// Rows of the validation split that are evaluated.
    pub rows: usize,
    /// Continued by the model at the end of the run, as a sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_prompt: Option<String>,
    /// Tokens of the sample.
    pub sample_tokens: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            every: 0,
            rows: 64,
            sample_prompt: None,
            sample_tokens: 64,
        }
    }
}
