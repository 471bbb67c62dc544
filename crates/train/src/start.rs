//! Beginning with another model's weights: `[init]`.
//!
//! The folder is opened and compared with `[model]` before anything large is read. New TTT layers
//! must change nothing at first, which [`BaseModel::check_unchanged`] sees for itself.

use std::path::PathBuf;

use burn::tensor::{DType, Device};
use ttt_data::{HubModel, ModelFiles, Row, fetch_model, offline_by_environment};
use ttt_kernels::dtype::cast;
use ttt_model::decode::Decoder;
use ttt_model::{ModelConfig, ParamSpec, Params, Unit};
use ttt_parallel::Mesh;

use crate::config::{Config, ConfigError, InitConfig};
use crate::device::{compute_dtype, read_f32};
use crate::error::TrainError;
use crate::interop::{HfFolder, InitFrom, side_files};
use crate::step::Model;
use crate::units::UnitState;

/// Where `init.from` lies on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder.
    pub dir: PathBuf,
    /// The hub's commit, if it comes from there.
    pub commit: Option<String>,
}

/// Finds the folder that `init` names; a hub model is fetched into the cache.
///
/// # Errors
/// If the hub does not answer, or a revision is asked of a folder.
pub fn locate(init: &InitConfig, files: ModelFiles) -> Result<Place, TrainError> {
    let revision = init.revision.as_deref();
    if init.from.starts_with("hub:") {
        let offline = offline_by_environment();
        let HubModel { dir, commit } = fetch_model(&init.from, revision, files, offline)?;
        let commit = Some(commit);
        return Ok(Place { dir, commit });
    }
    if revision.is_some() {
        let problem = "only a model of the hub (init.from = \"hub:owner/model\") has revisions";
        return Err(ConfigError::invalid("init.revision", problem).into());
    }
    let dir = PathBuf::from(&init.from);
    if !dir.is_dir() {
        let from = &init.from;
        let problem = format!("\"{from}\" is no folder; for the hub write \"hub:{from}\"");
        return Err(ConfigError::invalid("init.from", problem).into());
    }
    Ok(Place { dir, commit: None })
}

/// The model that a run begins with.
#[derive(Debug)]
pub struct BaseModel {
    folder: HfFolder,
    /// What of the model differs from the folder's on purpose, in sentences.
    pub notes: Vec<String>,
}

impl BaseModel {
    /// Opens the model that `config.init` names, and records in it which commit that is. `None`
    /// where it names none. Reads headers only.
    ///
    /// # Errors
    /// If the folder is damaged or does not hold the weights of `config.model`.
    pub fn open(config: &mut Config) -> Result<Option<Self>, TrainError> {
        let Some(init) = &mut config.init else {
            return Ok(None);
        };
        let place = locate(init, ModelFiles::All)?;
        if let Some(commit) = place.commit {
            // The name may carry the revision, too.
            let name = init.from.split('@').next().unwrap_or_default();
            init.from = name.to_string();
            init.revision = Some(commit);
        }
        let folder = HfFolder::open(&place.dir)?;
        let notes = differences(&folder.config, &config.model)?;
        InitFrom::plan(&config.model, &folder.weights, config.run.seed)?;
        Ok(Some(Self { folder, notes }))
    }

