//! The vectors of the official In-Place TTT model: outputs, every gradient, decoding.
//!
//! Checks every `*.safetensors` in the folder `TTT_GOLDEN_DIR`, by default `tests/golden`. A file
//! describes its model in `__metadata__["config"]`; `tests/golden/README.md` says what it holds.

#[path = "../crates/model/tests/maths/whole_model.rs"]
mod whole_model;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use ttt_kernels::Packing;
use ttt_kernels::testing::{relative_error_of, values};
use ttt_model::mlp::Mlp;
use ttt_model::{ModelConfig, ParamSpec, Target, hf};
use whole_model::{WholeModel, token_ids};

/// ‖a − b‖ / ‖b‖ for f32: ten times what two orders of summation differ by.
const MLP_LIMIT: f64 = 5e-6;
const LOGITS_LIMIT: f64 = 1e-5;
const GRADIENT_LIMIT: f64 = 3e-5;
const LOSS_LIMIT: f64 = 5e-6; // absolute
/// Absolute, for logits of at most ten, which those of the official files stay below; in
/// proportion for larger ones.
const LOGITS_ABSOLUTE_LIMIT: f64 = 5e-5;

#[test]
fn official_vectors_match() {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folder = std::env::var_os("TTT_GOLDEN_DIR").map_or(default, PathBuf::from);
    let entries = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("cannot list {}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    assert!(
        !files.is_empty(),
        "{} holds no *.safetensors file: nothing would be checked",
        folder.display()
    );
    let mut failures = vec![];
    for path in &files {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut report = Report::default();
        match Golden::read(path) {
            Ok(golden) => golden.check(&mut report),
            Err(problem) => report.failures.push(problem),
        }
        println!("{name}: {}", report.summary());
        let named = report.failures.iter().map(|f| format!("{name}: {f}"));
        failures.extend(named);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// What a file's comparison found.
#[derive(Default)]
struct Report {
    /// Worst error over its limit, by kind of tensor.
    worst: BTreeMap<&'static str, (f64, f64)>,
    failures: Vec<String>,
}

impl Report {
    fn number(&mut self, kind: &'static str, tensor: &str, error: f64, limit: f64) {
        let worst = self.worst.entry(kind).or_insert((0.0, limit));
        worst.0 = worst.0.max(error);
        let within = error <= limit; // not so for NaN
        if !within {
            let problem = format!("{tensor}: {kind} error {error:.2e}, limit {limit:.0e}");
            self.failures.push(problem);
        }
    }

    fn relative(
        &mut self,
        kind: &'static str,
        tensor: &str,
        got: &[f64],
        expected: &Stored,
        limit: f64,
    ) {
        if got.len() != expected.values.len() {
            let (got, shape) = (got.len(), &expected.shape);
            let problem = format!("{tensor}: computed {got} values, the file has shape {shape:?}");
            return self.failures.push(problem);
        }
        let error = relative_error_of(got, &expected.values);
        self.number(kind, tensor, error, limit);
    }

    fn logits(&mut self, tensor: &str, got: &[f64], expected: &Stored) {
        self.relative("logits", tensor, got, expected, LOGITS_LIMIT);
        let pairs = got.iter().zip(&expected.values);
        let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let largest = expected
            .values
            .iter()
            .fold(10.0, |m: f64, v| m.max(v.abs()));
        let limit = LOGITS_ABSOLUTE_LIMIT * largest / 10.0;
        self.number("absolute logits", tensor, difference, limit);
    }

    fn holds(&mut self, statement: &str, holds: bool) {
        if !holds {
            self.failures.push(format!("does not hold: {statement}"));
        }
    }

    fn summary(&self) -> String {
        let kinds = self.worst.iter();
        let kinds =
            kinds.map(|(kind, (error, limit))| format!("{kind} {error:.1e} (≤ {limit:.0e})"));
        kinds.collect::<Vec<_>>().join(", ")
    }
}

/// A tensor of a file, in f64.
#[derive(Clone)]
struct Stored {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Stored {
    fn tensor<const R: usize>(&self, name: &str) -> Result<Tensor<R>, String> {
        let shape: [usize; R] = self
            .shape
            .clone()
            .try_into()
            .map_err(|shape| format!("{name}: expected {R} dimensions, got shape {shape:?}"))?;
        let data = TensorData::new(self.values.clone(), shape);
        Ok(Tensor::from_data(data, (&Device::flex(), DType::F32)))
    }
}

struct Golden {
    tensors: BTreeMap<String, Stored>,
    config: ModelConfig,
    ids: Vec<Vec<u32>>,
    decode_split: Vec<usize>,
}

impl Golden {
    fn read(path: &Path) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| e.to_string())?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let key = |key: &str| -> Result<Option<Value>, String> {
            let Some(json) = metadata.get(key) else {
                return Ok(None);
            };
            let value = serde_json::from_str(json);
            value
                .map(Some)
                .map_err(|e| format!("__metadata__.{key}: {e}"))
        };
        let file = SafeTensors::deserialize(&bytes).map_err(|e| e.to_string())?;
        let mut tensors = BTreeMap::new();
        let mut ids = None;
        for (name, view) in file.tensors() {
            if name == "input_ids" {
                ids = Some(token_rows(view.dtype(), view.shape(), view.data())?);
                continue;
            }
            let values = floats(view.dtype(), view.data()).map_err(|e| format!("{name}: {e}"))?;
            let shape = view.shape().to_vec();
            tensors.insert(name, Stored { shape, values });
        }
        let ids = ids.ok_or("input_ids is missing")?;
        // A JSON string that may hold the object, or a string with the object in it.
        let mut config = match key("config")?.ok_or("__metadata__ has no config")? {
            Value::String(json) => {
                serde_json::from_str(&json).map_err(|e| format!("__metadata__.config: {e}"))?
            }
            config => config,
        };
        // The release's training configuration has TTT on by default.
        let learns = tensors.keys().any(|name| name.contains("ttt_conv"));
        if let (true, Some(keys)) = (learns, config.as_object_mut()) {
            keys.entry("ttt_mode").or_insert(Value::Bool(true));
        }
        in_any_order(&mut config);
        let config = hf::config_from_json(&config).map_err(|e| e.to_string())?;
        let tokens = ids[0].len();
        let decode_split: Vec<usize> = match key("decode_split")? {
            None => {
                let first = tokens.min(13);
                let ones = std::iter::repeat_n(1, tokens - first);
                std::iter::once(first).chain(ones).collect()
            }
            Some(split) => serde_json::from_value(split)
                .map_err(|e| format!("__metadata__.decode_split: {e}"))?,
        };
        if decode_split.contains(&0) || decode_split.iter().sum::<usize>() != tokens {
            return Err(format!(
                "decode_split {decode_split:?} does not make {tokens} tokens"
            ));
        }
        Ok(Self {
            tensors,
            config,
            ids,
            decode_split,
        })
    }

    fn model(&self) -> Result<WholeModel, String> {
        let specs = ttt_model::params::all_params(&self.config);
        let known: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        for name in self.tensors.keys().filter_map(|n| n.strip_prefix("param.")) {
            if !known.contains(name) {
                return Err(format!(
                    "param.{name} is not a parameter of the model described"
                ));
            }
        }
        for spec in &specs {
            let stored = self.tensors.get(&format!("param.{}", spec.name));
            let shape = stored.map(|stored| &stored.shape);
            if shape != Some(&spec.shape) {
                let (name, expected) = (&spec.name, &spec.shape);
                return Err(format!(
                    "param.{name}: expected shape {expected:?}, got {shape:?}"
                ));
            }
        }
        let value = |spec: &ParamSpec| self.parameter(&spec.name);
        Ok(WholeModel::new(&self.config, DType::F32, value))
    }

    fn parameter(&self, name: &str) -> Tensor<1> {
        let values = self.tensors[&format!("param.{name}")].values.clone();
        let shape = [values.len()];
        Tensor::from_data(
            TensorData::new(values, shape),
            (&Device::flex(), DType::F32),
        )
    }

    /// The same weights with every convolution zero: the plain base model.
    fn base_model(&self) -> WholeModel {
        WholeModel::new(&self.config, DType::F32, |spec| {
            let value = self.parameter(&spec.name);
            match spec.name.contains("ttt_conv") {
                true => value.zeros_like(),
                false => value,
            }
        })
    }

    fn packing(&self) -> Packing {
        Packing::whole_rows(self.ids.len(), self.ids[0].len())
    }

    fn check(&self, report: &mut Report) {
        let model = match self.model() {
            Ok(model) => model,
            Err(problem) => return report.failures.push(problem),
        };
        if let Err(problem) = self.check_mlps(&model, report) {
            report.failures.push(problem);
        }
        self.check_outputs(&model, report);
        self.check_gradients(&model, report);
        self.check_decoding(&model, report);
        self.check_exact_statements(&model, report);
    }

    fn check_mlps(&self, model: &WholeModel, report: &mut Report) -> Result<(), String> {
        for layer in 0..self.config.num_hidden_layers {
            let tensor = |of: &str| {
                let name = format!("mlp{layer}.{of}");
                self.tensors
                    .get(&name)
                    .map(|stored| stored.tensor::<3>(&name))
                    .transpose()
            };
            let Some(expected) = self.tensors.get(&format!("mlp{layer}.y")) else {
                continue;
            };
            let x = tensor("x")?.ok_or_else(|| format!("mlp{layer}.x is missing"))?;
            let t = tensor("t")?.unwrap_or_else(|| x.clone());
            let source = match self.config.ttt.target {
                Target::Hidden => x.clone(),
                Target::Embedding | Target::NextToken => t.clone(),
            };
            if self.config.is_ttt_layer(layer) {
                let same = values(&source) == values(&t);
                report.holds(&format!("mlp{layer}.t is the target source"), same);
            }
            let mlp = Mlp::new(&self.config, layer, model.block(layer));
            let y = mlp.forward(x, source, &self.packing(), None).output;
            report.relative(
                "mlp",
                &format!("mlp{layer}.y"),
                &values(&y),
                expected,
                MLP_LIMIT,
            );
        }
        Ok(())
    }

    fn check_outputs(&self, model: &WholeModel, report: &mut Report) {
        let (ids, packing) = (token_ids(&self.ids), self.packing());
        match self.tensors.get("logits") {
            Some(expected) => {
                report.logits("logits", &values(&model.logits(&ids, &packing)), expected)
            }
            None => report.failures.push("logits is missing".into()),
        }
        if let Some(expected) = self.tensors.get("logits_conv_zero") {
            let logits = values(&self.base_model().logits(&ids, &packing));
            report.logits("logits_conv_zero", &logits, expected);
        }
        match self.tensors.get("loss") {
            Some(expected) => {
                let error = (model.loss(&ids, &packing) - expected.values[0]).abs();
                report.number("loss", "loss", error, LOSS_LIMIT);
            }
            None => report.failures.push("loss is missing".into()),
        }
    }

    fn check_gradients(&self, model: &WholeModel, report: &mut Report) {
        let gradients = model.gradients(&token_ids(&self.ids), &self.packing());
        for (name, got) in &gradients {
            let name = format!("grad.{name}");
            match self.tensors.get(&name) {
                Some(expected) => {
                    report.relative("gradient", &name, got, expected, GRADIENT_LIMIT);
                }
                None => report.failures.push(format!("{name} is missing")),
            }
        }
    }

    fn check_decoding(&self, model: &WholeModel, report: &mut Report) {
        let Some(expected) = self.tensors.get("decode_logits") else {
            return;
        };
        let decoder = model.decoder();
        let rows = expected.shape[0].min(self.ids.len());
        let mut decoded = vec![];
        for row in &self.ids[..rows] {
            let mut session = decoder.session();
            let mut rest = row.as_slice();
            for &count in &self.decode_split {
                let (now, later) = rest.split_at(count);
                decoded.extend(values(&decoder.extend(&mut session, now)));
                rest = later;
            }
        }
        report.logits("decode_logits", &decoded, expected);
        let logits = model.logits(
            &token_ids(&self.ids[..rows]),
            &Packing::whole_rows(rows, self.ids[0].len()),
        );
        let error = relative_error_of(&decoded, &values(&logits));
        report.number(
            "prefill against decode",
            "decode_logits",
            error,
            LOGITS_LIMIT,
        );
    }

    /// What must hold bit for bit in our own arithmetic.
    fn check_exact_statements(&self, model: &WholeModel, report: &mut Report) {
        let (ids, packing) = (token_ids(&self.ids), self.packing());
        let (rows, tokens, vocab) = (self.ids.len(), self.ids[0].len(), self.config.vocab_size);
        let chunk = self.config.ttt.chunk;
        let logits = values(&model.logits(&ids, &packing));

        if rows > 1 {
            let mut other = self.ids.clone();
            for id in &mut other[0] {
                *id = (*id + 1) % vocab as u32;
            }
            let after = values(&model.logits(&token_ids(&other), &packing));
            let row = tokens * vocab..;
            report.holds(
                "rows do not depend on row 0",
                logits[row.clone()] == after[row],
            );
        }
        if self.config.ttt_layers().is_empty() || self.config.ttt.conv_taps().is_none() {
            return;
        }
        let base = self.base_model();
        let off = values(&base.logits(&ids, &packing));
        for row in 0..rows {
            let first = row * tokens * vocab..(row * tokens + chunk.min(tokens)) * vocab;
            let same = logits[first.clone()] == off[first];
            report.holds(
                &format!("row {row}: the first chunk is the base model's"),
                same,
            );
        }
        let zero = |gradients: &BTreeMap<String, Vec<f64>>, part: &str| {
            let mut of_part = gradients.iter().filter(|(name, _)| name.contains(part));
            of_part.all(|(_, gradient)| gradient.iter().all(|&g| g == 0.0))
        };
        let at_zero = base.gradients(&ids, &packing);
        report.holds(
            "without a convolution the projection has no gradient",
            zero(&at_zero, "ttt_proj"),
        );
        if tokens > chunk {
            report.holds(
                "TTT changes the logits beyond the first chunk",
                logits != off,
            );
            report.holds(
                "a zero convolution has a gradient",
                !zero(&at_zero, "ttt_conv"),
            );
        } else {
            report.holds("one chunk is the base model", logits == off);
            let gradients = model.gradients(&ids, &packing);
            report.holds(
                "one chunk gives TTT no gradient",
                zero(&gradients, "mlp.ttt_"),
            );
        }
    }
}

/// To the release a list of layers is a set, possibly empty; ours ascends.
fn in_any_order(config: &mut Value) {
    if let Value::Array(layers) = &mut config["ttt_layers"] {
        layers.sort_by_key(Value::as_u64);
        layers.dedup();
        if layers.is_empty() {
            config["ttt_mode"] = Value::Bool(false);
        }
    }
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f64>, String> {
    match dtype {
        Dtype::F32 => Ok(numbers(bytes, |b| f64::from(f32::from_le_bytes(b)))),
        Dtype::F64 => Ok(numbers(bytes, f64::from_le_bytes)),
        other => Err(format!("expected F32 or F64 values, got {other:?}")),
    }
}

fn token_rows(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<Vec<Vec<u32>>, String> {
    let &[rows, tokens] = shape else {
        return Err(format!("input_ids: expected two dimensions, got {shape:?}"));
    };
    if rows == 0 || tokens < 2 {
        return Err(format!(
            "input_ids: {rows} rows of {tokens} tokens predict nothing"
        ));
    }
    let ids = match dtype {
        Dtype::I64 => numbers(bytes, i64::from_le_bytes),
        Dtype::I32 => numbers(bytes, |b| i64::from(i32::from_le_bytes(b))),
        other => return Err(format!("input_ids: expected I64 or I32, got {other:?}")),
    };
    let ids: Result<Vec<u32>, _> = ids.into_iter().map(u32::try_from).collect();
    let ids = ids.map_err(|_| "input_ids: a negative token id".to_string())?;
    Ok(ids.chunks(tokens).map(<[u32]>::to_vec).collect())
}

fn numbers<const W: usize, T>(bytes: &[u8], from: impl Fn([u8; W]) -> T) -> Vec<T> {
    bytes.as_chunks::<W>().0.iter().map(|&b| from(b)).collect()
}
