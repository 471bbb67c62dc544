//! A small model on one rank of a mesh, with values that let every path matter.

use std::convert::Infallible;

use burn::tensor::{DType, Device};
use ttt_kernels::ContextSettings;
use ttt_model::{Init, ModelConfig, ParamSpec, Unit};
use ttt_parallel::Mesh;
use ttt_train::init::initial_values;
use ttt_train::step::{Model, RopeCache};
use ttt_train::units::UnitState;

/// No parameter is zero or one: the convolution, too, does something from the start.
pub fn values(spec: &ParamSpec) -> Result<Vec<f32>, Infallible> {
    let dense = ParamSpec {
        init: match spec.init {
            Init::Ones => return Ok(vec![1.1; spec.len()]),
            _ => Init::Normal(0.2),
        },
        ..spec.clone()
    };
    Ok(initial_values(&dense, 5))
}

/// The model in f32 on the processor.
pub fn model(config: &ModelConfig, settings: ContextSettings, mesh: &Mesh) -> Model {
    model_in(DType::F32, config, settings, mesh)
}

/// The model in `compute` on the processor.
pub fn model_in(
    compute: DType,
    config: &ModelConfig,
    settings: ContextSettings,
    mesh: &Mesh,
) -> Model {
    let device = Device::flex();
    let unit =
        |unit| UnitState::new(config, unit, mesh, &device, compute, values).expect("infallible");
    Model {
        config: config.clone(),
        units: Unit::all(config).into_iter().map(unit).collect(),
        compute,
        device: device.clone(),
        rope: RopeCache::default(),
        context: settings,
    }
}
