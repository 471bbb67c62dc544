//! `config.json`, in the forms that transformers 4 and 5 and the official release write it.

use proptest::prelude::*;
use serde_json::{Value, json};
use ttt_model::hf::{config_from_json, config_to_json};
use ttt_model::{LayerType, ModelConfig, ModelType, RopeScaling, Target};

/// Some keys of every configuration, with `more` on top.
fn json_with(model_type: &str, more: Value) -> Value {
    let mut json = json!({
        "model_type": model_type, "vocab_size": 97, "hidden_size": 48, "intermediate_size": 112,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    });
    merge(&mut json, more);
    json
}

fn merge(json: &mut Value, more: Value) {
    let more = more.as_object().expect("an object").clone();
    json.as_object_mut().expect("an object").extend(more);
}

fn read(json: &Value) -> ModelConfig {
    config_from_json(json).unwrap_or_else(|error| panic!("{error}: {json}"))
}

fn refusal(json: &Value) -> String {
    match config_from_json(json) {
        Ok(_) => panic!("must be refused: {json}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn absent_keys_have_the_defaults_of_transformers() {
    for (model_type, head, positions, window) in [
        ("llama", 12, 2048, None),
        ("mistral", 12, 131_072, Some(4096)),
        ("qwen2", 12, 32_768, None),
        ("qwen3", 128, 32_768, None),
    ] {
        let config = read(&json_with(model_type, json!({})));
        assert_eq!(config.head_size(), head, "{model_type}");
        assert_eq!(config.max_position_embeddings, positions, "{model_type}");
        assert_eq!(config.window(2), window, "{model_type}");
        assert_eq!((config.rope_theta, config.rms_norm_eps), (1e4, 1e-6));
        assert!(!config.tie_word_embeddings && !config.ttt.enabled);
    }
}

#[test]
fn rope_is_read_in_both_forms() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let old = json_with("llama", json!({"rope_theta": 5e5, "rope_scaling": scaling}));
    let mut nested = scaling.clone();
    merge(&mut nested, json!({"rope_theta": 5e5}));
    let new = json_with("llama", json!({"rope_parameters": nested}));
    assert_eq!(read(&old), read(&new));
    assert_eq!(read(&new).rope_theta, 5e5);
    assert!(matches!(
        read(&new).rope_scaling,
        Some(RopeScaling::Llama3 { factor: 8.0, .. })
    ));

    let plain = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}});
    let plain = read(&json_with("qwen3", plain));
    assert_eq!((plain.rope_theta, plain.rope_scaling), (1e6, None));

    let mut both = old;
    merge(&mut both, json!({"rope_parameters": {"rope_theta": 1e4}}));
    assert!(refusal(&both).contains("both rope_parameters and rope_scaling"));
}

#[test]
fn yarn_takes_what_is_absent_from_the_model() {
    let yarn = |more: Value| {
        let mut scaling = json!({"type": "yarn", "factor": 4.0});
        merge(&mut scaling, more);
        let keys = json!({"max_position_embeddings": 512, "rope_scaling": scaling});
        read(&json_with("qwen3", keys)).rope_scaling
    };
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 512,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
    };
    assert_eq!(yarn(json!({})), Some(expected));
    let Some(RopeScaling::Yarn {
        attention_factor, ..
    }) = yarn(json!({"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": true}))
    else {
        panic!("yarn");
    };
    let ln = 4f64.ln();
    assert_eq!(attention_factor, Some((1.0 + 0.1 * ln) / (1.0 + 0.05 * ln)));
}

#[test]
fn windows_follow_each_architecture() {
    use LayerType::{FullAttention as Full, SlidingAttention as Sliding};
    let qwen = json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 1});
    let config = read(&json_with("qwen2", qwen));
    assert_eq!(config.layer_types, Some(vec![Full, Sliding, Sliding]));
    assert_eq!((config.window(0), config.window(2)), (None, Some(7)));
    // Named, but not switched on, as in the published Qwen2.5.
    let off = json!({"use_sliding_window": false, "sliding_window": 7, "max_window_layers": 1});
    assert_eq!(read(&json_with("qwen2", off)).window(2), None);
    let null = json!({"sliding_window": null});
    assert_eq!(read(&json_with("mistral", null)).window(2), None);
    let types = json!({
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    });
    assert_eq!(read(&json_with("llama", types.clone())).window(0), Some(7));
    let mut contradictory = types;
    merge(&mut contradictory, json!({"use_sliding_window": false}));
    assert!(refusal(&json_with("qwen3", contradictory)).contains("use_sliding_window is false"));
    let error = refusal(&json_with("llama", json!({"sliding_window": 7})));
    assert!(error.contains("needs layer_types"), "{error}");
}

