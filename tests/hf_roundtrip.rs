//! Folders of other programs become checkpoints and checkpoints become folders, bit for bit; what
//! does not fit is refused before anything is read.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde_json::{Value, json};
use tempfile::TempDir;
use ttt_kernels::testing::{relative_error_of, values};
use ttt_model::decode::Decoder;
use ttt_model::hf::{config_from_json, config_to_json};
use ttt_model::params::all_params;
use ttt_model::{ModelConfig, Params, Target, Unit};
use ttt_train::checkpoint::Checkpoint;
use ttt_train::interop::{ExportDtype, ExportOptions, HfFolder, InitFrom, export, import};
use ttt_weights::{Dtype, Folder, TensorSpec, Writer};

const CASES: [&str; 7] = [
    "llama3_tied_bf16",
    "llama3_untied",
    "mistral_window_f16",
    "qwen2_bias_sharded",
    "qwen3",
    "qwen3_window",
    "qwen3_yarn_tied",
];

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/hf")
        .join(name)
}

/// Every tensor's bits, as f32.
fn bits(folder: &Folder) -> BTreeMap<String, Vec<u32>> {
    let read = |name: &str| {
        let shape = folder.info(name).expect(name).shape;
        let mut out = vec![0f32; shape.iter().product()];
        folder.read_f32(name, &mut out).expect(name);
        out.iter().map(|x| x.to_bits()).collect()
    };
    folder
        .names()
        .map(|name| (name.to_string(), read(name)))
        .collect()
}

fn options(dtype: ExportDtype, max_shard_bytes: u64) -> ExportOptions {
    ExportOptions {
        dtype,
        max_shard_bytes,
    }
}

/// What a configuration computes, whatever way it is written.
fn meaning(config: &ModelConfig) -> Value {
    let mut plain = config.clone();
    plain.num_key_value_heads = Some(config.kv_heads());
    plain.head_dim = Some(config.head_size());
    plain.layer_types = None;
    let windows: Vec<_> = (0..config.num_hidden_layers)
        .map(|l| config.window(l))
        .collect();
    json!([plain, windows])
}

#[test]
fn import_and_export_give_back_the_same_bits() {
    for name in CASES {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        import(&case(name), &at("checkpoint")).unwrap();
        // Small shards, so that there are several whatever the case has.
        export(
            &at("checkpoint"),
            &at("f32"),
            &options(ExportDtype::F32, 30_000),
        )
        .unwrap();
        assert!(at("f32/model.safetensors.index.json").is_file(), "{name}");
        let original = HfFolder::open(&case(name)).unwrap();
        let exported = HfFolder::open(&at("f32")).unwrap();
        assert_eq!(bits(&original.weights), bits(&exported.weights), "{name}");
        assert_eq!(
            meaning(&original.config),
            meaning(&exported.config),
            "{name}"
        );

        import(&at("f32"), &at("again")).unwrap();
        let files = |checkpoint: &str| {
            let manifest = fs::read(at(checkpoint).join("manifest.json")).unwrap();
            let manifest: Value = serde_json::from_slice(&manifest).unwrap();
            let mut files = manifest["files"].as_array().unwrap().clone();
            files.retain(|file| file["name"] != "config.toml"); // names its own run's folder
            files
        };
        assert_eq!(files("checkpoint"), files("again"), "{name}");
    }
}

