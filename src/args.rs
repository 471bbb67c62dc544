//! What the command line takes.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use ttt_data::DocumentUnit;
use ttt_train::config::DeviceKind;
use ttt_train::interop::ExportDtype;
use ttt_train::run::Resume;

use crate::gpu::BenchArgs;
use crate::ranks::{DoctorArgs, LaunchArgs};

/// Pretrain, resume, evaluate and sample In-Place Test-Time-Training language models.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train the model that a configuration describes.
    Train(TrainArgs),
    /// Start the ranks of this host: ttt launch --nproc 2 -- train CONFIG.
    Launch(LaunchArgs),
    /// Tell what a run will take: parameters, FLOP, tokens, memory. Needs no device.
    Plan(PlanArgs),
    /// Continue prompts with a trained model.
    Generate(GenerateArgs),
    /// Make a checkpoint a folder as transformers reads it.
    Export(ExportArgs),
    /// Make a folder as transformers saves it a checkpoint.
    Import(ImportArgs),
    /// Validation loss of a trained model, overall and by position in the row.
    Eval(EvalArgs),
    /// Token shards: build, train a tokenizer, look inside.
    #[command(subcommand)]
    Data(DataCommand),
    /// What GPU and libraries are here, and whether every operation computes what it should.
    Doctor(DoctorArgs),
    /// Rates of single operations and of training steps, one JSON line each.
    Bench(BenchArgs),
}

#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Turn text into token shards; goes on where an earlier build stopped.
    Build(BuildArgs),
    /// Train a byte-level BPE.
    Tokenizer(TokenizerArgs),
    /// Tell what a folder of shards holds.
    Inspect(InspectArgs),
}

/// A configuration and changes to it.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The configuration, a TOML file.
    pub config: PathBuf,
    /// Change a setting: section.key=value, the value in TOML or a bare word. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Where to begin: `auto` at the run's newest checkpoint if it has one, a checkpoint's folder,
    /// or `never` at step 0 in a folder without checkpoints.
    #[arg(long, default_value = "auto", value_name = "auto|PATH|never", value_parser = resume)]
    pub resume: Resume,
}

fn resume(text: &str) -> Result<Resume, String> {
    match text {
        "auto" => Ok(Resume::Auto),
        "never" => Ok(Resume::Never),
        "" => Err("expected auto, never or a checkpoint's folder".into()),
        path => Ok(Resume::From(path.into())),
    }
}

#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Propose a layout for so many GPUs.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub gpus: Option<usize>,
    /// Memory of one GPU, such as 80GiB.
    #[arg(long, value_name = "SIZE", default_value = "80GiB", value_parser = bytes, requires = "gpus")]
    pub memory: u64,
}

/// A size such as 80GiB, 141 GB or 1.5TiB.
fn bytes(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[number.len()..].to_ascii_lowercase().as_str() {
        "gib" => 1u64 << 30,
        "gb" => 1_000_000_000,
        "mib" => 1 << 20,
        "mb" => 1_000_000,
        "tib" => 1 << 40,
        "tb" => 1_000_000_000_000,
        _ => return Err("expected a number and GiB or GB, such as 80GiB".into()),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number > 0.0 && number < 1e6 => Ok((number * unit as f64) as u64),
        _ => Err("expected a number and GiB or GB, such as 80GiB".into()),
    }
}

/// A device by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DeviceArg {
    Cpu,
    Cuda,
}

impl From<DeviceArg> for DeviceKind {
    fn from(device: DeviceArg) -> Self {
        match device {
            DeviceArg::Cpu => Self::Cpu,
            DeviceArg::Cuda => Self::Cuda,
        }
    }
}

#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// A checkpoint's folder, or a run's for its newest checkpoint.
    pub checkpoint: PathBuf,
    /// Text to continue. Repeatable.
    #[arg(long = "prompt", required = true, value_name = "TEXT")]
    pub prompts: Vec<String>,
    /// Prompts are what a user says to an instruct model, written by its chat template. Not
    /// supported: tools, documents, images.
    #[arg(long)]
    pub chat: bool,
    /// What the system message of each chat says.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// End before this text. Repeatable.
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Always take the most likely token: temperature 0.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    pub greedy: bool,
    /// Largest norm of a chunk's fast update, instead of the configuration's model.ttt.clip.
    #[arg(long, value_name = "NORM", value_parser = positive)]
    pub clip: Option<f64>,
    /// Most tokens to add to each prompt.
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// Divides the logits; 0 always takes the most likely token.
    #[arg(long, default_value_t = 0.8, value_parser = temperature)]
    pub temperature: f64,
    /// Draw from the most likely so many tokens.
    #[arg(long, value_parser = at_least_one)]
    pub top_k: Option<usize>,
    /// Draw from the fewest tokens whose probabilities reach this sum.
    #[arg(long, value_parser = probability)]
    pub top_p: Option<f64>,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Compute on this device instead of the one trained on.
    #[arg(long)]
    pub device: Option<DeviceArg>,
}

fn temperature(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "expected a number")?;
    match value.is_finite() && value >= 0.0 {
        true => Ok(value),
        false => Err("expected 0 or more".into()),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "expected a number")?;
    match value.is_finite() && value > 0.0 {
        true => Ok(value),
        false => Err("expected a number above 0".into()),
    }
}

