//! Small models with weights large enough that every path matters.

use burn::tensor::{DType, Device, Tensor};
use ttt_kernels::testing::{normal, values};
use ttt_model::{Init, LayerType, ModelConfig, ModelType, ParamSpec, Target, TttConfig};

use crate::whole_model::WholeModel;

pub const VOCAB: usize = 23;
pub const CHUNK: usize = 4;

/// Three layers, 0 and 2 of which learn.
pub fn config(target: Target) -> ModelConfig {
    ModelConfig {
        model_type: ModelType::Qwen3,
        vocab_size: VOCAB,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        head_dim: Some(6),
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: None,
        max_position_embeddings: 64,
        tie_word_embeddings: false,
        sliding_window: None,
        layer_types: None,
        initializer_range: 0.02,
        ttt: TttConfig {
            enabled: true,
            layers: Some(vec![0, 2]),
            every: None,
            chunk: CHUNK,
            lr: 0.5,
            target,
            projection: true,
            conv_kernel: 5,
            clip: None,
        },
    }
}

pub const TARGETS: [Target; 3] = [Target::Embedding, Target::Hidden, Target::NextToken];

/// The same model whose layers do not learn.
pub fn without_ttt(config: &ModelConfig) -> ModelConfig {
    let mut config = config.clone();
    config.ttt.enabled = false;
    config
}

/// Sliding windows in all layers or, given a list, in some.
pub fn sliding(config: &ModelConfig, window: usize, types: Option<[LayerType; 3]>) -> ModelConfig {
    ModelConfig {
        sliding_window: Some(window),
        layer_types: types.map(Vec::from),
        ..config.clone()
    }
}

/// A seed that depends on the name alone, so that models of different configurations share weights.
fn seed(name: &str) -> u64 {
    name.bytes().fold(7, |seed: u64, byte| {
        seed.wrapping_mul(1_000_003).wrapping_add(u64::from(byte))
    })
}

/// Random values by name: gains around one, everything else far from its initial smallness.
pub fn random_value(spec: &ParamSpec, dtype: DType) -> Tensor<1> {
    let random = |scale| {
        normal(
            [spec.len()],
            scale,
            seed(&spec.name),
            &Device::flex(),
            dtype,
        )
    };
    match spec.init {
        Init::Ones => random(0.1).add_scalar(1.0),
        Init::Zeros | Init::Normal(_) | Init::Diagonal(_) => random(0.3),
    }
}

pub fn random_model(config: &ModelConfig, dtype: DType) -> WholeModel {
    config.validate().expect("a possible model");
    WholeModel::new(config, dtype, |spec| random_value(spec, dtype))
}

/// Reproducible token ids.
pub fn text(length: usize, seed: u64) -> Vec<u32> {
    let device = Device::flex();
    let noise = values(&normal([length], 1e3, seed, &device, DType::F64));
    noise
        .iter()
        .map(|x| x.abs() as u32 % VOCAB as u32)
        .collect()
}

/// The tokens whose logits differ by a bit, within one row.
pub fn moved(a: &Tensor<3>, b: &Tensor<3>) -> Vec<usize> {
    let vocab = a.dims()[2];
    let (a, b) = (values(a), values(b));
    let pairs = a.chunks(vocab).zip(b.chunks(vocab)).enumerate();
    pairs
        .filter(|(_, (a, b))| a != b)
        .map(|(token, _)| token)
        .collect()
}
