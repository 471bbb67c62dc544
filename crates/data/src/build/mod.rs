//! `ttt data build`: from sources to a dataset folder.
//!
//! ```text
//! out/manifest.json                      written last: a folder that has one is complete
//! out/tokenizer.json                     copy of the tokenizer
//! out/shards/SOURCE/train-00000.bin      token shards
//! out/build.jsonl, build.lock            journal of the build, and its lock
//! ```
//!
//! One thread reads records in order; all cores parse, hash and tokenise them; this thread appends the results in order
//! to the open shard of each split. The order of the records alone decides the bytes: not the number of threads, and not
//! when the build was killed and started again.

mod config;
mod journal;
mod prepare;
mod source;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub use config::{BuildConfig, DEFAULT_MAX_DOCUMENT_BYTES};
use journal::Journal;
use prepare::TokenizerPool;

use crate::manifest::{Manifest, SourceInfo, SplitInfo, TokenType};
use crate::source::{Discovered, discover};
use crate::tokenizer::TOKENIZER_FILE;
use crate::{DataError, Split, Tokenizer, durable};

/// Whether a build shows a progress bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Progress {
    /// On a terminal.
    #[default]
    Auto,
    /// Never.
    Hidden,
}

const LOCK_FILE: &str = "build.lock";
const SHARD_FOLDER: &str = "shards";

/// Builds the dataset that `config` describes, or finishes it where an earlier run was interrupted; a finished one is
/// left as it is but for its weights, which may change. Every file appears whole or not at all.
pub fn build(config: &BuildConfig, progress: Progress) -> Result<Manifest, DataError> {
    config.check()?;
    let tokenizer = Tokenizer::load_with_eos(
        &config.tokenizer,
        config.eos_token.as_deref(),
        config.offline,
    )?;
    let dtype = TokenType::for_vocab(tokenizer.vocab_size())?;
    let found = config
        .sources
        .iter()
        .map(|spec| discover(spec, config.offline))
        .collect::<Result<Vec<_>, _>>()?;
    let fingerprint = config.fingerprint(&tokenizer, dtype, &found);

    let out = &config.out;
    std::fs::create_dir_all(out).map_err(DataError::io(out, "create the folder"))?;
    let _lock = Lock::take(out)?;
    if let Some(finished) = finished_before(config, &fingerprint)? {
        return Ok(finished);
    }
    copy_tokenizer(&tokenizer, out)?;
    let (mut journal, finished) = Journal::open(out, &fingerprint, &input_stamp(&found)?)?;

    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.threads)
        .thread_name(|index| format!("data-build-{index}"))
        .build()
        .map_err(|error| DataError::setting("threads", error.to_string()))?;
    let tokenizers = TokenizerPool::new(tokenizer.clone(), pool.current_num_threads());
    let bar = Bar::new(progress, found.iter().map(Discovered::bytes).sum());
    let mut sources = Vec::with_capacity(found.len());
    for (index, source) in found.iter().enumerate() {
        let job = source::Job {
            config,
            index,
            source,
            pool: &pool,
            tokenizers: &tokenizers,
            eos_id: tokenizer.eos_id(),
            dtype,
            bar: &bar,
        };
        let info = job.run(&mut journal, &finished)?;
        if info.train.documents + info.validation.documents == 0 {
            return Err(DataError::EmptyDataset { sources: info.name });
        }
        tracing::info!(
            source = info.name,
            train_tokens = info.train.tokens,
            validation_tokens = info.validation.tokens,
            skipped = ?info.skipped,
            "source built"
        );
        sources.push(info);
    }
    bar.bar.finish_and_clear();

    let mut manifest = Manifest {
        format: Manifest::FORMAT,
        tokenizer_hash: tokenizer.hash().to_string(),
        vocab_size: tokenizer.vocab_size(),
        eos_id: tokenizer.eos_id(),
        dtype,
        build_fingerprint: fingerprint,
        validation_fraction: config.validation_fraction,
        sources,
        hash: String::new(),
    };
    manifest.save(out)?;
    if config.validation_fraction > 0.0 && manifest.documents(Split::Validation) == 0 {
        tracing::warn!(
            validation_fraction = config.validation_fraction,
            documents = manifest.documents(Split::Train),
            "no document fell into the validation split"
        );
    }
    Ok(manifest)
}

/// Keeps two builds out of one folder. The system lets go of it when the process ends, also by a kill.
struct Lock {
    file: std::fs::File,
}

