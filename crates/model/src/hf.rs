//! The one place that knows Hugging Face's `config.json`, both ways.
//!
//! A file that says something this model cannot do is refused: a key passed over would be a model
//! that computes something else.

mod export;
mod keys;
mod rope;

use serde_json::Value;

use crate::config::{LayerType, ModelConfig, ModelType, Target, TttConfig};
use keys::Keys;

pub use export::config_to_json;

/// A `config.json` that cannot be used, or a model that none describes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {0}")]
pub struct HfConfigError(String);

fn refuse<T>(problem: impl Into<String>) -> Result<T, HfConfigError> {
    Err(HfConfigError(problem.into()))
}

/// A size beyond any model; products of a few of these still fit 64 bits.
const MAX_SIZE: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;

/// Reads a `config.json` of type llama, mistral, qwen2 or qwen3 (the default when `model_type` is
/// absent), with or without the keys of the official In-Place TTT release (`ttt_mode`,
/// `ttt_layers`, ...). Absent keys have the defaults of transformers.
///
/// # Errors
/// For an unknown architecture, a missing or malformed key, a feature this model does not have, or
/// sizes that cannot be built.
pub fn config_from_json(json: &Value) -> Result<ModelConfig, HfConfigError> {
    let keys = Keys::new(json, "")?;
    let architecture = keys.text("model_type")?;
    let model_type = match architecture {
        None | Some("qwen3") => ModelType::Qwen3,
        Some("qwen2") => ModelType::Qwen2,
        // A mistral is a llama whose attention slides.
        Some("llama" | "mistral") => ModelType::Llama,
        Some(other) => {
            return refuse(format!(
                "model_type {other:?} is not supported: expected llama, mistral, qwen2 or qwen3"
            ));
        }
    };
    for key in ["attention_bias", "mlp_bias"] {
        if keys.flag(key)? == Some(true) {
            return refuse(format!("{key} = true is not supported"));
        }
    }
    if let Some(other) = keys.text("hidden_act")?.filter(|&act| act != "silu") {
        return refuse(format!("hidden_act {other:?} is not supported: silu is"));
    }
    if keys.real("attention_dropout")?.is_some_and(|p| p != 0.0) {
        return refuse("attention_dropout is not supported: set it to 0");
    }
    if keys.has("quantization_config") {
        return refuse("quantised weights are not supported: take the model's bf16 form");
    }

    let num_hidden_layers = keys.size("num_hidden_layers", MAX_LAYERS)?;
    let max_position_embeddings = match keys.number("max_position_embeddings")? {
        Some(positions) => positions,
        None => match architecture {
            Some("llama") => 2048,
            Some("mistral") => 131_072,
            _ => 32_768,
        },
    };
    let (rope_theta, rope_scaling) = rope::read(&keys, max_position_embeddings)?;
    let (sliding_window, layer_types) = windows(&keys, architecture, num_hidden_layers)?;
    let optional = |key| match keys.has(key) {
        true => keys.size(key, MAX_SIZE).map(Some),
        false => Ok(None),
    };
    let config = ModelConfig {
        model_type,
        vocab_size: keys.size("vocab_size", 1 << 28)?,
        hidden_size: keys.size("hidden_size", MAX_SIZE)?,
        intermediate_size: keys.size("intermediate_size", MAX_SIZE)?,
        num_hidden_layers,
        num_attention_heads: keys.size("num_attention_heads", MAX_SIZE)?,
        num_key_value_heads: optional("num_key_value_heads")?,
        // Qwen3's own default; the others divide the hidden size.
        head_dim: optional("head_dim")?.or((model_type == ModelType::Qwen3).then_some(128)),
        rms_norm_eps: keys.real("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        max_position_embeddings,
        tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        sliding_window,
        layer_types,
        initializer_range: keys.real("initializer_range")?.unwrap_or(0.02),
        ttt: ttt(&keys, num_hidden_layers)?,
    };
    if let Err(error) = config.validate() {
        return refuse(error.to_string());
    }
    let width = config.num_attention_heads * config.head_size();
    if width > 1 << 24 {
        return refuse(format!("attention of width {width} is beyond any model"));
    }
    Ok(config)
}

/// The sliding window and which layers have it.
fn windows(
    keys: &Keys,
    architecture: Option<&str>,
    layers: usize,
) -> Result<(Option<usize>, Option<Vec<LayerType>>), HfConfigError> {
    let window = keys.number("sliding_window")?;
    let switch = keys.flag("use_sliding_window")?;
    if let Some(types) = keys.list("layer_types")? {
        let types: Result<Vec<LayerType>, _> = types
            .iter()
            .map(|kind| serde_json::from_value(kind.clone()))
            .collect();
        let types = match types {
            Ok(types) => types,
            Err(error) => return refuse(format!("layer_types: {error}")),
        };
        let slides = types.contains(&LayerType::SlidingAttention);
        if slides && switch == Some(false) {
            return refuse("layer_types has sliding_attention, use_sliding_window is false");
        }
        return Ok((window.filter(|_| slides), Some(types)));
    }
    let (window, first) = match architecture {
        // All layers slide; the window has a default that only an explicit null takes away.
        Some("mistral") => {
            let default = (!keys.contains("sliding_window")).then_some(4096);
            return Ok((window.or(default), None));
        }
        // transformers' LLaMA has no window, so what is meant cannot be known.
        Some("llama") if window.is_some() => {
            return refuse(
                "a llama with sliding_window needs layer_types; if all layers slide, model_type is mistral",
            );
        }
        Some("llama") => return Ok((None, None)),
        // Qwen configurations name a window that `use_sliding_window` switches on, from layer
        // `max_window_layers` up.
        _ if switch != Some(true) => return Ok((None, None)),
        _ => (
            window.unwrap_or(4096),
            keys.number("max_window_layers")?.unwrap_or(28),
        ),
    };
    let kind = |layer| match layer >= first {
        true => LayerType::SlidingAttention,
        false => LayerType::FullAttention,
    };
    let types: Vec<LayerType> = (0..layers).map(kind).collect();
    let slides = types.contains(&LayerType::SlidingAttention);
    Ok((slides.then_some(window), Some(types)))
}

/// The keys of the official release; defaults are those of its training configuration class, but
/// for `ttt_mode`, whose default differs between its training and inference classes: absent is off.
fn ttt(keys: &Keys, depth: usize) -> Result<TttConfig, HfConfigError> {
    let plain = TttConfig::default();
    if keys.flag("ttt_mode")? != Some(true) {
        return Ok(plain);
    }
    let layers = match keys.list("ttt_layers")? {
        None => None,
        Some(list) => {
            let layer = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
            match list.iter().map(layer).collect::<Option<Vec<usize>>>() {
                Some(layers) => Some(layers),
                None => return refuse("ttt_layers must list whole numbers"),
            }
        }
    };
    if let Some(beyond) = layers.iter().flatten().find(|&&layer| layer >= depth) {
        let last = depth.saturating_sub(1);
        return refuse(format!(
            "ttt_layers: layer {beyond} does not exist: the model has {depth} layers, 0 to {last}; \
             the official files list one too many and pass over it in silence: remove it"
        ));
    }
    let target = match keys.text("ttt_target")? {
        None | Some("hidden_states") => Target::Hidden,
        Some("input_embed") => Target::Embedding,
        Some("next_token") => Target::NextToken,
        Some(other) => {
            return refuse(format!(
                "ttt_target {other:?} is not known: hidden_states and input_embed are"
            ));
        }
    };
    Ok(TttConfig {
        enabled: true,
        layers,
        every: None,
        chunk: keys.number("ttt_chunk")?.unwrap_or(8192),
        lr: keys.real("ttt_lr")?.unwrap_or(0.3),
        target,
        projection: keys.flag("ttt_proj")?.unwrap_or(true),
        // The last two are ours: the release fixes the kernel and has no clip.
        conv_kernel: match keys.has("ttt_conv_kernel") {
            true => keys.size("ttt_conv_kernel", MAX_SIZE)?,
            false => 5,
        },
        clip: keys.real("ttt_clip")?,
    })
}
