//! Checkpoints: a folder that exists only when it is complete.
//!
//! ```text
//! <run.dir>/checkpoints/step-00000100/
//!     model.safetensors       master weights, f32, Hugging Face names (in shards when large)
//!     optimizer.safetensors   <name>.exp_avg and <name>.exp_avg_sq
//!     config.toml             the configuration of the run
//!     tokenizer.json          and what else belongs to it, if the run began with another model
//!     manifest.json           step, data cursor, and the size and hash of every file above
//! ```
//!
//! It is written aside, flushed and renamed, so that a process killed at any instant leaves the
//! checkpoints it had.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use ttt_kernels::ops::adamw::Moments;
use ttt_model::{ModelConfig, ParamSpec, Unit};
use ttt_parallel::Mesh;
use ttt_weights::{Dtype, Folder, TensorSpec, Writer, WrittenFile, atomic_folder};

use crate::config::Config;
use crate::device::read_f32;
use crate::error::TrainError;
use crate::units::UnitState;

/// Version of the layout above.
const FORMAT: u32 = 1;

/// Bytes of one safetensors file.
pub(crate) const SHARD_BYTES: u64 = 5 << 30;

/// What a run needs beside weights and moments to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done: the data cursor.
    pub step: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Running mean of the gradient norm.
    pub mean_grad_norm: f32,
    /// What the batches are a function of; a run on other data must not go on.
    pub data_fingerprint: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    progress: Progress,
    files: Vec<FileEntry>,
}

/// A file of a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileEntry {
    name: String,
    bytes: u64,
    blake3: String,
}

impl From<WrittenFile> for FileEntry {
    fn from(file: WrittenFile) -> Self {
        Self {
            name: file.file,
            bytes: file.bytes,
            blake3: file.blake3,
        }
    }
}

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

/// The folder that holds a run's checkpoints.
pub fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// The folder of the checkpoint after `step` steps.
pub fn path_of(run_dir: &Path, step: u64) -> PathBuf {
    folder(run_dir).join(format!("step-{step:08}"))
}