    /// The folder's small files, with their content.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn small_files(&self) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
        read_small_files(&self.folder.dir)
    }

    /// This rank's weights of all units; new TTT parameters are drawn from the run's seed.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn units(
        &self,
        config: &Config,
        mesh: &Mesh,
        device: &Device,
    ) -> Result<Vec<UnitState>, TrainError> {
        let plan = InitFrom::plan(&config.model, &self.folder.weights, config.run.seed)?;
        let compute = compute_dtype(config.run.device, config.train.compute);
        let unit = |unit| {
            let fill = |spec: &ParamSpec, range, values: &mut [f32]| {
                mesh.activity.at(&spec.name);
                plan.read(&spec.name, range, values)
            };
            UnitState::filled(&config.model, unit, mesh, device, compute, fill)
        };
        Unit::all(&config.model).into_iter().map(unit).collect()
    }

    /// Refuses a model whose new TTT layers change what the others compute: the logits of a few
    /// tokens behind the first chunk of `row` must be those of the model without new layers, bit
    /// for bit on a CPU and within rounding elsewhere. Returns whether there are new layers.
    ///
    /// # Errors
    /// If they differ or the device fails.
    pub fn check_unchanged(
        &self,
        model: &mut Model,
        row: &Row,
        mesh: &Mesh,
        exact: bool,
    ) -> Result<bool, TrainError> {
        let with = model.config.clone();
        let plan = InitFrom::plan(&with, &self.folder.weights, 0)?;
        let new: Vec<&str> = plan.new_parameters().collect();
        let mut without = with.clone();
        let mut old = with.ttt_layers();
        old.retain(|layer| {
            let begin = format!("model.layers.{layer}.mlp.");
            !new.iter().any(|name| name.starts_with(&begin))
        });
        if old.len() == with.ttt_layers().len() {
            return Ok(false);
        }
        without.ttt.enabled = !old.is_empty();
        (without.ttt.layers, without.ttt.every) = (Some(old), None);

        let params = Unit::all(&with)
            .into_iter()
            .map(|unit| {
                mesh.activity.at(format_args!("{unit:?}"));
                model.params(unit, mesh)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let plain = Unit::all(&without).into_iter().zip(&params);
        let plain = plain
            .map(|(unit, params)| restricted(unit, &without, params, model.compute))
            .collect();
        let logits = |config: &ModelConfig, params| {
            let decoder = Decoder::new(config, params, model.compute, &model.device);
            let mut session = decoder.session();
            mesh.activity.at("whether new layers change a logit");
            let (chunk, rest) = row
                .input_ids
                .split_at(with.ttt.chunk.min(row.input_ids.len() - 1));
            decoder.extend_last(&mut session, chunk);
            let rest = &rest[..rest.len().min(TOKENS)];
            let logits = decoder.extend(&mut session, rest);
            read_f32(&cast(logits.reshape([-1]), DType::F32))
        };
        let (got, expected) = (logits(&with, params)?, logits(&without, plain)?);
        let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
        let tolerance = match (exact, model.compute) {
            (true, _) => 0.0,
            // A few units in the last place of the largest: sums in another order.
            (false, DType::F32) => 1e-5 * f64::from(largest),
            (false, _) => f64::from(largest) / 64.0,
        };
        let pairs = got.iter().zip(&expected);
        let difference = pairs.fold(0f32, |max, (a, b)| {
            let difference = (a - b).abs();
            // f32::max would pass over what is not a number.
            if difference.is_nan() || difference > max {
                difference
            } else {
                max
            }
        });
        let difference = f64::from(difference);
        match difference <= tolerance {
            true => Ok(true),
            false => Err(TrainError::NotTheBaseModel {
                difference,
                tolerance,
            }),
        }
    }
}

/// Tokens whose logits are compared.
const TOKENS: usize = 16;

/// The small files of a model's folder that belong to its tokenizer, with their content.
///
/// # Errors
/// If one cannot be read.
pub fn read_small_files(dir: &std::path::Path) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
    let files = side_files(dir).into_iter().map(|path| {
        let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok((name.into_owned(), bytes))
    });
    files.collect()
}

/// The parameters of `unit` that the model `config` has, of those of a model with more TTT layers.
fn restricted(unit: Unit, config: &ModelConfig, params: &Params, compute: DType) -> Params {
    let specs = unit.params(config);
    let flat = specs.iter().map(|spec| {
        let value = match spec.shape.len() {
            1 => params.expect::<1>(&spec.name),
            2 => params.expect::<2>(&spec.name).reshape([-1]),
            _ => params.expect::<3>(&spec.name).reshape([-1]),
        };
        match spec.master_precision {
            true => value,
            false => cast(value, compute),
        }
    });
    let flat = flat.collect();
    Params::new(specs, flat)
}