fn probability(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "expected a number")?;
    match value > 0.0 && value <= 1.0 {
        true => Ok(value),
        false => Err("expected a probability above 0 and up to 1".into()),
    }
}

fn fraction(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "expected a number")?;
    match (0.0..1.0).contains(&value) {
        true => Ok(value),
        false => Err("expected a share of 0 or more and below 1".into()),
    }
}

pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(value) if value > 0 => Ok(value),
        _ => Err("expected a whole number, 1 or more".into()),
    }
}

/// What exported weights are stored as.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DtypeArg {
    /// What the checkpoint holds.
    F32,
    /// Half of it, rounded.
    Bf16,
}

impl From<DtypeArg> for ExportDtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::F32 => Self::F32,
            DtypeArg::Bf16 => Self::Bf16,
        }
    }
}

#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// A checkpoint's folder, or a run's for its newest checkpoint.
    pub checkpoint: PathBuf,
    /// The folder to write; must not exist.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// What the weights are stored as.
    #[arg(long, value_enum, default_value_t = DtypeArg::Bf16)]
    pub dtype: DtypeArg,
}

#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// A folder with config.json and safetensors.
    pub dir: PathBuf,
    /// The checkpoint to write; must not exist.
    #[arg(long, value_name = "CHECKPOINT")]
    pub out: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct EvalArgs {
    /// A checkpoint's folder, or a run's for its newest checkpoint.
    pub checkpoint: PathBuf,
    /// Also the loss by position in the row.
    #[arg(long)]
    pub by_position: bool,
    /// Folder of token shards instead of the one trained on; its validation split is read.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Rows to read; by default eval.rows of the configuration.
    #[arg(long, value_parser = at_least_one)]
    pub rows: Option<usize>,
    /// Tokens of a row; by default those trained on.
    #[arg(long, value_parser = at_least_one)]
    pub sequence_length: Option<usize>,
    /// Compute on this device instead of the one trained on.
    #[arg(long)]
    pub device: Option<DeviceArg>,
}

/// What makes a document.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DocumentArg {
    /// A text file.
    File,
    /// All text files of a directory.
    Directory,
    /// A line of JSON Lines or a row of parquet.
    Record,
}

impl From<DocumentArg> for DocumentUnit {
    fn from(unit: DocumentArg) -> Self {
        match unit {
            DocumentArg::File => Self::File,
            DocumentArg::Directory => Self::Directory,
            DocumentArg::Record => Self::Record,
        }
    }
}

/// One source of text.
#[derive(Debug, clap::Args)]
pub struct InputArgs {
    /// Files, folders, globs, or `hub:owner/dataset[@revision][/glob]`.
    #[arg(required_unless_present = "config", conflicts_with = "config")]
    pub inputs: Vec<String>,
    /// The key (JSON Lines) or column (parquet) that holds the text.
    #[arg(long, default_value = "text", conflicts_with = "config")]
    pub text_key: String,
    /// What makes a document; by default a file of text, a record of JSON Lines and parquet.
    #[arg(long, conflicts_with = "config")]
    pub document: Option<DocumentArg>,
    /// Take the sources, and all settings, of this configuration's data section.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Change a setting of the configuration. Repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "config")]
    pub sets: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub struct BuildArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// The source's name.
    #[arg(long, default_value = "text", conflicts_with = "config")]
    pub name: String,
    /// The folder to write.
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "config",
        conflicts_with = "config"
    )]
    pub out: Option<PathBuf>,
    /// A tokenizer.json, a folder that has one, or `hub:owner/model[@revision]`.
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "config",
        conflicts_with = "config"
    )]
    pub tokenizer: Option<PathBuf>,
    /// Share of the documents kept for validation.
    #[arg(long, default_value_t = 0.01, value_parser = fraction, conflicts_with = "config")]
    pub validation_fraction: f64,
    /// Tokens of a shard.
    #[arg(long, default_value_t = 1 << 26, value_parser = at_least_one, conflicts_with = "config")]
    pub shard_tokens: usize,
    /// Pass over records that cannot be read, and count them, instead of stopping.
    #[arg(long)]
    pub skip_bad_records: bool,
    /// Use the hub's cache alone.
    #[arg(long)]
    pub offline: bool,
    /// Worker threads; 0: one per core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

#[derive(Debug, clap::Args)]
pub struct TokenizerArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// Tokens of the vocabulary, the 256 bytes and the end-of-text token included.
    #[arg(long, value_parser = at_least_one)]
    pub vocab_size: usize,
    /// A .json file, or a folder that gets a tokenizer.json.
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// A folder of token shards.
    pub dir: PathBuf,
    /// Read every shard and compare it with the manifest's hash.
    #[arg(long)]
    pub verify: bool,
    /// Print the beginning of so many rows of the training split as text.
    #[arg(long, default_value_t = 0)]
    pub rows: u64,
    /// Tokens of these rows.
    #[arg(long, default_value_t = 64, value_parser = at_least_one)]
    pub tokens: usize,
}