/// The checkpoints of a run, oldest first.
///
/// # Errors
/// If the folder is there but cannot be listed.
pub fn list(run_dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let folder = folder(run_dir);
    if !folder.exists() {
        return Ok(vec![]);
    }
    let entries = std::fs::read_dir(&folder).map_err(TrainError::io("list", &folder))?;
    let mut found = vec![];
    for entry in entries {
        let path = entry.map_err(TrainError::io("list", &folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let step = name
            .strip_prefix("step-")
            .and_then(|n| n.parse::<u64>().ok());
        found.extend(step.map(|step| (step, path.clone())));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Writes a checkpoint of the run in `config.run.dir`, with `small` files (name and content) for its
/// tokenizer, and removes all but the newest `config.checkpoint.keep`. Returns its folder.
///
/// # Errors
/// If a file cannot be written; what was there before stays.
pub fn save(
    config: &Config,
    units: &[UnitState],
    progress: &Progress,
    small: &[(String, Vec<u8>)],
    mesh: &Mesh,
) -> Result<PathBuf, TrainError> {
    let path = path_of(&config.run.dir, progress.step);
    atomic_folder(&path, |dir| {
        let mut files = write_model(dir, units, mesh)?;
        files.extend(write_optimizer(dir, units, mesh)?);
        files.push(write_file(
            dir,
            "config.toml",
            config.to_toml()?.as_bytes(),
        )?);
        for (name, bytes) in small {
            files.push(write_file(dir, name, bytes)?);
        }
        seal(dir, progress, files)
    })?;
    let all = list(&config.run.dir)?;
    let excess = all.len().saturating_sub(config.checkpoint.keep.max(1));
    for old in &all[..excess] {
        std::fs::remove_dir_all(old).map_err(TrainError::io("remove", old))?;
    }
    Ok(path)
}

/// Writes the manifest, without which a folder is no checkpoint.
pub(crate) fn seal(
    dir: &Path,
    progress: &Progress,
    files: Vec<FileEntry>,
) -> Result<(), TrainError> {
    let manifest = Manifest {
        format: FORMAT,
        progress: progress.clone(),
        files,
    };
    let json = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    write_file(dir, "manifest.json", &json)?;
    Ok(())
}

pub(crate) fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<FileEntry, TrainError> {
    let path = dir.join(name);
    std::fs::write(&path, bytes).map_err(TrainError::io("write", &path))?;
    Ok(FileEntry {
        name: name.into(),
        bytes: bytes.len() as u64,
        blake3: blake3::hash(bytes).to_hex().to_string(),
    })
}

fn spec_of(name: String, spec: &ParamSpec) -> TensorSpec {
    TensorSpec {
        name,
        shape: spec.shape.clone(),
        dtype: Dtype::F32,
    }
}

fn write_model(dir: &Path, units: &[UnitState], mesh: &Mesh) -> Result<Vec<FileEntry>, TrainError> {
    let specs = units.iter().flat_map(|unit| &unit.layout.specs);
    let specs = specs.map(|spec| spec_of(spec.name.clone(), spec)).collect();
    let mut writer = Writer::create(dir, "model", specs, SHARD_BYTES, HashMap::new())?;
    for unit in units {
        for (spec, values) in gathered(unit, &unit.master, mesh)? {
            writer.append_f32(&spec.name, &values)?;
        }
    }
    entries(writer)
}

fn write_optimizer(
    dir: &Path,
    units: &[UnitState],
    mesh: &Mesh,
) -> Result<Vec<FileEntry>, TrainError> {
    let mut specs = vec![];
    for unit in units {
        for kind in [FIRST, SECOND] {
            let names = unit.layout.specs.iter();
            specs.extend(names.map(|spec| spec_of(format!("{}{kind}", spec.name), spec)));
        }
    }
    let mut writer = Writer::create(dir, "optimizer", specs, SHARD_BYTES, HashMap::new())?;
    for unit in units {
        let moments = [(FIRST, &unit.moments.first), (SECOND, &unit.moments.second)];
        for (kind, moment) in moments {
            for (spec, values) in gathered(unit, moment, mesh)? {
                writer.append_f32(&format!("{}{kind}", spec.name), &values)?;
            }
        }
    }
    entries(writer)
}

const FIRST: &str = ".exp_avg";
const SECOND: &str = ".exp_avg_sq";

fn entries(writer: Writer) -> Result<Vec<FileEntry>, TrainError> {
    Ok(writer.finish()?.into_iter().map(FileEntry::from).collect())
}

/// One parameter after the other from a flat, sharded buffer.
fn gathered<'a>(
    unit: &'a UnitState,
    shard: &Tensor<1>,
    mesh: &Mesh,
) -> Result<Vec<(&'a ParamSpec, Vec<f32>)>, TrainError> {
    let full = read_f32(&mesh.shard.all_gather(shard.clone())?)?;
    let specs = unit.layout.specs.iter().enumerate();
    Ok(specs
        .map(|(i, spec)| (spec, full[unit.layout.range(i)].to_vec()))
        .collect())
}

impl Checkpoint {
    /// Opens a checkpoint and verifies every file against its hash.
    ///
    /// # Errors
    /// If a file is missing, truncated or changed, or written by another version.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let refuse = |problem: String| Err(TrainError::checkpoint(path, problem));
        let file = path.join("manifest.json");
        if !file.is_file() {
            return refuse(
                "has no manifest.json: name a folder such as <run>/checkpoints/step-00000100"
                    .into(),
            );
        }
        let json = std::fs::read(&file).map_err(TrainError::io("read", &file))?;
        let manifest: Manifest = match serde_json::from_slice(&json) {
            Ok(manifest) => manifest,
            Err(error) => return refuse(format!("manifest.json: {error}")),
        };
        if manifest.format != FORMAT {
            let format = manifest.format;
            return refuse(format!("has format {format}, this program reads {FORMAT}"));
        }
        for entry in &manifest.files {
            verify(path, entry)?;
        }
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

    /// Weights and moments of all units.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn load(
        &self,
        model: &ModelConfig,
        mesh: &Mesh,
        device: &Device,
    ) -> Result<Vec<UnitState>, TrainError> {
        let optimizer = Folder::open_stem(&self.path, "optimizer")?;
        let load = |unit| {
            let mut state = self.load_unit(model, unit, mesh, device)?;
            let moment = |kind: &str| {
                let mut full = vec![];
                for spec in &state.layout.specs {
                    full.extend(tensor(&optimizer, &format!("{}{kind}", spec.name), spec)?);
                }
                let shard = state.layout.shard_of(&full, mesh.shard.rank());
                let len = shard.len();
                let data = TensorData::new(shard, [len]);
                Ok::<_, TrainError>(Tensor::from_data(data, (device, DType::F32)))
            };
            let (first, second) = (moment(FIRST)?, moment(SECOND)?);
            state.moments = Moments { first, second };
            Ok(state)
        };
        Unit::all(model).into_iter().map(load).collect()
    }

    /// Weights of one unit, moments zero.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn load_unit(
        &self,
        model: &ModelConfig,
        unit: Unit,
        mesh: &Mesh,
        device: &Device,
    ) -> Result<UnitState, TrainError> {
        UnitState::new(model, unit, mesh, device, |spec| {
            tensor(&self.model, &spec.name, spec)
        })
    }
}

fn tensor(folder: &Folder, name: &str, spec: &ParamSpec) -> Result<Vec<f32>, TrainError> {
    let found = folder.info(name).map(|info| info.shape);
    if found.as_ref() != Some(&spec.shape) {
        let expected = &spec.shape;
        let found = found.map_or("is missing".into(), |shape| format!("has shape {shape:?}"));
        return Err(TrainError::checkpoint(
            folder.dir(),
            format!("tensor {name} {found}, expected {expected:?}"),
        ));
    }
    let mut values = vec![0.0; spec.len()];
    folder.read_f32(name, &mut values)?;
    Ok(values)
}

fn verify(folder: &Path, entry: &FileEntry) -> Result<(), TrainError> {
    let name = &entry.name;
    if name.contains(['/', '\\']) || name.starts_with('.') {
        return Err(TrainError::checkpoint(
            folder,
            format!("manifest.json names {name:?}, which is no file of the folder"),
        ));
    }
    let path = folder.join(name);
    let length = std::fs::metadata(&path)
        .map_err(TrainError::io("read", &path))?
        .len();
    if length != entry.bytes {
        return Err(TrainError::checkpoint(
            folder,
            format!(
                "{name} has {length} bytes instead of {}: it is damaged, use an older checkpoint",
                entry.bytes
            ),
        ));
    }
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_mmap_rayon(&path)
        .map_err(TrainError::io("read", &path))?;
    if hasher.finalize().to_hex().as_str() != entry.blake3 {
        return Err(TrainError::checkpoint(
            folder,
            format!(
                "{name} does not have the content it was written with: it is damaged, use an older checkpoint"
            ),
        ));
    }
    Ok(())
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