/// Refuses a model that is not the folder's, and tells where it differs on purpose.
///
/// Positions, windows and TTT are the run's to choose. What decides the value of a trained weight
/// is not; and what a full `[model]` section leaves out would be changed without being asked for.
fn differences(base: &ModelConfig, model: &ModelConfig) -> Result<Vec<String>, ConfigError> {
    let differs = |key: &str, here: String, there: String| {
        let problem = format!("is {here}, the config.json of [init] says {there}: make them equal");
        Err(ConfigError::invalid(format!("model.{key}"), problem))
    };
    macro_rules! equal {
        ($($key:literal: $value:expr),* $(,)?) => { $(
            let value: &dyn Fn(&ModelConfig) -> String = &$value;
            if value(base) != value(model) {
                return differs($key, value(model), value(base)).map(|()| vec![]);
            }
        )* };
    }
    equal! {
        "model_type": |m| format!("{:?}", m.model_type).to_lowercase(),
        "vocab_size": |m| m.vocab_size.to_string(),
        "hidden_size": |m| m.hidden_size.to_string(),
        "intermediate_size": |m| m.intermediate_size.to_string(),
        "num_hidden_layers": |m| m.num_hidden_layers.to_string(),
        "num_attention_heads": |m| m.num_attention_heads.to_string(),
        "num_key_value_heads": |m| m.kv_heads().to_string(),
        "head_dim": |m| m.head_size().to_string(),
        "rms_norm_eps": |m| format!("{:e}", m.rms_norm_eps),
        "tie_word_embeddings": |m| m.tie_word_embeddings.to_string(),
        "rope_theta": |m| m.rope_theta.to_string(),
    }
    let mut notes = vec![];
    let mut chosen = |key: &str, here: Option<String>, there: Option<String>| match (here, there) {
        (here, there) if here == there => Ok(()),
        (None, Some(there)) => differs(key, "left out".into(), there),
        (here, there) => {
            let show = |value: Option<String>| value.unwrap_or_else(|| "none".into());
            let (here, there) = (show(here), show(there));
            notes.push(format!("model.{key} is {here}, that of [init] was {there}"));
            Ok(())
        }
    };
    let scaling = |m: &ModelConfig| m.rope_scaling.as_ref().map(|s| format!("{s:?}"));
    chosen("rope_scaling", scaling(model), scaling(base))?;
    let windows = |m: &ModelConfig| {
        let windows: Vec<_> = (0..m.num_hidden_layers).map(|l| m.window(l)).collect();
        windows
            .iter()
            .any(Option::is_some)
            .then(|| format!("{:?} in its layers", windows))
    };
    chosen("sliding_window", windows(model), windows(base))?;
    let positions = |m: &ModelConfig| Some(m.max_position_embeddings.to_string());
    chosen("max_position_embeddings", positions(model), positions(base))?;
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DeviceKind;
    use crate::device;
    use ttt_kernels::ops::master::Master;

    /// The check passes on new TTT layers, and sees one that does something.
    #[test]
    fn layers_that_change_the_model_are_seen() {
        let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/hf/qwen3");
        let text = format!(
            "run.dir = \"run\"\ndata.path = \"data\"\ninit.from = \"{base}\"\n\
             train = {{ steps = 1, sequence_length = 40, batch_tokens = 40 }}\n\
             optimizer.lr = 1.0\n\
             model.ttt = {{ enabled = true, layers = [1], chunk = 16, target = \"hidden\" }}"
        );
        let mut config = Config::parse(&text, "test".as_ref(), &[]).unwrap();
        let base = BaseModel::open(&mut config).unwrap().unwrap();
        let (mesh, device) = (Mesh::single(), device::open(DeviceKind::Cpu, 0).unwrap());
        let mut model = Model {
            config: config.model.clone(),
            units: base.units(&config, &mesh, &device).unwrap(),
            compute: DType::F32,
            device,
            rope: crate::step::RopeCache::default(),
            context: ttt_kernels::ContextSettings::default(),
        };
        let row = Row {
            input_ids: (0..40).map(|i| i * 7 % 101).collect(),
            labels: vec![0; 40],
            document_starts: vec![0],
        };
        assert!(base.check_unchanged(&mut model, &row, &mesh, true).unwrap());

        let block = &mut model.units[2];
        let conv = block
            .layout
            .specs
            .iter()
            .position(|spec| spec.name.ends_with("ttt_conv.weight"));
        let range = block.layout.range(conv.unwrap());
        let mut values = block.master.read(0..block.master.len()).unwrap();
        values[range].iter_mut().for_each(|value| *value += 0.1);
        let master = Master::new(values, block.master.len(), &model.device);
        block.update(master, block.moments.clone());
        for exact in [true, false] {
            let refused = base.check_unchanged(&mut model, &row, &mesh, exact);
            assert!(
                matches!(refused, Err(TrainError::NotTheBaseModel { .. })),
                "{refused:?}"
            );
        }
    }
}
