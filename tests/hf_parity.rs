//! What transformers computes from a folder it saved is what this model computes from it: logits,
//! loss, every gradient, greedy decoding.
//!
//! The cases are those of `TTT_HF_DIR` (default: this repository's `tests/hf`, made by its
//! `generate.py`): each `NAME/` beside `NAME.expected.safetensors`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use ttt_kernels::Packing;
use ttt_kernels::testing::{relative_error_of, values};
use ttt_model::decode::Decoder;
use ttt_model::hf::config_from_json;
use ttt_model::{Batch, Block, Embedding, Head, ModelConfig, Params, Unit};
use ttt_weights::{Dtype, Folder};

/// Both sides round in f32 and sum in different orders: 1e-6 is usual, ten times that is allowed.
const LOGITS: f64 = 1e-5;
/// A mean over all tokens.
const LOSS: f64 = 5e-6;
/// Gradients sum over tokens and layers, with cancellation: three times what logits may differ.
const GRADIENTS: f64 = 3e-5;

fn cases() -> Vec<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hf");
    let folder = std::env::var_os("TTT_HF_DIR").map_or(default, PathBuf::from);
    let entries = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("TTT_HF_DIR {}: {error}", folder.display()));
    let mut cases: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a folder that can be listed").path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "no cases in {}", folder.display());
    cases
}

fn config(case: &Path) -> ModelConfig {
    let json = std::fs::read(case.join("config.json")).expect("config.json");
    let json = serde_json::from_slice(&json).expect("config.json is JSON");
    config_from_json(&json).expect("a model that is supported")
}

/// The tensors of `NAME.expected.safetensors`.
struct Expected(Folder);

impl Expected {
    fn of(case: &Path) -> Self {
        let name = case
            .file_name()
            .expect("a case has a name")
            .to_string_lossy();
        let folder = case.parent().expect("a case is in a folder");
        let stem = format!("{name}.expected");
        Self(Folder::open_stem(folder, &stem).expect("the expected values"))
    }

    fn floats(&self, name: &str) -> Vec<f64> {
        let shape = self
            .0
            .info(name)
            .unwrap_or_else(|| panic!("no {name}"))
            .shape;
        let mut out = vec![0.0; shape.iter().product()];
        self.0.read_f32(name, &mut out).expect(name);
        out.into_iter().map(f64::from).collect()
    }

    /// Rows of token ids.
    fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        let info = self.0.info(name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(info.dtype, Dtype::I64, "{name}");
        let bytes = self.0.bytes(name).expect(name);
        let (ids, _) = bytes.as_chunks::<8>();
        let id = |&bytes: &[u8; 8]| u32::try_from(i64::from_le_bytes(bytes)).expect("a token id");
        let rows = ids.chunks(info.shape[1]);
        rows.map(|row| row.iter().map(id).collect()).collect()
    }
}

/// The parameters of every unit, read from the folder.
fn units(config: &ModelConfig, weights: &Folder, device: &Device) -> Vec<Params> {
    let read = |unit: Unit| {
        let specs = unit.params(config);
        let flat = specs.iter().map(|spec| {
            let info = weights
                .info(&spec.name)
                .unwrap_or_else(|| panic!("no {}", spec.name));
            assert_eq!(info.shape, spec.shape, "{}", spec.name);
            let mut values = vec![0.0f32; spec.len()];
            weights.read_f32(&spec.name, &mut values).expect(&spec.name);
            Tensor::from_data(TensorData::new(values, [spec.len()]), device)
        });
        Params::new(specs.clone(), flat.collect())
    };
    Unit::all(config).into_iter().map(read).collect()
}

/// Token ids and next-token labels: `[B, N]`, `[B·N]`, the last of a row without a label.
fn inputs(rows: &[Vec<u32>], device: &Device) -> (Tensor<2, Int>, Tensor<1, Int>) {
    let shape = [rows.len(), rows[0].len()];
    let ids: Vec<i32> = rows.iter().flatten().map(|&id| id as i32).collect();
    let label = |row: &Vec<u32>, i: usize| row.get(i + 1).map_or(-1, |&id| id as i32);
    let labels: Vec<i32> = rows
        .iter()
        .flat_map(|row| (0..row.len()).map(move |i| label(row, i)))
        .collect();
    (
        Tensor::from_data(TensorData::new(ids, shape), device),
        Tensor::from_data(TensorData::new(labels, [shape[0] * shape[1]]), device),
    )
}

/// What differs more than it may, in words.
#[derive(Default)]
struct Differences(Vec<String>);

impl Differences {
    fn check(&mut self, what: &str, got: &[f64], expected: &[f64], limit: f64) -> f64 {
        if got.len() != expected.len() {
            let (got, expected) = (got.len(), expected.len());
            self.0
                .push(format!("{what}: {got} values instead of {expected}"));
            return f64::INFINITY;
        }
        let error = relative_error_of(got, expected);
        if error.is_nan() || error > limit {
            self.0.push(format!(
                "{what}: relative error {error:.1e}, limit {limit:.0e}"
            ));
        }
        error
    }
}

