//! A trained model from its checkpoint, to evaluate or to sample from.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device};
use ttt_data::{Dataset, Split, Tokenizer};
use ttt_model::Unit;
use ttt_model::decode::Decoder;
use ttt_parallel::Mesh;

use crate::checkpoint::Checkpoint;
use crate::config::{ConfigError, DeviceKind};
use crate::device;
use crate::error::TrainError;
use crate::evaluate::{Evaluation, evaluate};
use crate::generate::{Generation, Sampling};
use crate::step::Model;
use crate::units::UnitState;

/// A checkpoint and the device it is used on.
#[derive(Debug)]
pub struct Trained {
    /// The checkpoint, verified.
    pub checkpoint: Checkpoint,
    device: Device,
    compute: DType,
    mesh: Mesh,
}

/// What to evaluate on; what is `None` is as in the checkpoint's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EvalOptions<'a> {
    /// Folder of token shards.
    pub data: Option<&'a Path>,
    /// Rows of the validation split.
    pub rows: Option<usize>,
    /// Tokens of a row.
    pub sequence_length: Option<usize>,
}

impl Trained {
    /// Opens a checkpoint's folder, or the newest checkpoint of a run's folder, on `kind` or the
    /// device it was trained on.
    ///
    /// # Errors
    /// If there is no sound checkpoint, or no such device.
    pub fn open(path: &Path, kind: Option<DeviceKind>) -> Result<Self, TrainError> {
        let newest = match path.join("manifest.json").is_file() {
            true => None,
            false => Checkpoint::newest(path)?,
        };
        let checkpoint = match newest {
            Some(checkpoint) => checkpoint,
            None => Checkpoint::open(path)?,
        };
        let config = &checkpoint.config;
        let kind = kind.unwrap_or(config.run.device);
        // A precision chosen for the training device need not be the best of another.
        let asked = config.train.compute.filter(|_| kind == config.run.device);
        Ok(Self {
            device: device::open(kind)?,
            compute: device::compute_dtype(kind, asked),
            mesh: Mesh::single(),
            checkpoint,
        })
    }

    /// The tokenizer it was trained with.
    ///
    /// # Errors
    /// If the checkpoint's copy cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer, TrainError> {
        Ok(Tokenizer::load(&self.checkpoint.path().join("tokenizer.json"))?)
    }

    fn units(&self) -> Result<Vec<UnitState>, TrainError> {
        let model = &self.checkpoint.config.model;
        let load = |unit| self.checkpoint.load_unit(model, unit, &self.mesh, &self.device);
        Unit::all(model).into_iter().map(load).collect()
    }

    /// The mean loss over rows of a validation split, overall and by position.
    ///
    /// # Errors
    /// If the shards cannot be read, are those of another tokenizer, or hold no row.
    pub fn evaluate(&self, options: &EvalOptions<'_>) -> Result<Evaluation, TrainError> {
        let config = &self.checkpoint.config;
        let data = options.data.unwrap_or(&config.data.path);
        let dataset = Arc::new(Dataset::open(data, Split::Validation)?);
        dataset.check_tokenizer(&self.tokenizer()?)?;
        let mut model = Model {
            config: config.model.clone(),
            units: self.units()?,
            compute: self.compute,
            device: self.device.clone(),
        };
        let length = options.sequence_length.unwrap_or(config.train.sequence_length);
        let rows = options.rows.unwrap_or(config.eval.rows);
        if length == 0 || rows == 0 {
            return Err(ConfigError::invalid("eval", "needs at least one row of one token").into());
        }
        let at_once = config.train.micro_batch_rows;
        evaluate(&mut model, &dataset, length, rows, at_once, &self.mesh)
    }

    /// Continues each prompt by at most `max_tokens` tokens and hands on the text as it comes,
    /// with the prompt's number. Prompts draw independently of each other.
    ///
    /// # Errors
    /// If a prompt cannot be tokenized, or the device or `show` fails.
    pub fn generate(
        &self,
        prompts: &[String],
        max_tokens: usize,
        sampling: Sampling,
        mut show: impl FnMut(usize, &str) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let tokenizer = self.tokenizer()?;
        let params = self.units()?.into_iter().map(|mut unit| unit.params(self.compute, &self.mesh));
        let params = params.collect::<Result<Vec<_>, _>>()?;
        let decoder = Decoder::new(&self.checkpoint.config.model, params, self.compute, &self.device);
        for (i, prompt) in prompts.iter().enumerate() {
            let mut generation = Generation::start(&decoder, &tokenizer, prompt, sampling, i as u64)?;
            let mut text = tokenizer.decode_stream();
            for _ in 0..max_tokens {
                let Some(id) = generation.next_token()? else { break };
                if let Some(piece) = text.push(id)? {
                    show(i, &piece)?;
                }
            }
            show(i, &text.finish()?)?;
        }
        Ok(())
    }
}
