//! The plan as a table.

use std::fmt;

use ttt_model::{ModelType, ParamGroup};
use ttt_parallel::Layout;

use super::{Among, Plan, precision};
use crate::config::{Activations, Config, DeviceKind, Precision};
use crate::human::{count, flop, gib, grouped};

/// Width of a table's names, and of its numbers.
const NAME: usize = 52;
const NUMBER: usize = 18;

pub(super) fn describe_model(config: &Config) -> String {
    let model = &config.model;
    let family = match model.model_type {
        ModelType::Llama => "llama",
        ModelType::Qwen2 => "qwen2",
        ModelType::Qwen3 => "qwen3",
    };
    let (layers, heads) = (model.num_hidden_layers, model.num_attention_heads);
    let windows: Vec<_> = (0..layers).map(|layer| model.window(layer)).collect();
    let attention = match windows.first().copied().flatten() {
        _ if windows.windows(2).any(|pair| pair[0] != pair[1]) => "mixed attention".to_string(),
        Some(window) => format!("sliding window {window}"),
        None => "full attention".to_string(),
    };
    let learning = model.ttt_layers();
    let ttt = match learning.is_empty() {
        true => "no TTT".to_string(),
        false => format!(
            "TTT in layers {} (chunk {}, lr {})",
            learning
                .iter()
                .map(usize::to_string)
                .collect::<Vec<_>>()
                .join(" "),
            model.ttt.chunk,
            model.ttt.lr
        ),
    };
    let device = match config.run.device {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
    };
    let precision = match precision(config) {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    };
    let activations = match config.train.activations {
        Activations::Keep => "kept",
        Activations::Recompute => "recomputed",
    };
    format!(
        "{family}, {layers} layers, hidden {}, intermediate {}, heads {heads}/{} x {}, vocabulary {}\n\
         {attention}, {ttt}\n\
         {precision} on {device}, activations {activations}",
        model.hidden_size,
        model.intermediate_size,
        model.kv_heads(),
        model.head_size(),
        grouped(model.vocab_size as u64),
    )
}

fn group_name(group: ParamGroup) -> &'static str {
    match group {
        ParamGroup::Embedding => "embedding",
        ParamGroup::Attention => "attention",
        ParamGroup::Mlp => "MLP",
        ParamGroup::Ttt => "TTT targets",
        ParamGroup::Norm => "norms",
        ParamGroup::Head => "head",
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, value: impl fmt::Display) -> fmt::Result {
    writeln!(f, "  {name:<NAME$}{value:>NUMBER$}")
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.model)?;

        writeln!(f, "parameters")?;
        for (group, parameters) in &self.parameters {
            row(f, group_name(*group), count(*parameters as f64))?;
        }
        row(f, "total", count(self.parameter_count() as f64))?;

        writeln!(f, "\narithmetic per token, forward and backward")?;
        for (name, flops) in [
            ("matrix products", self.flops.matmul),
            ("attention scores", self.flops.attention),
            ("fast updates", self.flops.ttt),
        ] {
            row(f, name, flop(3.0 * flops))?;
        }
        row(f, "total", flop(self.flops.training_with_ttt()))?;

        writeln!(f, "\nrun")?;
        row(f, "steps", grouped(self.steps))?;
        row(f, "tokens per step", grouped(self.tokens_per_step))?;
        let batch = format!(
            "rows of {} tokens per step, {} at once",
            grouped(self.sequence_length as u64),
            self.micro_batch_rows
        );
        row(f, &batch, grouped(self.rows as u64))?;
        row(f, "tokens", count(self.total_tokens() as f64))?;
        row(f, "arithmetic", flop(self.total_flops()))?;
        let ranks = self.layout.ranks();
        if ranks > 1 {
            let each = self.total_flops() / ranks as f64;
            row(f, "arithmetic of one device", flop(each))?;
            let Layout {
                replicate,
                shard,
                context,
                ..
            } = self.layout;
            let layout = format!("{replicate} x {shard} x {context}");
            row(f, "devices, replicate x shard x context", layout)?;
            let shards = self.layout.parameter_shards();
            row(f, "devices that hold one copy of the parameters", shards)?;
        }

        writeln!(f, "\nmemory on one device, estimated, GiB")?;
        for item in &self.memory.items {
            row(f, &item.name, format!("{:.2}", gib(item.bytes)))?;
        }
        let total = gib(self.memory.total_bytes());
        write!(f, "  {:<NAME$}{:>NUMBER$}", "total", format!("{total:.2}"))?;
        match self.traffic.items.is_empty() {
            true => Ok(()),
            false => self.traffic_table(f),
        }
    }
}

impl Plan {
    /// Bytes that a device sends, exactly.
    fn traffic_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layout = self.layout;
        writeln!(f, "\n\nbytes that one device sends in a step")?;
        for item in &self.traffic.items {
            let among = match item.among {
                Among::Shard => format!("{} shards", layout.parameter_shards()),
                Among::Replicas => format!("{} replicas", layout.parameter_copies()),
                Among::Context => format!("{} parts of rows", layout.context),
                Among::World => format!("all {}", layout.ranks()),
            };
            let name = format!("{}, {among}", item.name);
            row(f, &name, grouped(item.bytes))?;
            if let Some((bytes, layers)) = item.per_layer {
                let name = format!("  in each of {layers} layers, once forward and back");
                let name = match item.among {
                    Among::Context => name,
                    _ => format!("  in each of {layers} layers, once"),
                };
                row(f, &name, grouped(bytes))?;
            }
        }
        write!(
            f,
            "  {:<NAME$}{:>NUMBER$}",
            "total",
            grouped(self.traffic.bytes())
        )
    }
}
