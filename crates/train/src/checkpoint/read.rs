//! Reading a checkpoint, on any layout: the files hold whole tensors, of which each rank maps its
//! ranges.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use ttt_kernels::memory;
use ttt_kernels::ops::adamw::Moments;
use ttt_model::{ModelConfig, Unit};
use ttt_parallel::Mesh;
use ttt_weights::Folder;

use super::manifest::{Manifest, Share};
use super::{FIRST, Progress, SECOND, folder, list};
use crate::agree::{all_or_none, together};
use crate::config::Config;
use crate::error::TrainError;
use crate::units::{FlatLayout, UnitState};

/// A complete checkpoint on disk, its files verified.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// Where the run stood.
    pub progress: Progress,
    /// The configuration of the run that wrote it.
    pub config: Config,
    model: Folder,
}

impl Checkpoint {
    /// Opens a checkpoint and verifies every file against its hashes.
    ///
    /// # Errors
    /// If a file is missing, truncated or changed, or written by another version.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let manifest = Manifest::read(path)?;
        manifest.verify(path, Share { index: 0, of: 1 }, |_| ())?;
        Self::verified(path, manifest)
    }

    /// [`Checkpoint::open`] by all ranks, each of which verifies a part.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], on all ranks if on one, or if a rank is lost.
    pub fn open_together(path: &Path, mesh: &Mesh, device: &Device) -> Result<Self, TrainError> {
        let share = Share {
            index: mesh.world.rank(),
            of: mesh.world.size(),
        };
        let each = |file: &str| mesh.activity.at(format_args!("verifying {file}"));
        let manifest = Manifest::read(path)
            .and_then(|manifest| manifest.verify(path, share, each).map(|()| manifest));
        // Nothing is read of a file before all of its pieces have been seen to be sound.
        let manifest = all_or_none(mesh, device, manifest)?;
        all_or_none(mesh, device, Self::verified(path, manifest))
    }

    fn verified(path: &Path, manifest: Manifest) -> Result<Self, TrainError> {
        Ok(Self {
            config: Config::load(&path.join("config.toml"), &[])?,
            model: Folder::open_stem(path, "model")?,
            progress: manifest.progress,
            path: path.to_path_buf(),
        })
    }

    /// The newest checkpoint of a run, if it has one.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn newest(run_dir: &Path) -> Result<Option<Self>, TrainError> {
        list(run_dir)?
            .last()
            .map(|path| Self::open(path))
            .transpose()
    }

    /// [`Checkpoint::newest`] by all ranks, as [`Checkpoint::open_together`].
    ///
    /// # Errors
    /// As there, or if the ranks do not see the same checkpoints.
    pub fn newest_together(
        run_dir: &Path,
        mesh: &Mesh,
        device: &Device,
    ) -> Result<Option<Self>, TrainError> {
        let newest = list(run_dir).map(|all| all.last().cloned());
        let newest = together(mesh, device, newest)?;
        let differs = |path: &&Option<PathBuf>| **path != newest[0];
        if let Some((rank, path)) = newest.iter().enumerate().find(|(_, path)| differs(path)) {
            let show = |path: &Option<PathBuf>| match path {
                Some(path) => path.display().to_string(),
                None => "none".into(),
            };
            return Err(TrainError::checkpoint(
                &folder(run_dir),
                format!(
                    "rank 0 sees {} as the newest, rank {rank} sees {}: run.dir must be on a file \
                     system that all ranks share",
                    show(&newest[0]),
                    show(path)
                ),
            ));
        }
        let open = |path: &PathBuf| Self::open_together(path, mesh, device);
        newest[0].as_ref().map(open).transpose()
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its tensors.
    pub fn weights(&self) -> &Folder {
        &self.model
    }

    /// Refuses a run whose model or data differ from the one that wrote this checkpoint.
    ///
    /// # Errors
    /// With the first difference.
    pub fn check(&self, config: &Config, data_fingerprint: &str) -> Result<(), TrainError> {
        if let Some(difference) = difference(&self.config.model, &config.model) {
            return Err(TrainError::checkpoint(
                &self.path,
                format!(
                    "does not match the configuration: {difference}; change it back, or begin a new run with --resume never"
                ),
            ));
        }
        if self.progress.data_fingerprint != data_fingerprint {
            return Err(TrainError::checkpoint(
                &self.path,
                "was trained on other batches (shards, seed, sequence_length or batch_tokens changed): \
                 change them back, or begin a new run with --resume never",
            ));
        }
        Ok(())
    }

    /// This rank's weights and moments of all units, of which a model computes in `compute`. Reads no more
    /// than these.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape, on all ranks if on one, or if a rank is lost.
    pub fn load(
        &self,
        model: &ModelConfig,
        mesh: &Mesh,
        device: &Device,
        compute: DType,
    ) -> Result<Vec<UnitState>, TrainError> {
        let optimizer = Folder::open_stem(&self.path, "optimizer")?;
        let load = |unit| {
            let mut state = self.load_unit(model, unit, mesh, device, compute)?;
            let moment = |kind| {
                let values = read_shard(&optimizer, kind, &state.layout, mesh)?;
                let len = values.len();
                let data = TensorData::new(values, [len]);
                let tensor = |data| Tensor::from_data(data, (device, DType::F32));
                Ok::<_, TrainError>(memory::lasting(device, data, tensor))
            };
            let (first, second) = (moment(FIRST)?, moment(SECOND)?);
            state.moments = Moments { first, second };
            Ok(state)
        };
        let units: Result<Vec<_>, _> = Unit::all(model).into_iter().map(load).collect();
        all_or_none(mesh, device, units)
    }

    /// This rank's weights of one unit, moments zero, as [`Checkpoint::load`].
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn load_unit(
        &self,
        model: &ModelConfig,
        unit: Unit,
        mesh: &Mesh,
        device: &Device,
        compute: DType,
    ) -> Result<UnitState, TrainError> {
        let layout = FlatLayout::new(model, unit, mesh.shard.size());
        let master = read_shard(&self.model, "", &layout, mesh)?;
        Ok(UnitState::from_shard(unit, layout, master, device, compute))
    }
}

