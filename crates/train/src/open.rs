//! Opening a checkpoint to use the model in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ttt_data::{Dataset, Split, Tokenizer};
use ttt_model::Unit;
use ttt_model::decode::Decoder;
use ttt_parallel::Mesh;

use crate::checkpoint::Checkpoint;
use crate::config::{Config, DeviceKind};
use crate::device;
use crate::error::TrainError;
use crate::evaluate::{Evaluation, evaluate};
use crate::step::{Model, RopeCache};

/// The model of a checkpoint, on a device.
#[derive(Debug)]
pub struct Opened {
    /// The configuration of its run.
    pub config: Config,
    /// The model; it holds no moments.
    pub model: Model,
    /// The checkpoint's own tokenizer.
    pub tokenizer: Tokenizer,
    /// The checkpoint's folder.
    pub path: PathBuf,
    mesh: Mesh,
}

impl Opened {
    /// Opens the checkpoint at `path`, or the newest one of the run at `path`, on `device`, by
    /// default that of its run.
    ///
    /// # Errors
    /// If the checkpoint is damaged or the device is not there.
    pub fn new(path: &Path, device: Option<DeviceKind>) -> Result<Self, TrainError> {
        let newest = match path.join("manifest.json").is_file() {
            true => None,
            false => Checkpoint::newest(path)?,
        };
        let checkpoint = match newest {
            Some(checkpoint) => checkpoint,
            None => Checkpoint::open(path)?,
        };
        let config = checkpoint.config.clone();
        let kind = device.unwrap_or(config.run.device);
        let device = device::open(kind, 0)?;
        let compute = device::compute_dtype(kind, config.train.compute);
        let mesh = Mesh::single();
        let units = Unit::all(&config.model)
            .into_iter()
            .map(|unit| checkpoint.load_unit(&config.model, unit, &mesh, &device, compute))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            model: Model {
                config: config.model.clone(),
                units,
                compute,
                device,
                rope: RopeCache::default(),
                context: ttt_kernels::ContextSettings::default(),
            },
            tokenizer: Tokenizer::load(&checkpoint.path().join("tokenizer.json"))?,
            path: checkpoint.path().to_path_buf(),
            config,
            mesh,
        })
    }

    /// The tokens that end a text: the tokenizer's own, and those that `generation_config.json`
    /// names, of which instruct models have several.
    ///
    /// # Errors
    /// If that file is damaged.
    pub fn end_ids(&self) -> Result<Vec<u32>, TrainError> {
        let mut ids = vec![self.tokenizer.eos_id()];
        let path = self.path.join("generation_config.json");
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
            let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| {
                let problem = format!("generation_config.json: {error}");
                TrainError::checkpoint(&self.path, problem)
            })?;
            let named = &json["eos_token_id"];
            let several = named.as_array().into_iter().flatten();
            let named = several.chain(Some(named)).filter_map(|id| id.as_u64());
            ids.extend(named.filter_map(|id| u32::try_from(id).ok()));
        }
        Ok(ids)
    }

    /// The model as a decoder.
    ///
    /// # Errors
    /// If the device fails.
    pub fn decoder(&mut self) -> Result<Decoder, TrainError> {
        let units = Unit::all(&self.config.model)
            .into_iter()
            .map(|unit| self.model.params(unit, &self.mesh))
            .collect::<Result<Vec<_>, _>>()?;
        let Model {
            compute, device, ..
        } = &self.model;
        Ok(Decoder::new(&self.config.model, units, *compute, device))
    }

    /// The validation loss on the shards at `data` (by default those of the run), over the first
    /// `rows` rows of `sequence_length` tokens (by default the run's).
    ///
    /// # Errors
    /// If the shards do not fit the tokenizer, hold no row of this length, or cannot be read.
    pub fn evaluate(
        &mut self,
        data: Option<&Path>,
        rows: Option<usize>,
        sequence_length: Option<usize>,
    ) -> Result<Evaluation, TrainError> {
        let path = data.unwrap_or(&self.config.data.path);
        let dataset = Arc::new(Dataset::open(path, Split::Validation)?);
        dataset.check_tokenizer(&self.tokenizer)?;
        let length = sequence_length.unwrap_or(self.config.train.sequence_length);
        let rows = rows.unwrap_or(self.config.eval.rows);
        let at_once = self.config.train.micro_batch_rows;
        evaluate(&mut self.model, &dataset, length, rows, at_once, &self.mesh)
    }
}
