//! From the `[data]` section to token shards that fit the model.

use std::path::PathBuf;
use std::sync::Arc;

use ttt_data::{
    BuildConfig, Dataset, Loader, ModelFiles, Progress, Sampler, Split, Tokenizer, build,
    train_tokenizer,
};
use ttt_parallel::Mesh;

use crate::config::{Config, ConfigError};
use crate::error::TrainError;
use crate::start::locate;

/// The data of a run.
#[derive(Debug)]
pub struct Data {
    /// Rows to train on.
    pub sampler: Arc<Sampler>,
    /// Documents held out, if there are any.
    pub validation: Option<Arc<Dataset>>,
    /// What made the tokens.
    pub tokenizer: Tokenizer,
    /// The copy of `tokenizer.json` beside the shards.
    pub tokenizer_path: PathBuf,
}

impl Data {
    /// Builds what is missing, if `make`, and opens the rest.
    ///
    /// # Errors
    /// If text, shards or tokenizer cannot be read, or do not fit the model.
    pub fn prepare(config: &Config, make: bool) -> Result<Self, TrainError> {
        let path = &config.data.path;
        if make && !config.data.sources.is_empty() {
            build(&build_recipe(config)?, Progress::Auto)?;
        }
        let train = Arc::new(Dataset::open(path, Split::Train)?);
        let tokenizer = train.tokenizer()?;
        if let Some(name) = named_tokenizer(config)? {
            train.check_tokenizer(&Tokenizer::load(&name)?)?;
        }
        let (known, vocab) = (train.manifest().vocab_size, config.model.vocab_size as u64);
        if known > vocab {
            return Err(ConfigError::invalid(
                "model.vocab_size",
                format!(
                    "the tokenizer of {} has {known} tokens, the model knows {vocab}: set at least {known}",
                    path.display()
                ),
            )
            .into());
        }
        let sampler = Sampler::new(
            train,
            config.train.sequence_length,
            config.train.batch_rows(),
            config.run.seed,
        )?;
        Ok(Self {
            sampler: Arc::new(sampler),
            validation: validation(config)?,
            tokenizer,
            tokenizer_path: path.join("tokenizer.json"),
        })
    }

    /// Batches of this rank's rows, read ahead, from step `first_step` on.
    ///
    /// # Errors
    /// If the reading thread cannot start.
    pub fn loader(&self, first_step: u64, mesh: &Mesh) -> Result<Loader, TrainError> {
        let rows = self.sampler.rows_per_step() / mesh.data_size();
        let first = mesh.data_rank() * rows;
        Ok(Loader::new(
            self.sampler.clone(),
            first..first + rows,
            first_step,
            READ_AHEAD,
        )?)
    }
}

/// Batches that wait for the step.
const READ_AHEAD: usize = 4;

/// The validation split, `None` where evaluation is off.
fn validation(config: &Config) -> Result<Option<Arc<Dataset>>, TrainError> {
    if config.eval.every == 0 {
        return Ok(None);
    }
    let dataset = Arc::new(Dataset::open(&config.data.path, Split::Validation)?);
    // Asked for now, so that a split of no whole row is refused before the first step.
    dataset.sequential(config.train.sequence_length)?;
    Ok(Some(dataset))
}

/// The build that `[data]` describes. Trains the tokenizer first if only its size is given.
///
/// # Errors
/// If there is no tokenizer, or the text to train one on cannot be read.
pub fn build_recipe(config: &Config) -> Result<BuildConfig, TrainError> {
    let data = &config.data;
    Ok(BuildConfig {
        validation_fraction: data.validation_fraction,
        shard_tokens: data.shard_tokens,
        ..BuildConfig::new(data.sources.clone(), &data.path, tokenizer(config)?)
    })
}

/// The tokenizer that `[data]` or, if it says nothing of one, the model of `[init]` has.
fn named_tokenizer(config: &Config) -> Result<Option<PathBuf>, TrainError> {
    let data = &config.data;
    match (&data.tokenizer, &config.init) {
        (Some(name), _) => Ok(Some(name.into())),
        // Text split another way means nothing to a trained model.
        (None, Some(init)) if data.tokenizer_vocab_size.is_none() => {
            let file = locate(init, ModelFiles::Small)?.dir.join("tokenizer.json");
            Ok(file.is_file().then_some(file))
        }
        _ => Ok(None),
    }
}

/// The tokenizer that `[data]` names, trained first if it only names a size.
fn tokenizer(config: &Config) -> Result<PathBuf, TrainError> {
    match (named_tokenizer(config)?, config.data.tokenizer_vocab_size) {
        (Some(name), _) => Ok(name),
        (None, Some(size)) => {
            let out = config.data.path.join(format!("tokenizer-{size}"));
            let file = out.join("tokenizer.json");
            if !file.is_file() {
                std::fs::create_dir_all(&out).map_err(TrainError::io("create", &out))?;
                train_tokenizer(&config.data.sources, size, &out)?;
            }
            Ok(file)
        }
        (None, None) => {
            let path = config.data.path.join("tokenizer.json");
            match path.is_file() {
                true => Ok(path),
                false => Err(ConfigError::invalid(
                    "data.tokenizer",
                    "name a tokenizer, or set data.tokenizer_vocab_size to train one on the sources",
                )
                .into()),
            }
        }
    }
}
