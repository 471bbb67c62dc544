//! What `ttt bench` takes. Names and values are the PyTorch baseline's where it has them.

use clap::ValueEnum;

use crate::args::DeviceArg;

#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// The fixed table: single operations, then training steps. What happens without options.
    #[arg(long, value_enum, conflicts_with_all = ["mode", "preset", "seq", "batch"])]
    pub suite: Option<Suite>,
    /// What is measured.
    #[arg(long, value_enum, default_value = "train")]
    pub mode: Mode,
    /// One model in place of the table.
    #[arg(long, value_enum)]
    pub preset: Option<Preset>,
    /// Attention of that model.
    #[arg(long, value_enum, default_value = "swa")]
    pub attn: Attn,
    /// Tokens of a row, comma-separated [default: 4096; prefill 8192,32768,131072].
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub seq: Vec<u32>,
    /// Rows [default: 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: Option<u32>,
    /// Whether every sixth layer learns [default: on; prefill both].
    #[arg(long, value_enum)]
    pub ttt: Option<TttArg>,
    /// Timed steps of each run [default: 8 in the table, else 10].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Steps before them.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    pub warmup: u64,
    /// Of the table: start no run after this many seconds.
    #[arg(long, default_value_t = 270.0)]
    pub budget: f64,
    /// Of the table: only runs whose name contains this. Repeatable, all must.
    #[arg(long, value_name = "PART")]
    pub only: Vec<String>,
    /// Of the table: leave out the single operations.
    #[arg(long)]
    pub no_micro: bool,
    /// Where the time of one training step goes, operation by operation, or with `--mode prefill` of one
    /// forward pass [default: that of the 500m preset at 1 x 32768, 1 x 8192].
    #[arg(long, group = "program", conflicts_with = "suite")]
    pub profile: bool,
    /// Train for so many steps and fail if memory grows [default model: 500m at 1 x 4096].
    #[arg(long, group = "program", value_name = "STEPS", conflicts_with_all = ["suite", "mode"],
          value_parser = clap::value_parser!(u64).range(1..))]
    pub soak: Option<u64>,
    /// Train a small model for so many steps with this device's operations, with their reference
    /// forms, and from a second seed; fail if the forms change more than the seed does.
    #[arg(long, group = "program", value_name = "STEPS", conflicts_with_all = ["suite", "mode", "preset"],
          value_parser = clap::value_parser!(u64).range(1..))]
    pub agree: Option<u64>,
    /// Recompute activations in the backward pass.
    #[arg(long)]
    pub recompute: bool,
    /// The same bits in every run, as train.deterministic = true.
    #[arg(long)]
    pub deterministic: bool,
    /// Where it runs; the CPU is for trying the program, with `--preset tiny`.
    #[arg(long, value_enum, default_value = "cuda")]
    pub device: DeviceArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    Quick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Training steps.
    Train,
    /// The forward pass alone, up to the logits of the last token.
    Prefill,
    /// Single operations.
    Micro,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    #[value(name = "500m")]
    M500,
    #[value(name = "1.5b")]
    B1_5,
    #[value(name = "4b")]
    B4,
    /// For trying the program.
    Tiny,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attn {
    /// Sliding window, of the preset's length.
    Swa,
    /// All earlier tokens.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TttArg {
    On,
    Off,
    Both,
}

impl TttArg {
    /// With and without, in the order in which they run.
    pub fn all(self) -> &'static [bool] {
        match self {
            Self::On => &[true],
            Self::Off => &[false],
            Self::Both => &[true, false],
        }
    }
}