#[test]
fn bf16_comes_back_as_the_same_bytes() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    import(&case("llama3_tied_bf16"), &at("checkpoint")).unwrap();
    export(&at("checkpoint"), &at("bf16"), &ExportOptions::default()).unwrap();
    let (original, exported) = (case("llama3_tied_bf16"), at("bf16"));
    let (original, exported) = (
        Folder::open(&original).unwrap(),
        Folder::open(&exported).unwrap(),
    );
    for name in original.names() {
        assert_eq!(exported.info(name), original.info(name), "{name}");
        assert_eq!(
            *exported.bytes(name).unwrap(),
            *original.bytes(name).unwrap(),
            "{name}"
        );
    }
    let config = fs::read_to_string(at("bf16/config.json")).unwrap();
    assert!(config.contains(r#""torch_dtype": "bfloat16""#), "{config}");
}

/// A small qwen3 with TTT layers, every parameter random.
fn ttt_config(target: Target) -> ModelConfig {
    let mut config = HfFolder::open(&case("qwen3")).unwrap().config;
    config.ttt.enabled = true;
    config.ttt.layers = Some(vec![1]);
    (config.ttt.chunk, config.ttt.lr, config.ttt.target) = (8, 0.5, target);
    config
}

/// Some values that are neither equal nor symmetric: gains about 1, the rest about 0.
fn pattern(name: &str, len: usize) -> Vec<f32> {
    let seed = name
        .bytes()
        .fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let mean = if name.contains("norm") { 1.0 } else { 0.0 };
    // Quadratic, so that rows are not shifted copies of each other.
    let phase = |i: usize| (i as f32 + 1.0) * 0.37 + (i * i % 1009) as f32 + (seed % 1000) as f32;
    (0..len).map(|i| mean + phase(i).sin() * 0.3).collect()
}

/// Saves a model of this configuration as transformers would.
fn save(config: &ModelConfig, dir: &Path) {
    let specs = all_params(config);
    let plan = specs.iter().map(|spec| TensorSpec {
        name: spec.name.clone(),
        shape: spec.shape.clone(),
        dtype: Dtype::F32,
    });
    let mut writer =
        Writer::create(dir, "model", plan.collect(), u64::MAX, HashMap::new()).unwrap();
    for spec in &specs {
        writer
            .append_f32(&spec.name, &pattern(&spec.name, spec.len()))
            .unwrap();
    }
    writer.finish().unwrap();
    let json = config_to_json(config, "float32").unwrap();
    fs::write(dir.join("config.json"), json.to_string()).unwrap();
}

#[test]
fn ttt_layers_travel_under_the_official_names() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let config = ttt_config(Target::Hidden);
    save(&config, &at("official"));
    import(&at("official"), &at("checkpoint")).unwrap();
    let exported = export(
        &at("checkpoint"),
        &at("out"),
        &options(ExportDtype::F32, u64::MAX),
    )
    .unwrap();
    assert!(
        exported.notes[0].contains("compute the base model"),
        "{:?}",
        exported.notes
    );

    let weights = bits(&Folder::open(&at("out")).unwrap());
    assert_eq!(bits(&Folder::open(&at("official")).unwrap()), weights);
    for name in ["ttt_conv", "ttt_proj"] {
        let name = format!("model.layers.1.mlp.{name}.weight");
        assert!(weights.contains_key(&name), "{name}");
    }
    let json: Value = serde_json::from_slice(&fs::read(at("out/config.json")).unwrap()).unwrap();
    let expected = [
        ("ttt_mode", json!(true)),
        ("ttt_layers", json!([1])),
        ("ttt_chunk", json!(8)),
        ("ttt_lr", json!(0.5)),
        ("ttt_proj", json!(true)),
        ("ttt_target", json!("hidden_states")),
    ];
    for (key, value) in expected {
        assert_eq!(json[key], value, "{key}");
    }
}

/// A tokenizer of a few words whose largest id is `ids` − 1.
fn tokenizer(ids: usize) -> String {
    let mut vocab: serde_json::Map<String, Value> =
        (1..ids).map(|id| (format!("w{id}"), id.into())).collect();
    vocab.insert("<|endoftext|>".into(), 0.into());
    json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 0, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w1"},
    })
    .to_string()
}

