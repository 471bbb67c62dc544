//! Writing `config.json`: as transformers' own classes and the official release read it.

use serde_json::{Map, Value, json};

use crate::config::{LayerType, ModelConfig, ModelType, RopeScaling, Target};

use super::{HfConfigError, refuse};

/// The `config.json` of a model whose weights are stored as `dtype` (`"float32"`, `"bfloat16"`).
/// [`super::config_from_json`] reads it back to the same model.
///
/// RoPE's keys are those of transformers 4, which the official release is written for and which
/// later ones read too.
///
/// # Errors
/// If no class of transformers computes this model.
pub fn config_to_json(config: &ModelConfig, dtype: &str) -> Result<Value, HfConfigError> {
    let layers = config.num_hidden_layers;
    let sliding = |layer: &usize| config.window(*layer).is_some();
    let slides = (0..layers).filter(sliding).count();
    let (model_type, class) = match config.model_type {
        ModelType::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
        ModelType::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
        ModelType::Llama if slides == 0 => ("llama", "LlamaForCausalLM"),
        ModelType::Llama if slides == layers => ("mistral", "MistralForCausalLM"),
        ModelType::Llama => {
            return refuse(format!(
                "{slides} of {layers} layers slide: transformers has no llama with both kinds of attention; \
                 qwen3 has"
            ));
        }
    };
    let mut out = json!({
        "architectures": [class],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads(),
        "head_dim": config.head_size(),
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling.as_ref().map(rope_scaling),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "use_cache": true,
    });
    let keys = out.as_object_mut().expect("made as an object");
    match model_type {
        "llama" => drop(keys.insert("mlp_bias".into(), false.into())),
        "mistral" => drop(keys.insert("sliding_window".into(), config.sliding_window.into())),
        _ => qwen_windows(config, slides, keys),
    }
    if config.ttt.enabled {
        ttt(config, keys);
    }
    Ok(out)
}

fn qwen_windows(config: &ModelConfig, slides: usize, keys: &mut Map<String, Value>) {
    let layers = config.num_hidden_layers;
    let kind = |layer| match config.window(layer) {
        Some(_) => LayerType::SlidingAttention,
        None => LayerType::FullAttention,
    };
    let types: Vec<LayerType> = (0..layers).map(kind).collect();
    let window = config.sliding_window.filter(|_| slides > 0);
    keys.insert("layer_types".into(), json!(types));
    keys.insert("sliding_window".into(), window.into());
    keys.insert("use_sliding_window".into(), (slides > 0).into());
    // What releases before `layer_types` go by.
    let first = (0..layers).find(|&layer| config.window(layer).is_some());
    let first = first.unwrap_or(layers);
    keys.insert("max_window_layers".into(), first.into());
}

fn rope_scaling(scaling: &RopeScaling) -> Value {
    let mut out = serde_json::to_value(scaling).expect("numbers and strings are JSON");
    if let Some(keys) = out.as_object_mut() {
        // The name before 4.43.
        let kind = keys["rope_type"].clone();
        keys.insert("type".into(), kind);
    }
    out
}

fn ttt(config: &ModelConfig, keys: &mut Map<String, Value>) {
    let ttt = &config.ttt;
    let target = match ttt.target {
        Target::Hidden => "hidden_states",
        Target::Embedding => "input_embed",
        Target::NextToken => "next_token",
    };
    let official = [
        ("ttt_mode", json!(true)),
        ("ttt_layers", json!(config.ttt_layers())),
        ("ttt_chunk", json!(ttt.chunk)),
        ("ttt_lr", json!(ttt.lr)),
        ("ttt_proj", json!(ttt.projection)),
        ("ttt_target", json!(target)),
    ];
    let fixed_kernel = ttt.conv_taps().is_none_or(|taps| taps == 5);
    let kernel = (!fixed_kernel).then(|| ("ttt_conv_kernel", json!(ttt.conv_kernel)));
    let clip = ttt.clip.map(|clip| ("ttt_clip", json!(clip)));
    for (key, value) in official.into_iter().chain(kernel).chain(clip) {
        keys.insert(key.into(), value);
    }
}
