//! What a block keeps of its forward pass for its backward pass: one table.
//!
//! Per token of a row. A half of a block is fused where the device has its operation
//! (`ttt_kernels::fused`): then it computes norms and, in layers that do not learn, Z once more
//! instead of keeping them.

use burn::tensor::DType;
use ttt_model::{ModelConfig, Target};

use crate::config::{Config, DeviceKind};
use crate::device::compute_dtype;

/// A line of the table.
struct Line {
    what: &'static str,
    /// Elements per token.
    width: fn(&ModelConfig) -> usize,
    /// Whether a layer keeps it.
    kept: fn(&Layer<'_>) -> bool,
    /// f32 whatever the model computes in.
    wide: bool,
}

/// One layer, as far as the table asks.
struct Layer<'a> {
    model: &'a ModelConfig,
    /// In-Place TTT.
    learns: bool,
    /// The halves that are one operation.
    attention_fused: bool,
    mlp_fused: bool,
}

const fn line(
    what: &'static str,
    width: fn(&ModelConfig) -> usize,
    kept: fn(&Layer<'_>) -> bool,
) -> Line {
    Line {
        what,
        width,
        kept,
        wide: false,
    }
}

#[rustfmt::skip]
const TABLE: &[Line] = &[
    line("x", hidden, |_| true),
    line("x normed", hidden, |l| !l.attention_fused),
    line("queries, keys, values", |m| queries(m) + 2 * keys(m), |_| true),
    line("queries, keys before their norms", |m| queries(m) + keys(m), |l| l.model.qk_norm()),
    line("values beside them", keys, |l| l.model.qk_norm() && l.attention_fused),
    line("attention's output", queries, |_| true),
    Line { wide: true, ..line("log-sum-exp", |m| m.num_attention_heads, |_| true) },
    line("x after attention", hidden, |_| true),
    line("x after attention normed", hidden, |l| !l.mlp_fused),
    line("gate and up", |m| 2 * m.intermediate_size, |_| true),
    line("Z", |m| m.intermediate_size, |l| l.learns || !l.mlp_fused),
    line("targets V", hidden, |l| l.learns),
    line("targets before W_t", hidden, |l| l.learns && l.model.ttt.projection && l.model.ttt.target == Target::NextToken),
];

fn hidden(model: &ModelConfig) -> usize {
    model.hidden_size
}

fn queries(model: &ModelConfig) -> usize {
    model.num_attention_heads * model.head_size()
}

/// Of keys, and as many of values.
pub(super) fn keys(model: &ModelConfig) -> usize {
    model.kv_heads() * model.head_size()
}

/// What layer `layer` keeps of every token, by name, in bytes. `part`: of rows that several ranks
/// share, the tokens of one.
pub(super) fn per_token(
    config: &Config,
    layer: usize,
    part: Option<usize>,
) -> impl Iterator<Item = (&'static str, usize)> {
    let model = &config.model;
    let compute = compute_dtype(config.run.device, config.train.compute);
    let fused = config.run.device == DeviceKind::Cuda && compute == DType::BF16;
    let learns = model.is_ttt_layer(layer);
    // Of shared rows, some queries of a part must see its own keys alone.
    let window = model.window(layer);
    let apart = part.is_none_or(|part| window.is_some_and(|window| window - 1 < part));
    let layer = Layer {
        model,
        learns,
        attention_fused: fused && !model.qkv_bias() && apart,
        // Targets made of the MLP's own input need its norm.
        mlp_fused: fused && !(learns && model.ttt.target == Target::Hidden),
    };
    let kept = TABLE.iter().filter(move |line| (line.kept)(&layer));
    kept.map(move |line| {
        let size = if line.wide { 4 } else { compute.size() };
        (line.what, size * (line.width)(model))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(sets: &[&str], layer: usize) -> usize {
        let text = "run.dir = \"run\"\ndata.path = \"data\"\n\
             train = { steps = 1, sequence_length = 64, batch_tokens = 64 }\n\
             optimizer.lr = 1.0\n\
             [model]\nmodel_type = \"qwen3\"\nvocab_size = 256\nhidden_size = 64\n\
             intermediate_size = 128\nnum_hidden_layers = 2\nnum_attention_heads = 4\n\
             num_key_value_heads = 2\nhead_dim = 16\n\
             [model.ttt]\nenabled = true\nlayers = [1]\nchunk = 16\n";
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::parse(text, "test".as_ref(), &sets).expect("a configuration");
        per_token(&config, layer, None)
            .map(|(_, bytes)| bytes)
            .sum()
    }

    /// D 64, F 128, H E 64, G E 32, H 4, added up by hand.
    #[test]
    fn bytes_of_a_token() {
        let fused = ["run.device=cuda"];
        // x, q k v, these before their norms, output, x, gate and up; log-sum-exp.
        let plain = 2 * (64 + 128 + 128 + 64 + 64 + 256) + 4 * 4;
        assert_eq!(bytes(&fused, 0), plain);
        // Z and V; what V is projected from is made again, unless no convolution makes it.
        assert_eq!(bytes(&fused, 1), plain + 2 * (128 + 64));
        let next = ["run.device=cuda", "model.ttt.target=next_token"];
        assert_eq!(bytes(&next, 1), plain + 2 * (128 + 64 + 64));
        let unprojected = ["run.device=cuda", "model.ttt.projection=false"];
        assert_eq!(bytes(&unprojected, 1), plain + 2 * (128 + 64));
        // Targets from the MLP's input: its norm is kept.
        let hidden = ["run.device=cuda", "model.ttt.target=hidden"];
        assert_eq!(bytes(&hidden, 1), plain + 2 * (128 + 64 + 64));

        // x, its norm, q k v, q k before their norms, output, x, its norm, gate and up, Z.
        let reference = 64 + 64 + 128 + 96 + 64 + 64 + 64 + 256 + 128;
        assert_eq!(bytes(&[], 0), 4 * reference + 4 * 4);
        assert_eq!(bytes(&[], 1), 4 * (reference + 64) + 4 * 4);
        let wide = ["run.device=cuda", "train.compute=f32"];
        assert_eq!(bytes(&wide, 0), bytes(&[], 0));
        let llama = ["model.model_type=llama"];
        assert_eq!(bytes(&llama, 0), 4 * (reference - 96) + 4 * 4);
    }
}