#[test]
fn the_tokenizer_and_generation_settings_travel_along() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    save(&ttt_config(Target::Hidden), &at("source"));
    let files = [
        ("tokenizer.json", tokenizer(101)),
        (
            "tokenizer_config.json",
            r#"{"chat_template":"{{ x }}"}"#.to_string(),
        ),
        (
            "generation_config.json",
            r#"{"eos_token_id":[5,6],"bos_token_id":4}"#.to_string(),
        ),
    ];
    for (name, content) in &files {
        fs::write(at("source").join(name), content).unwrap();
    }
    import(&at("source"), &at("checkpoint")).unwrap();
    export(&at("checkpoint"), &at("out"), &ExportOptions::default()).unwrap();
    for (name, content) in &files {
        assert_eq!(&fs::read_to_string(at("out").join(name)).unwrap(), content);
    }
    let json: Value = serde_json::from_slice(&fs::read(at("out/config.json")).unwrap()).unwrap();
    assert_eq!(
        (&json["eos_token_id"], &json["bos_token_id"]),
        (&json!([5, 6]), &json!(4))
    );

    // A tokenizer alone gets the settings that make other programs read it as it is.
    fs::remove_file(at("source/tokenizer_config.json")).unwrap();
    fs::remove_file(at("source/generation_config.json")).unwrap();
    import(&at("source"), &at("checkpoint-2")).unwrap();
    export(&at("checkpoint-2"), &at("out-2"), &ExportOptions::default()).unwrap();
    let read = |name: &str| fs::read_to_string(at("out-2").join(name)).unwrap();
    assert!(read("tokenizer_config.json").contains("PreTrainedTokenizerFast"));
    assert!(read("generation_config.json").contains(r#""eos_token_id": 0"#));

    fs::write(at("source/tokenizer.json"), tokenizer(102)).unwrap();
    let error = import(&at("source"), &at("checkpoint-3"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("102 ids, the model's vocab_size is 101"),
        "{error}"
    );
}

#[test]
fn an_imported_checkpoint_is_a_checkpoint() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("checkpoint");
    import(&case("qwen3_window"), &path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.progress.step, 0);
    let original = HfFolder::open(&case("qwen3_window")).unwrap();
    assert_eq!(meaning(&checkpoint.config.model), meaning(&original.config));
    let again = import(&case("qwen3_window"), &path)
        .unwrap_err()
        .to_string();
    assert!(again.contains("already exists"), "{again}");

    // A flipped bit anywhere shows.
    let file = path.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let error = export(&path, &dir.path().join("out"), &ExportOptions::default()).unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
    assert!(!dir.path().join("out").exists());
}

/// Logits of a model filled from a folder.
fn logits(config: &ModelConfig, weights: &Folder, ids: &[u32]) -> Vec<f64> {
    let device = Device::default();
    let plan = InitFrom::plan(config, weights, 3).unwrap();
    let unit = |unit: Unit| {
        let specs = unit.params(config);
        let flat = specs.iter().map(|spec| {
            let data = TensorData::new(plan.values(&spec.name).unwrap(), [spec.len()]);
            Tensor::from_data(data, &device)
        });
        Params::new(specs.clone(), flat.collect())
    };
    let units = Unit::all(config).into_iter().map(unit).collect();
    let decoder = Decoder::new(config, units, DType::F32, &device);
    values(&decoder.extend(&mut decoder.session(), ids))
}

#[test]
fn new_ttt_layers_change_nothing_at_first() {
    let folder = HfFolder::open(&case("qwen3")).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % 101).collect();
    let base = logits(&folder.config, &folder.weights, &ids);
    for target in [Target::Hidden, Target::Embedding, Target::NextToken] {
        let config = ttt_config(target);
        let plan = InitFrom::plan(&config, &folder.weights, 3).unwrap();
        assert!(plan.new_parameters().count() >= 1);
        assert!(plan.iter().all(|value| value.is_ok()));
        // The new layers compute chunk by chunk, which sums in another order than the base does;
        // without an inner learning rate they still do, so against that nothing may move.
        let with = logits(&config, &folder.weights, &ids);
        let mut off = config.clone();
        off.ttt.lr = 0.0;
        assert_eq!(with, logits(&off, &folder.weights, &ids), "{target:?}");
        let error = relative_error_of(&with, &base);
        assert!(error < 1e-6, "{target:?}: {error:.1e}");
    }
    // The comparison sees TTT layers that do something.
    let dir = TempDir::new().unwrap();
    save(&ttt_config(Target::Hidden), dir.path());
    let trained = HfFolder::open(dir.path()).unwrap();
    let mut off = trained.config.clone();
    let on = logits(&trained.config, &trained.weights, &ids);
    off.ttt.lr = 0.0;
    assert_ne!(on, logits(&off, &trained.weights, &ids));
}

