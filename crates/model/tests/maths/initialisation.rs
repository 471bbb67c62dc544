//! A new TTT layer changes nothing at first, and can learn.

use burn::tensor::{DType, Device, Tensor, TensorData};
use ttt_kernels::Packing;
use ttt_kernels::testing::values;
use ttt_model::{Init, ModelConfig, ParamSpec, Target, Unit};

use crate::support::{config, random_value, text, without_ttt};
use crate::whole_model::{WholeModel, token_ids};

/// Base weights as of a trained model; TTT parameters as they begin.
fn new_layers(spec: &ParamSpec) -> Tensor<1> {
    let random = random_value(spec, DType::F32);
    match (spec.name.contains("ttt_"), spec.init) {
        (true, Init::Zeros) => random.zeros_like(),
        (true, Init::Diagonal(_)) => {
            let width = spec.shape[0];
            let mut values = values(&random);
            for (i, value) in values.iter_mut().enumerate() {
                if i / width != i % width {
                    *value = 0.0;
                }
            }
            Tensor::from_data(
                TensorData::new(values, [width * width]),
                (&Device::flex(), DType::F32),
            )
        }
        (true, other) => panic!("{}: begins as {other:?}", spec.name),
        (false, _) => random,
    }
}

/// Wide enough for every product to take the matrix library's general path, which adds up a row's
/// terms in one order whatever the number of rows. Its short cuts for 256 or fewer results do not,
/// so there a chunk's down projection differs from the whole row's in the last bit.
fn wide(target: Target) -> ModelConfig {
    let mut config = config(target);
    config.hidden_size = 80;
    config.intermediate_size = 96;
    config.ttt.chunk = 16;
    config
}

fn model(config: &ModelConfig) -> WholeModel {
    WholeModel::new(config, DType::F32, new_layers)
}

const LEARNED_TARGETS: [Target; 2] = [Target::Embedding, Target::Hidden];

#[test]
fn a_new_ttt_model_is_bitwise_the_base_model() {
    let ids = token_ids(&[text(37, 1), text(37, 2)]);
    let packing = Packing::whole_rows(2, 37);
    for target in LEARNED_TARGETS {
        let config = wide(target);
        let with = model(&config).logits(&ids, &packing);
        let without = model(&without_ttt(&config)).logits(&ids, &packing);
        assert_eq!(values(&with), values(&without), "{target:?}");
    }
}

#[test]
fn the_convolution_learns_first_then_the_projection() {
    let ids = token_ids(&[text(19, 1), text(19, 2)]);
    let packing = Packing::whole_rows(2, 19);
    for target in LEARNED_TARGETS {
        let config = config(target);
        let gradients = model(&config).gradients(&ids, &packing);
        let (conv, projection) = ("ttt_conv.weight", "ttt_proj.weight");
        for layer in [0, 2] {
            let of = |path: &str| &gradients[&format!("model.layers.{layer}.mlp.{path}")];
            assert!(
                of(conv).iter().any(|&g| g != 0.0),
                "{target:?}: conv of layer {layer}"
            );
            assert!(
                of(projection).iter().all(|&g| g == 0.0),
                "{target:?}: layer {layer}"
            );
        }
        let stepped = WholeModel::new(&config, DType::F32, |spec| {
            let gradient = &gradients[&spec.name];
            let data = TensorData::new(gradient.clone(), [gradient.len()]);
            let gradient = Tensor::<1>::from_data(data, (&Device::flex(), DType::F32));
            new_layers(spec) - gradient.mul_scalar(0.1)
        });
        let gradients = stepped.gradients(&ids, &packing);
        for layer in [0, 2] {
            let of = &gradients[&format!("model.layers.{layer}.mlp.{projection}")];
            assert!(
                of.iter().any(|&g| g != 0.0),
                "{target:?}: projection of layer {layer}"
            );
        }
    }
}

/// Negative control: convolution and projection both zero learn nothing, ever.
#[test]
fn two_zeros_would_learn_nothing() {
    let ids = token_ids(&[text(19, 1)]);
    let config = config(Target::Embedding);
    let dead = WholeModel::new(&config, DType::F32, |spec| {
        let value = new_layers(spec);
        match spec.name.contains("ttt_") {
            true => value.zeros_like(),
            false => value,
        }
    });
    let gradients = dead.gradients(&ids, &Packing::whole_rows(1, 19));
    let ttt = gradients.iter().filter(|(name, _)| name.contains("ttt_"));
    assert!(ttt.flat_map(|(_, gradient)| gradient).all(|&g| g == 0.0));
}

/// By name and shape: the release treats every square matrix like the projection.
#[test]
fn only_the_projection_begins_as_a_diagonal() {
    let mut config = config(Target::Embedding);
    config.head_dim = Some(4); // q_proj and o_proj are square now
    for unit in Unit::all(&config) {
        for spec in unit.params(&config) {
            let path = spec.name.rsplit('.').nth(1).unwrap_or_default();
            let expected = match path {
                "ttt_proj" => Init::Diagonal(0.02),
                "ttt_conv" => Init::Zeros,
                path if path.contains("norm") => Init::Ones,
                _ => Init::Normal(0.02),
            };
            assert_eq!(spec.init, expected, "{}", spec.name);
            let learns = spec.name.contains(".0.mlp.") || spec.name.contains(".2.mlp.");
            let master = learns && path == "down_proj";
            assert_eq!(spec.master_precision, master, "{}", spec.name);
        }
    }
}
