//! The one place that knows Hugging Face's `config.json`.

use serde_json::Value;

use crate::config::{LayerType, ModelConfig, ModelType, RopeScaling, Target, TttConfig};

/// A `config.json` that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {0}")]
pub struct HfConfigError(String);

fn refuse<T>(problem: impl Into<String>) -> Result<T, HfConfigError> {
    Err(HfConfigError(problem.into()))
}

/// Reads a `config.json` of type llama, qwen2 or qwen3 (the default when `model_type` is absent),
/// with or without the keys of the official In-Place TTT release (`ttt_mode`, `ttt_layers`, ...).
///
/// # Errors
/// For an unknown architecture, a missing or malformed key, a feature this model does not have, or
/// sizes that cannot be built.
pub fn config_from_json(json: &Value) -> Result<ModelConfig, HfConfigError> {
    let Some(keys) = json.as_object() else {
        return refuse("expected an object");
    };
    let get = |key: &str| keys.get(key).filter(|value| !value.is_null());
    let number = |key: &str| match get(key) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n) => Ok(Some(n as usize)),
            None => refuse(format!("{key} must be a whole number, got {value}")),
        },
    };
    let need = |key: &str| number(key)?.map_or_else(|| refuse(format!("{key} is missing")), Ok);
    let real = |key: &str, default: f64| match get(key) {
        None => Ok(default),
        Some(value) => value.as_f64().map_or_else(
            || refuse(format!("{key} must be a number, got {value}")),
            Ok,
        ),
    };
    let flag = |key: &str, default: bool| match get(key) {
        None => Ok(default),
        Some(value) => value.as_bool().map_or_else(
            || refuse(format!("{key} must be true or false, got {value}")),
            Ok,
        ),
    };

    let model_type = match get("model_type").map(|v| v.as_str().unwrap_or_default()) {
        None | Some("qwen3") => ModelType::Qwen3,
        Some("qwen2") => ModelType::Qwen2,
        Some("llama") => ModelType::Llama,
        Some(other) => {
            return refuse(format!(
                "model_type {other:?} is not supported: expected llama, qwen2 or qwen3"
            ));
        }
    };
    for key in ["attention_bias", "mlp_bias"] {
        if flag(key, false)? {
            return refuse(format!("{key} = true is not supported"));
        }
    }
    match get("hidden_act").map(|v| v.as_str().unwrap_or_default()) {
        None | Some("silu") => {}
        Some(other) => return refuse(format!("hidden_act {other:?} is not supported: silu is")),
    }

    let num_hidden_layers = need("num_hidden_layers")?;
    let (rope_theta, rope_scaling) = rope(json)?;
    let (sliding_window, layer_types) = windows(json, model_type, num_hidden_layers)?;
    let config = ModelConfig {
        model_type,
        vocab_size: need("vocab_size")?,
        hidden_size: need("hidden_size")?,
        intermediate_size: need("intermediate_size")?,
        num_hidden_layers,
        num_attention_heads: need("num_attention_heads")?,
        num_key_value_heads: number("num_key_value_heads")?,
        // Qwen3's own default; LLaMA and Qwen2 divide the hidden size.
        head_dim: number("head_dim")?.or((model_type == ModelType::Qwen3).then_some(128)),
        rms_norm_eps: real("rms_norm_eps", 1e-6)?,
        rope_theta,
        rope_scaling,
        max_position_embeddings: number("max_position_embeddings")?.unwrap_or(2048),
        tie_word_embeddings: flag("tie_word_embeddings", false)?,
        sliding_window,
        layer_types,
        initializer_range: real("initializer_range", 0.02)?,
        ttt: ttt(json)?,
    };
    match config.validate() {
        Ok(()) => Ok(config),
        Err(error) => refuse(error.to_string()),
    }
}

