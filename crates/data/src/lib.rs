//! From text to token shards to batches. Every batch is a pure function of (dataset, seed, step).
//!
//! 1. [`source`]: files, folders, globs and hub datasets become documents of text.
//! 2. [`tokenizer`]: a `tokenizer.json`, loaded or trained here, turns text into ids.
//! 3. [`build()`]: documents become shards, on all cores, restartable at any instant; [`manifest`] says what is there.
//! 4. [`dataset`]: shards mapped into memory give windows of N + 1 tokens.
//! 5. [`sampler`]: [`prp`] shuffles without state, [`mixture`] weighs the sources; a row is found by its number alone.
//! 6. [`loader`]: a thread reads ahead.
//!
//! The crate knows nothing of devices, tensors or ranks.

pub mod build;
pub mod dataset;
mod durable;
mod error;
mod guard;
pub mod loader;
pub mod manifest;
pub mod mixture;
pub mod prp;
pub mod sampler;
mod shard;
pub mod source;
pub mod tokenizer;

pub use build::{BuildConfig, Progress, build};
pub use dataset::{Dataset, IGNORE, Row, SequentialRows, verify};
pub use error::DataError;
pub use loader::{Batch, Loader};
pub use manifest::{Manifest, Split, TokenType};
pub use sampler::Sampler;
pub use source::hub::{HubModel, ModelFiles, fetch_model, offline_by_environment};
pub use source::{BadRecords, DocumentUnit, SourceSpec};
pub use tokenizer::{StreamDecoder, Tokenizer, TokenizerTraining, train_tokenizer};
