//! Golden files of our own making, for models that the official ones do not cover.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::tensor::{DType, Device};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use ttt_kernels::Packing;
use ttt_kernels::testing::{normal, values};
use ttt_model::{ParamSpec, hf};

use crate::whole_model::{WholeModel, token_ids};

const TOKENS: usize = 14;

/// Shape and values of each tensor; token ids are kept as floats until they are written.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub fn configs() -> Vec<Value> {
    let common = json!({
        "vocab_size": 13, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
        "num_attention_heads": 2, "rope_theta": 1e4, "ttt_mode": true, "ttt_lr": 1.0, "ttt_chunk": 4,
    });
    let with = |more: Value| {
        let mut config = common.clone();
        for (key, value) in more.as_object().expect("an object") {
            config[key] = value.clone();
        }
        config
    };
    vec![
        with(json!({"model_type": "llama", "ttt_layers": [1], "ttt_target": "input_embed"})),
        with(json!({
            "model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": true,
            "ttt_layers": [2, 0], "ttt_proj": false,
        })),
        with(json!({
            "head_dim": 4, "tie_word_embeddings": true, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        })),
        with(json!({"model_type": "llama", "ttt_mode": false})),
    ]
}

fn rows() -> Vec<Vec<u32>> {
    let row = |r: usize| (0..TOKENS).map(move |t| ((t * t + 5 * t * r + r) % 13) as u32);
    (0..3).map(|r| row(r).collect()).collect()
}

/// What the file of this model should hold, by our own arithmetic.
pub fn tensors(config: &Value) -> Tensors {
    let mut ordered = config.clone();
    if let Value::Array(layers) = &mut ordered["ttt_layers"] {
        layers.sort_by_key(Value::as_u64);
    }
    let config = hf::config_from_json(&ordered).expect("a possible model");
    let value = |spec: &ParamSpec| {
        let seed = spec
            .name
            .bytes()
            .fold(1, |seed: u64, b| seed * 31 % 65_521 + u64::from(b));
        let noise = normal([spec.len()], 0.2, seed, &Device::flex(), DType::F32);
        match spec.name.contains("norm") {
            true => noise.add_scalar(1.0),
            false => noise,
        }
    };
    let model = WholeModel::new(&config, DType::F32, value);
    let without = WholeModel::new(&config, DType::F32, |spec| {
        match spec.name.contains("ttt_conv") {
            true => value(spec).zeros_like(),
            false => value(spec),
        }
    });
    let (rows, packing) = (rows(), Packing::whole_rows(3, TOKENS));
    let ids = token_ids(&rows);
    let single = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect::<Vec<f32>>();
    let mut tensors = Tensors::new();
    let gradients = model.gradients(&ids, &packing);
    for spec in ttt_model::params::all_params(&config) {
        let (name, shape) = (&spec.name, spec.shape.clone());
        let gradient = single(gradients[name].clone());
        tensors.insert(format!("grad.{name}"), (shape.clone(), gradient));
        tensors.insert(
            format!("param.{name}"),
            (shape, single(values(&value(&spec)))),
        );
    }
    let all = vec![3, TOKENS, 13];
    let logits = single(values(&model.logits(&ids, &packing)));
    let row: Vec<f32> = logits[..TOKENS * 13].to_vec();
    let zero = single(values(&without.logits(&ids, &packing)));
    let ids: Vec<f32> = rows.iter().flatten().map(|&id| id as f32).collect();
    tensors.insert("input_ids".into(), (vec![3, TOKENS], ids));
    tensors.insert("logits".into(), (all.clone(), logits));
    tensors.insert("logits_conv_zero".into(), (all, zero));
    tensors.insert("decode_logits".into(), (vec![1, TOKENS, 13], row));
    let loss = model.loss(&token_ids(&rows), &packing);
    tensors.insert("loss".into(), (vec![1], vec![loss as f32]));
    tensors
}

pub fn write(path: &Path, config: &Value, tensors: &Tensors) {
    let bytes: Vec<(&String, Dtype, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| match name == "input_ids" {
            true => {
                let ids = values.iter().flat_map(|&v| (v as i64).to_le_bytes());
                (name, Dtype::I64, shape, ids.collect())
            }
            false => {
                let values = values.iter().flat_map(|v| v.to_le_bytes());
                (name, Dtype::F32, shape, values.collect())
            }
        })
        .collect();
    let views = bytes.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, (*shape).clone(), bytes).expect("a whole tensor");
        (name.as_str(), view)
    });
    let metadata = HashMap::from([
        ("config".to_string(), config.to_string()),
        ("decode_split".to_string(), "[3, 1, 1, 5, 4]".to_string()),
    ]);
    safetensors::serialize_to_file(views, Some(metadata), path).expect("a written file");
}