#[test]
fn what_this_model_cannot_do_is_refused() {
    for (more, says) in [
        (
            json!({"model_type": "gpt2"}),
            "model_type \"gpt2\" is not supported",
        ),
        (json!({"model_type": 3}), "model_type must be a string"),
        (json!({"attention_bias": true}), "attention_bias = true"),
        (json!({"hidden_act": "gelu"}), "hidden_act \"gelu\""),
        (json!({"attention_dropout": 0.1}), "attention_dropout"),
        (json!({"quantization_config": {}}), "quantised"),
        (
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        (json!({"rope_theta": "1e6"}), "rope_theta must be a number"),
        (json!({"rope_theta": 0.5}), "rope_theta must be above 1"),
        (
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2}}),
            "\"linear\" is not",
        ),
        (
            json!({"rope_scaling": {"rope_type": "yarn"}}),
            "rope_scaling.factor is missing",
        ),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": -1}}),
            "above 0",
        ),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": false}}),
            "truncate",
        ),
        (
            json!({"rope_parameters": {"full_attention": {}}}),
            "full_attention is not supported",
        ),
        (json!({"rope_parameters": 7}), "expected an object"),
        (json!({"hidden_size": null}), "hidden_size is missing"),
        (
            json!({"hidden_size": -1}),
            "hidden_size must be a whole number, got -1",
        ),
        (
            json!({"hidden_size": 1u64 << 40}),
            "hidden_size must be 1 to",
        ),
        (
            json!({"num_hidden_layers": 0}),
            "num_hidden_layers must be 1 to",
        ),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (
            json!({"head_dim": 1 << 20, "num_attention_heads": 1 << 20}),
            "beyond any model",
        ),
        (
            json!({"sliding_window": "7"}),
            "sliding_window must be a whole number",
        ),
        (
            json!({"layer_types": ["linear_attention"]}),
            "layer_types: unknown variant",
        ),
        (json!({"layer_types": ["full_attention"]}), "lists 1 layers"),
        (json!({"ttt_mode": 1}), "ttt_mode must be true or false"),
        (
            json!({"ttt_mode": true, "ttt_layers": [0.5]}),
            "must list whole numbers",
        ),
        (
            json!({"ttt_mode": true, "ttt_layers": [0, 3]}),
            "layer 3 does not exist",
        ),
        (
            json!({"ttt_mode": true, "ttt_target": "x"}),
            "ttt_target \"x\"",
        ),
        (
            json!({"ttt_mode": true, "ttt_chunk": "x"}),
            "ttt_chunk must be a whole number",
        ),
        (json!({"ttt_mode": true, "ttt_chunk": 0}), "ttt.chunk"),
    ] {
        let error = refusal(&json_with("llama", more.clone()));
        assert!(error.contains(says), "{more}: {error}");
        assert!(error.starts_with("config.json: "), "{error}");
    }
    assert!(refusal(&json!([])).contains("expected an object"));
}

#[test]
fn the_official_keys_mean_what_the_release_means() {
    let ttt = read(&json_with("qwen3", json!({"ttt_mode": true}))).ttt;
    assert_eq!((ttt.chunk, ttt.lr, ttt.projection), (8192, 0.3, true));
    assert_eq!(
        (ttt.target, ttt.conv_kernel, ttt.clip),
        (Target::Hidden, 5, None)
    );
    let all = json!({
        "ttt_mode": true, "ttt_layers": [0, 2], "ttt_chunk": 8, "ttt_lr": 3, "ttt_proj": false,
        "ttt_target": "input_embed",
    });
    let config = read(&json_with("qwen3", all));
    assert_eq!(config.ttt_layers(), [0, 2]);
    assert_eq!(
        (config.ttt.chunk, config.ttt.lr, config.ttt.projection),
        (8, 3.0, false)
    );
    assert_eq!(config.ttt.target, Target::Embedding);
}

#[test]
fn a_llama_with_both_kinds_of_attention_has_no_class_to_be_exported_to() {
    let mut config = read(&json_with("llama", json!({})));
    config.sliding_window = Some(7);
    assert_eq!(
        config_to_json(&config, "float32").unwrap()["model_type"],
        "mistral"
    );
    let types = [
        LayerType::FullAttention,
        LayerType::SlidingAttention,
        LayerType::FullAttention,
    ];
    config.layer_types = Some(types.to_vec());
    let error = config_to_json(&config, "float32").unwrap_err().to_string();
    assert!(error.contains("1 of 3 layers slide"), "{error}");
    config.model_type = ModelType::Qwen3;
    assert!(config_to_json(&config, "float32").is_ok());
}

