//! Reading a golden file: the model it describes and the values it holds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use ttt_kernels::Packing;
use ttt_model::{ModelConfig, ParamSpec, hf};

use crate::whole_model::WholeModel;

/// A tensor of a file, in f64.
#[derive(Clone)]
pub struct Stored {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

impl Stored {
    pub fn tensor<const R: usize>(&self, name: &str) -> Result<Tensor<R>, String> {
        let shape: [usize; R] = self
            .shape
            .clone()
            .try_into()
            .map_err(|shape| format!("{name}: expected {R} dimensions, got shape {shape:?}"))?;
        let data = TensorData::new(self.values.clone(), shape);
        Ok(Tensor::from_data(data, (&Device::flex(), DType::F32)))
    }
}

/// One file.
pub struct Golden {
    pub tensors: BTreeMap<String, Stored>,
    pub config: ModelConfig,
    /// Equally long rows.
    pub ids: Vec<Vec<u32>>,
    /// Tokens of the successive decode calls.
    pub decode_split: Vec<usize>,
}

impl Golden {
    /// Reads and checks what the file says about itself.
    pub fn read(path: &Path) -> Result<Self, String> {
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
        let vocab = config.vocab_size;
        if let Some(id) = ids.iter().flatten().find(|&&id| id as usize >= vocab) {
            return Err(format!(
                "input_ids: token {id} is beyond a vocabulary of {vocab}"
            ));
        }
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

    /// The model with the file's parameters.
    pub fn model(&self) -> Result<WholeModel, String> {
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
    pub fn base_model(&self) -> WholeModel {
        WholeModel::new(&self.config, DType::F32, |spec| {
            let value = self.parameter(&spec.name);
            match spec.name.contains("ttt_conv") {
                true => value.zeros_like(),
                false => value,
            }
        })
    }

    /// Whether every parameter whose name contains `part` is zero; not so if there is none.
    pub fn is_zero(&self, part: &str) -> bool {
        let params = self.tensors.iter();
        let mut of_part = params
            .filter(|(name, _)| name.starts_with("param.") && name.contains(part))
            .peekable();
        of_part.peek().is_some() && of_part.all(|(_, t)| t.values.iter().all(|&v| v == 0.0))
    }

    /// One document per row.
    pub fn packing(&self) -> Packing {
        Packing::whole_rows(self.ids.len(), self.ids[0].len())
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
