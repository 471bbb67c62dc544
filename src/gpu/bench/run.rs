//! One line of the table: a model, a batch, how often.

use std::path::Path;

use serde_json::{Value, json};
use ttt_model::flops::ForwardFlops;
use ttt_train::config::{Activations, Config, DeviceKind};
use ttt_train::metrics::peak_flops;

use crate::gpu::args::{Attn, Mode, Preset};

const TINY: &str = r#"
[run]
dir = "unused"
[model]
model_type = "qwen3"
vocab_size = 512
hidden_size = 256
intermediate_size = 512
num_hidden_layers = 7
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 128
rope_theta = 1e4
sliding_window = 128
tie_word_embeddings = true
[model.ttt]
enabled = true
every = 6
chunk = 1024
lr = 0.3
target = "embedding"
[data]
path = "unused"
[train]
steps = 1
sequence_length = 4096
batch_tokens = 4096
[optimizer]
lr = 3e-4
beta2 = 0.95
weight_decay = 0.1
"#;

impl Preset {
    pub fn name(self) -> &'static str {
        match self {
            Self::M500 => "500m",
            Self::B1_5 => "1.5b",
            Self::B4 => "4b",
            Self::Tiny => "tiny",
        }
    }

    fn config(self) -> anyhow::Result<Config> {
        let text = match self {
            Self::M500 => include_str!("../../../configs/500m.toml"),
            Self::B1_5 => include_str!("../../../configs/1.5b.toml"),
            Self::B4 => include_str!("../../../configs/4b.toml"),
            Self::Tiny => TINY,
        };
        let mut config = Config::parse(text, Path::new(self.name()), &[])?;
        // The published 4B has full attention; the baseline's table also slides a window over it.
        config.model.sliding_window.get_or_insert(1024);
        Ok(config)
    }
}

#[derive(Clone, Debug)]
pub struct Run {
    pub preset: Preset,
    pub attn: Attn,
    pub batch: usize,
    pub seq: usize,
    pub ttt: bool,
    pub steps: u64,
    pub warmup: u64,
    pub recompute: bool,
    pub device: DeviceKind,
}

impl Run {
    pub fn name(&self, mode: Mode) -> String {
        let mode = match mode {
            Mode::Train => "train",
            Mode::Prefill => "prefill",
            Mode::Micro => "micro",
        };
        let (preset, batch, seq) = (self.preset.name(), self.batch, self.seq);
        let (attn, ttt) = (self.attn_name(), self.ttt_name());
        format!("{mode}/{preset}/{attn}/b{batch}x{seq}/ttt-{ttt}")
    }

    fn attn_name(&self) -> &'static str {
        match self.attn {
            Attn::Swa => "swa",
            Attn::Full => "full",
        }
    }

    fn ttt_name(&self) -> &'static str {
        if self.ttt { "on" } else { "off" }
    }

    /// The preset's configuration as this run changes it.
    pub fn config(&self) -> anyhow::Result<Config> {
        let mut config = self.preset.config()?;
        let model = &mut config.model;
        model.ttt.enabled = self.ttt;
        model.max_position_embeddings = model.max_position_embeddings.max(self.seq);
        if self.attn == Attn::Full {
            model.sliding_window = None;
        }
        config.train.activations = match self.recompute {
            true => Activations::Recompute,
            false => Activations::Keep,
        };
        Ok(config)
    }

    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// Operations per token as the baseline's docstring defines them: without and with the fast
    /// updates.
    pub fn flops(&self, config: &Config, mode: Mode) -> (f64, f64) {
        let model = &config.model;
        let flops = ForwardFlops::per_token(model, self.seq);
        let (plain, ttt) = match mode {
            Mode::Train => (flops.training(), 3.0 * flops.ttt),
            // The head sees the last token only.
            _ => {
                let head = 2.0 * (model.hidden_size * model.vocab_size) as f64;
                (flops.matmul - head + flops.attention, flops.ttt)
            }
        };
        (plain, plain + ttt)
    }

    /// The baseline's keys for a run that took `ms` per step.
    pub fn line(&self, config: &Config, mode: Mode, ms: f64) -> Value {
        let (plain, with_ttt) = self.flops(config, mode);
        let tokens_per_s = self.tokens() as f64 / ms * 1e3;
        let mfu = |flops: f64| {
            let peak = peak_flops(self.device)?;
            Some(round(tokens_per_s * flops / peak, 4))
        };
        let parameters: usize = ttt_model::params::all_params(&config.model)
            .iter()
            .map(|spec| spec.len())
            .sum();
        let window = config.model.sliding_window.unwrap_or(self.seq);
        let mut line = json!({
            "run": self.name(mode),
            "preset": self.preset.name(),
            "mode": if mode == Mode::Train { "train" } else { "prefill" },
            "attn": self.attn_name(),
            "window": window,
            "ttt": self.ttt_name(),
            "chunk": config.model.ttt.chunk,
            "target": "embed",
            "batch": self.batch,
            "seq": self.seq,
            "accum": 1,
            "ckpt": if self.recompute { "full" } else { "none" },
            "params_m": round(parameters as f64 / 1e6, 1),
        });
        let measured = json!({
            "tokens_per_s": tokens_per_s.round() as u64,
            "ms_per_step": round(ms, 3),
            "mfu": mfu(plain),
            "mfu_with_ttt": mfu(with_ttt),
            "model_flops": plain,
            "with_ttt": with_ttt,
        });
        join(&mut line, measured);
        line
    }
}

/// Adds the keys of `more` to `line`.
pub fn join(line: &mut Value, more: Value) {
    if let (Value::Object(line), Value::Object(more)) = (line, more) {
        line.extend(more);
    }
}

pub fn round(x: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (x * unit).round() / unit
}

pub fn gib(bytes: u64) -> f64 {
    round(bytes as f64 / (1u64 << 30) as f64, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(preset: Preset, attn: Attn, batch: usize, seq: usize, ttt: bool) -> Run {
        Run {
            preset,
            attn,
            batch,
            seq,
            ttt,
            steps: 1,
            warmup: 1,
            recompute: false,
            device: DeviceKind::Cpu,
        }
    }

    /// Expected are the baseline's flops_per_token(c), which counts from its own presets.
    #[test]
    fn operations_are_counted_as_the_baseline_counts_them() {
        use {Attn::*, Mode::*, Preset::*};
        for (mode, run, expected) in [
            (
                Train,
                run(M500, Swa, 1, 32_768, true),
                (2744656896.0, 2843083776.0),
            ),
            (
                Train,
                run(M500, Full, 4, 8192, true),
                (3367649280.0, 3458998272.0),
            ),
            (
                Train,
                run(B1_5, Swa, 3, 8192, false),
                (10057039872.0, 10057039872.0),
            ),
            (
                Prefill,
                run(B4, Swa, 1, 131_072, true),
                (7868254464.0, 8243560704.0),
            ),
            (
                Prefill,
                run(B4, Full, 1, 8192, false),
                (9682845696.0, 9682845696.0),
            ),
        ] {
            let found = run.flops(&run.config().unwrap(), mode);
            // Sums of numbers below 2^53 in another order.
            let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-12;
            let same = near(found.0, expected.0) && near(found.1, expected.1);
            assert!(same, "{run:?}: {found:?}");
        }
    }

    #[test]
    fn names_are_the_baselines() {
        let run = run(Preset::M500, Attn::Swa, 1, 32_768, true);
        assert_eq!(run.name(Mode::Train), "train/500m/swa/b1x32768/ttt-on");
    }
}
