//! Gradients of whole models of every kind against finite differences in f64.

use burn::tensor::{DType, Device, Tensor};
use ttt_kernels::Packing;
use ttt_kernels::testing::{normal, values};
use ttt_model::params::all_params;
use ttt_model::{LayerType, ModelConfig, ModelType, ParamSpec, Target};

use crate::support::{TARGETS, config, random_value, sliding, text};
use crate::whole_model::{WholeModel, token_ids};

const STEP: f64 = 1e-3;

/// A direction for each parameter, scaled so that a step along it is small in every norm.
fn direction(spec: &ParamSpec) -> Tensor<1> {
    let scale = 1.0 / (spec.len() as f64).sqrt();
    let seed = spec.name.len() as u64 * 31 + spec.len() as u64;
    normal([spec.len()], scale, seed, &Device::flex(), DType::F64)
}

fn check(name: &str, config: &ModelConfig) {
    config.validate().expect("a possible model");
    let packing = Packing::new(14, vec![vec![0, 3, 9], vec![0]]).unwrap();
    let ids = token_ids(&[text(14, 1), text(14, 2)]);
    // Half the usual scale keeps higher derivatives, and so the differences' error, small.
    let value = |spec: &ParamSpec| random_value(spec, DType::F64).mul_scalar(0.7);
    let model = |moved: Option<&str>, by: f64| {
        WholeModel::new(config, DType::F64, |spec| match moved {
            Some(name) if name == spec.name => value(spec) + direction(spec).mul_scalar(by),
            _ => value(spec),
        })
    };
    let gradients = model(None, 0.0).gradients(&ids, &packing);
    let mut worst = (0.0, String::new());
    for spec in all_params(config) {
        let loss = |by: f64| model(Some(&spec.name), by).loss(&ids, &packing);
        let near = loss(STEP) - loss(-STEP);
        let far = loss(2.0 * STEP) - loss(-2.0 * STEP);
        let difference = (8.0 * near - far) / (12.0 * STEP);
        let gradient = &gradients[&spec.name];
        let along = gradient.iter().zip(values(&direction(&spec)));
        let along: f64 = along.map(|(g, d)| g * d).sum();
        // Relative to the gradient's length, of which a random direction sees 1/√n.
        let length = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!(length > 0.0, "{name}: {} gets no gradient", spec.name);
        let scale = length / (spec.len() as f64).sqrt();
        let error = (along - difference).abs() / scale;
        if error > worst.0 {
            worst = (error, spec.name.clone());
        }
        assert!(error < 1e-7, "{name}: {} is off by {error:e}", spec.name);
    }
    println!("{name}: worst {:.1e} at {}", worst.0, worst.1);
}

#[test]
fn every_target_differentiates() {
    for target in TARGETS {
        check("target", &config(target));
    }
    let mut plain = config(Target::Hidden);
    plain.ttt.projection = false;
    check("no projection", &plain);
}

#[test]
fn every_family_differentiates() {
    for model_type in [ModelType::Llama, ModelType::Qwen2] {
        let config = ModelConfig {
            model_type,
            ..config(Target::Embedding)
        };
        check("family", &config);
    }
}

#[test]
fn tied_heads_and_windows_differentiate() {
    let tied = ModelConfig {
        tie_word_embeddings: true,
        ..config(Target::Embedding)
    };
    check("tied", &tied);
    let types = [
        LayerType::SlidingAttention,
        LayerType::FullAttention,
        LayerType::SlidingAttention,
    ];
    check("windows", &sliding(&config(Target::Hidden), 3, Some(types)));
}
