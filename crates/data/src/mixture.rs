//! Which source a row comes from: fixed shares in every block of rows, in permuted order.
//!
//! A block holds as many rows as it takes for every source's whole number of rows to be within 1 % of its weight.
//! Row `i` lies in block `i / block`; a permutation keyed by the block sends its place to a slot, and slots are dealt
//! to the sources in consecutive runs. Nothing is remembered from row to row.

use crate::prp::Permutation;

/// Shares of the sources in a block of rows.
#[derive(Clone, Debug)]
pub struct Mixture {
    quotas: Vec<u64>,
    block: u64,
    key: [u8; 32],
}

/// A row's source and its place in that source's own endless sequence of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Index of the source.
    pub source: usize,
    /// How many rows of this source come before, over all blocks (up to the order inside the block).
    pub ordinal: u64,
}

impl Mixture {
    const SMALLEST_BLOCK: u64 = 1 << 10;
    const LARGEST_BLOCK: u64 = 1 << 20;

    /// Shares by `weights` (positive, any scale). `Err` gives the index of a source whose weight is not a positive
    /// number or is so small beside the others that it would never be drawn.
    pub fn new(weights: &[f64], seed: u64) -> Result<Self, usize> {
        if let Some(bad) = weights.iter().position(|w| !(w.is_finite() && *w > 0.0)) {
            return Err(bad);
        }
        let total: f64 = weights.iter().sum();
        if !total.is_finite() {
            return Err(0);
        }
        let shares: Vec<f64> = weights.iter().map(|w| w / total).collect();
        let mut block = Self::SMALLEST_BLOCK;
        let quotas = loop {
            let quotas = largest_remainder(&shares, block);
            let exact = quotas.iter().zip(&shares).all(|(&quota, share)| {
                let ideal = share * block as f64;
                quota > 0 && (quota as f64 - ideal).abs() <= 0.01 * ideal
            });
            if exact || block == Self::LARGEST_BLOCK {
                break quotas;
            }
            block *= 2;
        };
        if let Some(never) = quotas.iter().position(|&quota| quota == 0) {
            return Err(never);
        }
        Ok(Self {
            quotas,
            block,
            key: blake3::derive_key("ttt-data 1 mixture", &seed.to_le_bytes()),
        })
    }

    /// Rows in a block.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Rows of each source in a block.
    pub fn quotas(&self) -> &[u64] {
        &self.quotas
    }

    /// The source of global row `index`.
    pub fn draw(&self, index: u64) -> Draw {
        let (block, place) = (index / self.block, index % self.block);
        if self.quotas.len() == 1 {
            return Draw {
                source: 0,
                ordinal: index,
            };
        }
        let key = blake3::keyed_hash(&self.key, &block.to_le_bytes());
        // `place < block` by construction, so the permutation always answers.
        let mut slot = Permutation::new(self.block, key.as_bytes())
            .apply(place)
            .unwrap_or(place);
        for (source, &quota) in self.quotas.iter().enumerate() {
            if slot < quota {
                return Draw {
                    source,
                    ordinal: block * quota + slot,
                };
            }
            slot -= quota;
        }
        unreachable!("the quotas sum to the block")
    }
}

/// Whole numbers that sum to `block` and follow `shares` (Hamilton's method; ties go to the earlier source).
fn largest_remainder(shares: &[f64], block: u64) -> Vec<u64> {
    let ideal: Vec<f64> = shares.iter().map(|share| share * block as f64).collect();
    let mut quotas: Vec<u64> = ideal.iter().map(|x| x.floor() as u64).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|&a, &b| {
        ideal[b]
            .fract()
            .total_cmp(&ideal[a].fract())
            .then(a.cmp(&b))
    });
    let missing = block.saturating_sub(quotas.iter().sum());
    for &source in order.iter().cycle().take(missing as usize) {
        quotas[source] += 1;
    }
    quotas
}
