//! Training rows by number: `row(index)` is a pure function of the dataset, the seed and the index.
//!
//! 1. The mixture turns the index into a source and the row's ordinal `k` among that source's rows.
//! 2. A source of W windows is in epoch `k / W`, at place `k % W`.
//! 3. A permutation keyed by (seed, source name, epoch) turns the place into a window: every epoch reads every window
//!    once, in another order.
//!
//! So the cursor of a run is its step alone, and a batch is the same on any number of ranks.

use std::ops::Range;
use std::sync::Arc;

use crate::dataset::{Dataset, Row, check_sequence_length};
use crate::manifest::Split;
use crate::mixture::Mixture;
use crate::prp::Permutation;
use crate::{DataError, Manifest};

/// Random access to the rows of a training run.
#[derive(Clone, Debug)]
pub struct Sampler {
    dataset: Arc<Dataset>,
    sequence_length: usize,
    rows_per_step: usize,
    mixture: Mixture,
    /// Per source: number of windows, and the key that its epochs' permutations derive from.
    sources: Vec<(u64, [u8; 32])>,
    fingerprint: String,
}

impl Sampler {
    /// Rows of `sequence_length` tokens; a step takes `rows_per_step` of them (over all ranks and micro-batches).
    ///
    /// Refuses a dataset in which a source has less than one row.
    pub fn new(
        dataset: Arc<Dataset>,
        sequence_length: usize,
        rows_per_step: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        check_sequence_length(sequence_length)?;
        if rows_per_step == 0 {
            return Err(DataError::setting(
                "rows_per_step",
                "a step needs at least one row",
            ));
        }
        let infos = &dataset.manifest().sources;
        let weights: Vec<f64> = infos.iter().map(|source| source.weight).collect();
        let mixture = Mixture::new(&weights, seed).map_err(|index| {
            DataError::setting(
                format!("sources.{}.weight", infos[index].name),
                format!(
                    "{} is not a positive number of at least a millionth of the weights' sum",
                    infos[index].weight
                ),
            )
        })?;
        let mut sources = Vec::with_capacity(infos.len());
        for (index, info) in infos.iter().enumerate() {
            let windows = dataset.source_windows(index, sequence_length);
            if windows == 0 {
                let tokens = info.split(dataset.split()).tokens;
                return Err(dataset.too_few(
                    &format!("source `{}`", info.name),
                    tokens,
                    sequence_length,
                ));
            }
            let mut key = blake3::Hasher::new_derive_key("ttt-data 1 source order");
            key.update(&seed.to_le_bytes()).update(info.name.as_bytes());
            sources.push((windows, *key.finalize().as_bytes()));
        }
        let fingerprint = fingerprint(
            dataset.manifest(),
            dataset.split(),
            sequence_length,
            rows_per_step,
            seed,
        );
        Ok(Self {
            dataset,
            sequence_length,
            rows_per_step,
            mixture,
            sources,
            fingerprint,
        })
    }

    /// The dataset that the rows come from.
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// Tokens of a row.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// Rows of a step.
    pub fn rows_per_step(&self) -> usize {
        self.rows_per_step
    }

    /// Source and window of global row `index` (row `i` of step `s` is `s * rows_per_step + i`).
    pub fn locate(&self, index: u64) -> (usize, u64) {
        let draw = self.mixture.draw(index);
        let (windows, key) = &self.sources[draw.source];
        let (epoch, place) = (draw.ordinal / windows, draw.ordinal % windows);
        let epoch_key = blake3::keyed_hash(key, &epoch.to_le_bytes());
        // `place < windows` by construction, so the permutation always answers.
        let window = Permutation::new(*windows, epoch_key.as_bytes())
            .apply(place)
            .unwrap_or(place);
        (draw.source, window)
    }

    /// Global row `index`.
    pub fn row(&self, index: u64) -> Result<Row, DataError> {
        let (source, window) = self.locate(index);
        self.dataset.window(source, window, self.sequence_length)
    }

    /// Rows `rows` of step `step`: a rank asks for its part of `0..rows_per_step`.
    pub fn batch(&self, step: u64, rows: Range<usize>) -> Result<Vec<Row>, DataError> {
        self.check_rows(&rows)?;
        let first = u64::try_from(self.rows_per_step)
            .ok()
            .and_then(|rows_per_step| step.checked_mul(rows_per_step))
            .and_then(|first| first.checked_add(self.rows_per_step as u64).map(|_| first))
            .ok_or(DataError::RowOutOfRange {
                index: step,
                count: u64::MAX / self.rows_per_step as u64,
            })?;
        rows.map(|row| self.row(first + row as u64)).collect()
    }

    /// How often source `source` has been read through, as a fraction, after `steps` steps.
    pub fn epochs(&self, source: usize, steps: u64) -> f64 {
        let (Some((windows, _)), Some(quota)) =
            (self.sources.get(source), self.mixture.quotas().get(source))
        else {
            return 0.0;
        };
        let rows = steps as f64 * self.rows_per_step as f64;
        rows * (*quota as f64 / self.mixture.block() as f64) / *windows as f64
    }

    /// Hash over the data's content, the weights, the seed, sequence_length and rows_per_step: two samplers with one
    /// fingerprint give the same rows. Checkpoints store it, so that a resumed run cannot read other data unnoticed.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    pub(crate) fn check_rows(&self, rows: &Range<usize>) -> Result<(), DataError> {
        if rows.start <= rows.end && rows.end <= self.rows_per_step {
            return Ok(());
        }
        Err(DataError::RowOutOfRange {
            index: rows.end as u64,
            count: self.rows_per_step as u64,
        })
    }
}

/// Covers what decides the rows and nothing else: where the inputs lay when the dataset was built does not matter.
fn fingerprint(
    manifest: &Manifest,
    split: Split,
    sequence_length: usize,
    rows_per_step: usize,
    seed: u64,
) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("ttt-data 1 sampler");
    let mut put = |bytes: &[u8]| {
        hasher
            .update(&(bytes.len() as u64).to_le_bytes())
            .update(bytes);
    };
    put(split.name().as_bytes());
    for number in [sequence_length as u64, rows_per_step as u64, seed] {
        put(&number.to_le_bytes());
    }
    put(manifest.tokenizer_hash.as_bytes());
    for source in &manifest.sources {
        put(source.name.as_bytes());
        put(&source.weight.to_bits().to_le_bytes());
        for shard in &source.split(split).shards {
            put(shard.blake3.as_bytes());
        }
        put(b"end of source");
    }
    hasher.finalize().to_hex().to_string()
}