/// Saves the tensors of `from` that `keep` keeps, under the names it gives them.
fn resave(from: &Folder, dir: &Path, keep: impl Fn(&str) -> Vec<String>) -> Folder {
    let mut specs = vec![];
    let mut data = vec![];
    for name in from.names() {
        let info = from.info(name).unwrap();
        for new in keep(name) {
            specs.push(TensorSpec {
                name: new.clone(),
                shape: info.shape.clone(),
                dtype: info.dtype,
            });
            data.push((new, from.bytes(name).unwrap().to_vec()));
        }
    }
    let mut writer = Writer::create(dir, "model", specs, u64::MAX, HashMap::new()).unwrap();
    for (name, bytes) in data {
        writer.append_bytes(&name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    Folder::open(dir).unwrap()
}

#[test]
fn weights_that_do_not_fit_the_model_are_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let refused = |config: &ModelConfig, weights: &Folder, says: &str| {
        let error = InitFrom::plan(config, weights, 0).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let base = HfFolder::open(&case("qwen3")).unwrap();
    save(&ttt_config(Target::Hidden), &dir.path().join("ttt"));
    let ttt = HfFolder::open(&dir.path().join("ttt")).unwrap();
    let keep_all = |name: &str| vec![name.to_string()];

    let mut wider = base.config.clone();
    wider.intermediate_size += 8;
    refused(
        &wider,
        &base.weights,
        "tensor model.layers.0.mlp.gate_proj.weight has shape [56, 32], the model's is [64, 32]",
    );
    let mut deeper = base.config.clone();
    deeper.num_hidden_layers = 3;
    refused(
        &deeper,
        &base.weights,
        "model.layers.2.self_attn.q_proj.weight",
    );
    refused(&deeper, &base.weights, "and 8 more of the model");
    let mut shallower = base.config.clone();
    shallower.num_hidden_layers = 1;
    refused(&shallower, &base.weights, "which the model has no use for");
    refused(&base.config, &ttt.weights, "do ttt.layers");
    let mut no_projection = ttt.config.clone();
    no_projection.ttt.projection = false;
    refused(
        &no_projection,
        &ttt.weights,
        "ttt_proj.weight, which the model has no use for",
    );
    let half = resave(&ttt.weights, &dir.path().join("half"), |name| {
        let keep = !name.ends_with("ttt_conv.weight");
        keep.then(|| name.to_string()).into_iter().collect()
    });
    refused(
        &ttt.config,
        &half,
        "lacks model.layers.1.mlp.ttt_conv.weight of the model; do ttt.projection",
    );

    let tied = HfFolder::open(&case("qwen3_yarn_tied")).unwrap();
    let mut untied = tied.config.clone();
    untied.tie_word_embeddings = false;
    refused(
        &untied,
        &tied.weights,
        "lacks lm_head.weight of the model; is its head the embedding",
    );
    // A tied head that is stored all the same is checked, not trusted.
    let both = |name: &str| match name {
        "model.embed_tokens.weight" => vec![name.to_string(), "lm_head.weight".to_string()],
        _ => keep_all(name),
    };
    let same = resave(&tied.weights, &dir.path().join("same"), both);
    let plan = InitFrom::plan(&tied.config, &same, 0).unwrap();
    assert!(plan.values("model.embed_tokens.weight").is_ok());
    let mut tied_base = base.config.clone();
    tied_base.tie_word_embeddings = true;
    let plan = InitFrom::plan(&tied_base, &base.weights, 0).unwrap();
    let error = plan
        .values("model.embed_tokens.weight")
        .unwrap_err()
        .to_string();
    assert!(error.contains("lm_head.weight differs"), "{error}");
    // RoPE's frequencies, as older files hold them, follow from the configuration.
    let buffers = |name: &str| match name {
        "model.norm.weight" => {
            vec![
                name.to_string(),
                "model.layers.0.self_attn.rotary_emb.inv_freq".to_string(),
            ]
        }
        _ => keep_all(name),
    };
    let old = resave(&base.weights, &dir.path().join("old"), buffers);
    assert!(InitFrom::plan(&base.config, &old, 0).is_ok());
}

#[test]
fn damaged_folders_are_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let refused = |says: &str| {
        let error = HfFolder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused("no config.json");
    fs::write(dir.path().join("config.json"), "{").unwrap();
    refused("config.json: not JSON");
    fs::write(dir.path().join("config.json"), r#"{"model_type":"bert"}"#).unwrap();
    refused("model_type \"bert\" is not supported");
    fs::copy(
        case("qwen3").join("config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();
    refused("no weights here");
}

/// Writes, for every case and for a TTT model, an exported folder and this program's logits for
/// `tests/hf/check_export.py` to compare with:
/// `TTT_HF_EXPORT=DIR cargo test --release --test hf_roundtrip -- --ignored`.
#[test]
#[ignore = "writes files for a check in Python"]
fn write_exports_for_transformers() {
    let out = PathBuf::from(std::env::var_os("TTT_HF_EXPORT").expect("TTT_HF_EXPORT=DIR"));
    let ttt = out.join("source_ttt_qwen3");
    save(&ttt_config(Target::Hidden), &ttt);
    let mut sources: Vec<PathBuf> = CASES.iter().map(|name| case(name)).collect();
    sources.push(ttt);
    for source in sources {
        let name = source
            .file_name()
            .unwrap()
            .to_string_lossy()
            .replace("source_", "");
        let dir = out.join(&name);
        let checkpoint = out.join(format!("checkpoint_{name}"));
        import(&source, &checkpoint).unwrap();
        export(&checkpoint, &dir, &options(ExportDtype::F32, 50_000)).unwrap();

        let json: Value =
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        let config = config_from_json(&json).unwrap();
        let weights = Folder::open(&dir).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| i * i * 3 % 101).collect();
        let tensor = |name: &str, shape: &[usize], dtype| TensorSpec {
            name: name.into(),
            shape: shape.into(),
            dtype,
        };
        let shape = [1, ids.len(), config.vocab_size];
        let specs = vec![
            tensor("input_ids", &[1, ids.len()], Dtype::I64),
            tensor("logits", &shape, Dtype::F32),
            tensor("logits_base", &shape, Dtype::F32),
        ];
        let stem = format!("{name}.ours");
        let mut writer = Writer::create(&out, &stem, specs, u64::MAX, HashMap::new()).unwrap();
        let ids_bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| i64::from(id).to_le_bytes())
            .collect();
        writer.append_bytes("input_ids", &ids_bytes).unwrap();
        // With an inner learning rate of 0 nothing is learned while reading: the base model.
        let mut base = config.clone();
        base.ttt.lr = 0.0;
        for (name, config) in [("logits", &config), ("logits_base", &base)] {
            let logits: Vec<f32> = logits(config, &weights, &ids)
                .iter()
                .map(|&x| x as f32)
                .collect();
            writer.append_f32(name, &logits).unwrap();
        }
        writer.finish().unwrap();
    }
}