/// RoPE's base and scaling; transformers 5 keeps both in `rope_parameters`.
fn rope(json: &Value) -> Result<(f64, Option<RopeScaling>), HfConfigError> {
    let nested = ["rope_parameters", "rope_scaling"]
        .into_iter()
        .map(|key| &json[key])
        .find(|value| !value.is_null())
        .unwrap_or(&Value::Null);
    let theta = [&nested["rope_theta"], &json["rope_theta"]]
        .into_iter()
        .find(|value| !value.is_null());
    let theta = match theta {
        None => 10_000.0,
        Some(value) => match value.as_f64() {
            Some(theta) => theta,
            None => return refuse(format!("rope_theta must be a number, got {value}")),
        },
    };
    let kind = nested["rope_type"].as_str().or(nested["type"].as_str());
    let Some(kind) = kind.filter(|&kind| kind != "default") else {
        return Ok((theta, None));
    };
    let need = |key: &str| {
        nested[key].as_f64().map_or_else(
            || refuse(format!("rope scaling {kind:?} needs the number {key}")),
            Ok,
        )
    };
    let or = |key: &str, default: f64| match &nested[key] {
        Value::Null => Ok(default),
        _ => need(key),
    };
    let original = match &nested["original_max_position_embeddings"] {
        Value::Null => &json["max_position_embeddings"],
        value => value,
    };
    let Some(original) = original.as_u64() else {
        return refuse(format!(
            "rope scaling {kind:?} needs original_max_position_embeddings"
        ));
    };
    let original_max_position_embeddings = original as usize;
    let scaling = match kind {
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings,
        },
        "yarn" => {
            for key in ["mscale", "mscale_all_dim", "truncate"] {
                if !nested[key].is_null() {
                    return refuse(format!("rope scaling key {key} is not supported"));
                }
            }
            RopeScaling::Yarn {
                factor: need("factor")?,
                original_max_position_embeddings,
                beta_fast: or("beta_fast", 32.0)?,
                beta_slow: or("beta_slow", 1.0)?,
                attention_factor: match &nested["attention_factor"] {
                    Value::Null => None,
                    _ => Some(need("attention_factor")?),
                },
            }
        }
        other => {
            return refuse(format!(
                "rope scaling {other:?} is not supported: llama3 and yarn are"
            ));
        }
    };
    Ok((theta, Some(scaling)))
}

/// The sliding window and which layers have it.
fn windows(
    json: &Value,
    model_type: ModelType,
    layers: usize,
) -> Result<(Option<usize>, Option<Vec<LayerType>>), HfConfigError> {
    let window = json["sliding_window"].as_u64().map(|w| w as usize);
    if let Value::Array(types) = &json["layer_types"] {
        let types = types
            .iter()
            .map(|t| serde_json::from_value(t.clone()))
            .collect::<Result<Vec<LayerType>, _>>();
        return match types {
            Ok(types) => {
                let slides = types.contains(&LayerType::SlidingAttention);
                Ok((window.filter(|_| slides), Some(types)))
            }
            Err(error) => refuse(format!("layer_types: {error}")),
        };
    }
    // Qwen configurations name a window that `use_sliding_window` switches on, from layer
    // `max_window_layers` up.
    let on = match model_type {
        ModelType::Llama => window.is_some(),
        _ => json["use_sliding_window"].as_bool().unwrap_or(false),
    };
    let (Some(window), true) = (window, on) else {
        return Ok((None, None));
    };
    let first = json["max_window_layers"].as_u64().unwrap_or(0) as usize;
    let kind = |layer| match layer >= first {
        true => LayerType::SlidingAttention,
        false => LayerType::FullAttention,
    };
    Ok((Some(window), Some((0..layers).map(kind).collect())))
}

/// The keys of the official release; defaults are those of its training configuration class.
fn ttt(json: &Value) -> Result<TttConfig, HfConfigError> {
    let plain = TttConfig::default();
    let enabled = json["ttt_mode"].as_bool().unwrap_or(false);
    if !enabled {
        return Ok(plain);
    }
    let layers = match &json["ttt_layers"] {
        Value::Null => None,
        Value::Array(list) => {
            let layers: Option<Vec<usize>> = list
                .iter()
                .map(|v| v.as_u64().map(|n| n as usize))
                .collect();
            match layers {
                Some(layers) => Some(layers),
                None => return refuse("ttt_layers must list whole numbers"),
            }
        }
        other => return refuse(format!("ttt_layers must be a list, got {other}")),
    };
    let target = match json["ttt_target"].as_str() {
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
        enabled,
        layers,
        every: None,
        chunk: json["ttt_chunk"].as_u64().unwrap_or(8192) as usize,
        lr: json["ttt_lr"].as_f64().unwrap_or(0.3),
        target,
        projection: json["ttt_proj"].as_bool().unwrap_or(true),
        conv_kernel: json["ttt_conv_kernel"].as_u64().unwrap_or(5) as usize,
        clip: None,
    })
}
