//! A small run whose checkpoints are looked at.

use std::path::Path;

use burn::tensor::{DType, Device};
use ttt_kernels::testing::values as elements;
use ttt_model::{ModelConfig, Unit};
use ttt_parallel::Mesh;
use ttt_train::checkpoint::Progress;
use ttt_train::config::Config;
use ttt_train::init::initial_values;
use ttt_train::units::UnitState;

/// A model whose units do not divide evenly among the shards.
pub fn config(dir: &Path) -> Config {
    let text = format!(
        "run.dir = {:?}\ndata.path = \"data\"\n\
         train = {{ steps = 6, sequence_length = 24, batch_tokens = 96 }}\n\
         optimizer.lr = 1e-2\ncheckpoint.keep = 2\n\
         [model]\nmodel_type = \"qwen3\"\nvocab_size = 131\nhidden_size = 24\n\
         intermediate_size = 56\nnum_hidden_layers = 2\nnum_attention_heads = 2\n\
         num_key_value_heads = 1\nhead_dim = 8\ntie_word_embeddings = false\n\
         [model.ttt]\nenabled = true\nlayers = [1]\nchunk = 4\n",
        dir.join("run")
    );
    Config::parse(&text, "test".as_ref(), &[]).expect("a configuration")
}

pub fn progress(step: u64) -> Progress {
    Progress {
        step,
        tokens: 96 * step,
        mean_grad_norm: 0.25,
        data_fingerprint: "the same".into(),
    }
}

/// This rank's part of a state, of a model that computes in `compute`, in which every weight and moment has
/// a value of its own.
pub fn state(config: &ModelConfig, mesh: &Mesh, device: &Device, compute: DType) -> Vec<UnitState> {
    let unit = |unit| {
        let of = |seed| {
            let spread = |spec: &ttt_model::ParamSpec| {
                let init = ttt_model::Init::Normal(0.2);
                let spec = ttt_model::ParamSpec {
                    init,
                    ..spec.clone()
                };
                Ok::<_, std::convert::Infallible>(initial_values(&spec, seed))
            };
            UnitState::new(config, unit, mesh, device, compute, spread).expect("infallible")
        };
        let mut state = of(1);
        state.moments.first = of(2).master.to_f32();
        state.moments.second = of(3).master.to_f32().square();
        state
    };
    Unit::all(config).into_iter().map(unit).collect()
}

/// Weights and moments of all units, whole.
pub fn gathered(units: &[UnitState], mesh: &Mesh) -> Vec<f64> {
    let mut values = vec![];
    for unit in units {
        let (first, second) = (unit.moments.first.clone(), unit.moments.second.clone());
        for shard in [unit.master.to_f32(), first, second] {
            let full = mesh.shard.all_gather(shard).expect("all ranks");
            values.extend(unit.layout.whole(&elements(&full)));
        }
    }
    values
}