/// Logits, loss and every gradient of one case.
fn check_training(case: &Path, differences: &mut Differences) {
    let device = Device::default();
    let (config, expected) = (config(case), Expected::of(case));
    let weights = Folder::open(case).expect("the weights");
    let units: Vec<Params> = units(&config, &weights, &device)
        .into_iter()
        .map(Params::tracked)
        .collect();
    let rows = expected.ids("input_ids");
    let predictions = rows.len() * (rows[0].len() - 1);
    let (ids, labels) = inputs(&rows, &device);

    let batch = Batch::training(
        &config,
        Packing::whole_rows(rows.len(), rows[0].len()),
        &device,
    );
    let embedding = Embedding::new(&units[0]);
    let embeddings = embedding.forward(ids, DType::F32);
    let mut x = embeddings.clone();
    let layers = config.num_hidden_layers;
    for layer in 0..layers {
        let block = Block::new(&config, layer, &units[layer + 1]);
        x = block.forward(x, embeddings.clone(), &batch).output;
    }
    let head = Head::new(&config, &units[layers + 1], Some(embedding.weight));
    let logits = head.logits(x.clone());
    let loss = head.loss(x, labels, 1.0 / predictions as f64);

    let logits_error = differences.check(
        "logits",
        &values(&logits.inner()),
        &expected.floats("logits"),
        LOGITS,
    );
    let loss_value = values(&loss.clone().inner());
    differences.check("loss", &loss_value, &expected.floats("loss"), LOSS);

    let mut gradients = loss.backward();
    let mut seen = BTreeSet::new();
    let mut worst = 0f64;
    for (unit, params) in Unit::all(&config).into_iter().zip(&units) {
        let found = params.gradients(&mut gradients);
        for (spec, gradient) in unit.params(&config).into_iter().zip(found) {
            let name = format!("grad.{}", spec.name);
            let Some(gradient) = gradient else {
                differences.0.push(format!("{name}: none arrived"));
                continue;
            };
            let error = differences.check(
                &name,
                &values(&gradient),
                &expected.floats(&name),
                GRADIENTS,
            );
            worst = worst.max(error);
            seen.insert(name);
        }
    }
    for name in expected.0.names().filter(|name| name.starts_with("grad.")) {
        if !seen.contains(name) {
            differences
                .0
                .push(format!("{name}: the model has no such parameter"));
        }
    }
    let name = case.file_name().unwrap_or_default().to_string_lossy();
    println!("{name}: logits {logits_error:.1e}, worst gradient {worst:.1e}");
}

/// Greedy decoding, token for token.
fn check_greedy(case: &Path, differences: &mut Differences) {
    const PROMPT: usize = 20;
    let device = Device::default();
    let config = config(case);
    let weights = Folder::open(case).expect("the weights");
    let decoder = Decoder::new(
        &config,
        units(&config, &weights, &device),
        DType::F32,
        &device,
    );
    let expected = &Expected::of(case).ids("greedy")[0];
    let mut ids = expected[..PROMPT].to_vec();
    let mut session = decoder.session();
    let mut logits = decoder.extend_last(&mut session, &ids);
    while ids.len() < expected.len() {
        let scores = values(&logits);
        let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        ids.push(best.expect("a vocabulary") as u32);
        logits = decoder.extend_last(&mut session, &ids[ids.len() - 1..]);
    }
    if ids != *expected {
        differences
            .0
            .push(format!("greedy: {ids:?} instead of {expected:?}"));
    }
}

fn check_all(check: impl Fn(&Path, &mut Differences)) {
    let mut report = vec![];
    for case in cases() {
        let mut differences = Differences::default();
        check(&case, &mut differences);
        let name = case.file_name().unwrap_or_default().to_string_lossy();
        report.extend(differences.0.iter().map(|line| format!("{name}: {line}")));
    }
    assert!(report.is_empty(), "{}", report.join("\n"));
}

#[test]
fn logits_loss_and_gradients_equal_those_of_transformers() {
    check_all(check_training);
}

#[test]
fn greedy_decoding_equals_that_of_transformers() {
    check_all(check_greedy);
}

/// The comparison is not blind: RoPE without its scaling, or a window one token off, must show.
#[test]
fn another_model_does_not_pass() {
    type Change = fn(&mut ModelConfig);
    let changes: [(&str, Change); 4] = [
        ("llama3_untied", |c| c.rope_scaling = None),
        ("qwen3_yarn_tied", |c| c.rope_scaling = None),
        ("qwen3_window", |c| {
            c.sliding_window = c.sliding_window.map(|w| w + 1)
        }),
        ("mistral_window_f16", |c| c.sliding_window = None),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hf");
    let device = Device::default();
    for (name, change) in changes {
        let case = folder.join(name);
        let mut config = config(&case);
        change(&mut config);
        let weights = Folder::open(&case).expect("the weights");
        let decoder = Decoder::new(
            &config,
            units(&config, &weights, &device),
            DType::F32,
            &device,
        );
        let expected = Expected::of(&case);
        let row = &expected.ids("input_ids")[0];
        let logits = values(&decoder.extend(&mut decoder.session(), row));
        let error = relative_error_of(&logits, &expected.floats("logits")[..logits.len()]);
        assert!(error > 100.0 * LOGITS, "{name}: {error:.1e}");
    }
}