/// What a configuration computes, whatever way it is written.
fn meaning(config: &ModelConfig) -> (ModelConfig, Vec<Option<usize>>) {
    let windows: Vec<_> = (0..config.num_hidden_layers)
        .map(|l| config.window(l))
        .collect();
    let mut plain = config.clone();
    plain.num_key_value_heads = Some(config.kv_heads());
    plain.head_dim = Some(config.head_size());
    plain.sliding_window = None;
    plain.layer_types = None;
    plain.ttt.layers = config.ttt.enabled.then(|| config.ttt_layers());
    plain.ttt.every = None;
    (plain, windows)
}

fn any_rope() -> impl Strategy<Value = Option<RopeScaling>> {
    let factor = || 1.0..64.0f64;
    prop_oneof![
        Just(None),
        (factor(), 1..9000usize).prop_map(|(factor, original)| Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        })),
        (factor(), 1..9000usize, prop::option::of(0.1..3.0f64)).prop_map(
            |(factor, original, attention_factor)| Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor,
            })
        ),
    ]
}

fn any_config() -> impl Strategy<Value = ModelConfig> {
    let family = prop::sample::select(vec!["llama", "mistral", "qwen2", "qwen3"]);
    let ttt = (
        prop::bool::ANY,
        1..5000usize,
        0.0..4.0f64,
        prop::sample::select(vec![Target::Hidden, Target::Embedding, Target::NextToken]),
        prop::bool::ANY,
        prop::option::of(1..3usize),
        prop::option::of(1e-6..1.0f64),
    );
    let windows = (
        prop::option::of(1..99usize),
        prop::collection::vec(prop::bool::ANY, 3),
    );
    (family, any_rope(), ttt, windows, prop::bool::ANY).prop_map(
        |(family, rope_scaling, ttt, (window, slides), tied)| {
            let mut config = read(&json_with(family, json!({"sliding_window": null})));
            config.rope_scaling = rope_scaling;
            config.tie_word_embeddings = tied;
            let (enabled, chunk, lr, target, projection, every, clip) = ttt;
            if enabled {
                config.ttt.enabled = true;
                (config.ttt.chunk, config.ttt.lr, config.ttt.target) = (chunk, lr, target);
                (config.ttt.projection, config.ttt.every, config.ttt.clip) =
                    (projection, every, clip);
            }
            match family {
                "mistral" => config.sliding_window = window,
                "qwen2" | "qwen3" if window.is_some() && slides.contains(&true) => {
                    config.sliding_window = window;
                    let kind = |&slides: &bool| match slides {
                        true => LayerType::SlidingAttention,
                        false => LayerType::FullAttention,
                    };
                    config.layer_types = Some(slides.iter().map(kind).collect());
                }
                _ => {}
            }
            config
        },
    )
}

/// JSON that has the known keys with values of any kind.
fn any_json() -> impl Strategy<Value = Value> {
    let keys = || {
        prop::sample::select(vec![
            "model_type",
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "rope_type",
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "mscale",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
            "ttt_mode",
            "ttt_layers",
            "ttt_chunk",
            "ttt_lr",
            "ttt_target",
            "ttt_conv_kernel",
            "ttt_clip",
        ])
    };
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0..5u64).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec![
            "yarn",
            "llama3",
            "llama",
            "qwen2",
            "full_attention",
            "x"
        ])
        .prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(2, 8, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((keys(), inner), 0..4).prop_map(|pairs| Value::Object(
                pairs.into_iter().map(|(k, v)| (k.into(), v)).collect()
            )),
        ]
    });
    let keys = keys();
    prop::collection::vec((keys, value), 0..6).prop_map(|pairs| {
        let mut json = json_with("qwen3", json!({}));
        let changes = pairs
            .into_iter()
            .map(|(key, value)| (key.to_string(), value));
        merge(&mut json, Value::Object(changes.collect()));
        json
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn export_and_import_give_the_same_model(config in any_config()) {
        let json = config_to_json(&config, "bfloat16").expect("these all have a class");
        prop_assert_eq!(meaning(&read(&json)), meaning(&config));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(50_000) })]

    /// Whatever is accepted can be listed and written back.
    #[test]
    fn hostile_configurations_never_panic(json in any_json()) {
        if let Ok(config) = config_from_json(&json) {
            // Layers are alike; a few show all that their sizes can do.
            let few = ModelConfig { num_hidden_layers: config.num_hidden_layers.min(3), layer_types: None,
                ttt: Default::default(), ..config.clone() };
            for spec in ttt_model::params::all_params(&few) {
                prop_assert!(spec.shape.iter().try_fold(4usize, |n, &s| n.checked_mul(s)).is_some());
            }
            ttt_model::rope::frequencies(&config);
            let _ = config_to_json(&config, "float32");
        }
    }
}