impl Lock {
    fn take(out: &Path) -> Result<Self, DataError> {
        let path = out.join(LOCK_FILE);
        let file = std::fs::File::create(&path).map_err(DataError::io(&path, "create the lock"))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { file }),
            Err(std::fs::TryLockError::WouldBlock) => Err(DataError::BuildRunning {
                path: out.to_path_buf(),
            }),
            Err(std::fs::TryLockError::Error(error)) => Err(DataError::io(&path, "lock")(error)),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread is just starting holds a copy of the handle.
        let _ = self.file.unlock();
    }
}

/// The manifest of a complete dataset of the same build in the folder, with the weights of `config`. When shards are
/// gone the manifest is removed: the folder is an interrupted build again.
fn finished_before(config: &BuildConfig, fingerprint: &str) -> Result<Option<Manifest>, DataError> {
    let mut manifest = match Manifest::load(&config.out) {
        Ok(manifest) => manifest,
        Err(DataError::NoManifest { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    if manifest.build_fingerprint != fingerprint {
        return Err(DataError::OutputInUse {
            path: config.out.clone(),
            reason: "it holds a dataset of other inputs, settings or tokenizer".into(),
        });
    }
    let complete = (manifest.sources.iter())
        .flat_map(|source| {
            Split::ALL
                .into_iter()
                .flat_map(|split| &source.split(split).shards)
        })
        .all(|shard| {
            std::fs::metadata(config.out.join(&shard.file))
                .is_ok_and(|file| file.len() == shard.bytes)
        });
    if !complete {
        let path = config.out.join(Manifest::FILE);
        std::fs::remove_file(&path).map_err(DataError::io(&path, "remove"))?;
        durable::sync_parent(&path)?;
        return Ok(None);
    }
    // The fingerprint covers the names and their order.
    let mut changed = false;
    for (source, spec) in manifest.sources.iter_mut().zip(&config.sources) {
        changed |= source.weight != spec.weight;
        source.weight = spec.weight;
    }
    if changed {
        manifest.save(&config.out)?;
    }
    Ok(Some(manifest))
}

/// Puts the tokenizer beside the shards, so that the folder is complete by itself.
fn copy_tokenizer(tokenizer: &Tokenizer, out: &Path) -> Result<(), DataError> {
    let bytes = std::fs::read(tokenizer.path())
        .map_err(DataError::io(tokenizer.path(), "read the tokenizer"))?;
    let path = out.join(TOKENIZER_FILE);
    match std::fs::read(&path) {
        Ok(there) if there == bytes => return Ok(()),
        Ok(_) => {
            return Err(DataError::OutputInUse {
                path: out.to_path_buf(),
                reason: "it holds another tokenizer.json".into(),
            });
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(DataError::io(&path, "read")(error)),
    }
    durable::write_atomically(&path, |writer| writer.write_all(&bytes))
}

/// Hash over the input files' times: tells whether an interrupted build may go on with them.
fn input_stamp(found: &[Discovered]) -> Result<String, DataError> {
    let mut hasher = blake3::Hasher::new();
    for file in found
        .iter()
        .flat_map(|source| source.units.iter().flatten())
    {
        let modified = std::fs::metadata(&file.path)
            .and_then(|file| file.modified())
            .map_err(DataError::io(&file.path, "read the modification time"))?;
        let since = modified
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        hasher.update(&since.as_nanos().to_le_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The progress bar: bytes of input read, and tokens made.
struct Bar {
    bar: ProgressBar,
    read: crate::source::BytesRead,
}

impl Bar {
    fn new(progress: Progress, bytes: u64) -> Self {
        // Standard error; indicatif draws nothing when that is no terminal.
        let target = match progress {
            Progress::Auto => ProgressDrawTarget::stderr(),
            Progress::Hidden => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(bytes), target);
        let template = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(500));
        Self {
            bar,
            read: Default::default(),
        }
    }

    fn update(&self, source: &str, tokens: u64) {
        self.bar.set_position(self.read.load(Ordering::Relaxed));
        self.bar
            .set_message(format!("{source}: {:.1} M tokens", tokens as f64 / 1e6));
    }
}

fn source_info(source: &Discovered, train: SplitInfo, validation: SplitInfo) -> SourceInfo {
    SourceInfo {
        name: source.spec.name.clone(),
        weight: source.spec.weight,
        hub: source.hub.clone(),
        train,
        validation,
        skipped: Default::default(),
    }
}