/// This rank's shard of the tensors of a unit that are named with `kind`.
fn read_shard(
    folder: &Folder,
    kind: &str,
    layout: &FlatLayout,
    mesh: &Mesh,
) -> Result<Vec<f32>, TrainError> {
    layout.read_shard(mesh.shard.rank(), |spec, range, values| {
        let name = format!("{}{kind}", spec.name);
        mesh.activity.at(&name);
        let found = folder.info(&name).map(|info| info.shape);
        if found.as_ref() != Some(&spec.shape) {
            let expected = &spec.shape;
            let found = found.map_or("is missing".into(), |shape| format!("has shape {shape:?}"));
            return Err(TrainError::checkpoint(
                folder.dir(),
                format!("tensor {name} {found}, expected {expected:?}"),
            ));
        }
        Ok(folder.read_f32_range(&name, range, values)?)
    })
}

/// The first key whose value differs.
fn difference(saved: &ModelConfig, asked: &ModelConfig) -> Option<String> {
    let json = |config| serde_json::to_value(config).expect("a configuration is plain data");
    let (saved, asked) = (json(saved), json(asked));
    first_difference("model", &saved, &asked)
}

fn first_difference(
    key: &str,
    saved: &serde_json::Value,
    asked: &serde_json::Value,
) -> Option<String> {
    use serde_json::Value;
    match (saved, asked) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.into_iter().find_map(|name| {
                let get =
                    |map: &serde_json::Map<_, _>| map.get(name).cloned().unwrap_or(Value::Null);
                first_difference(&format!("{key}.{name}"), &get(a), &get(b))
            })
        }
        (a, b) if a == b => None,
        (a, b) => Some(format!("{key} was {a}, now {b}")),
    }
}
