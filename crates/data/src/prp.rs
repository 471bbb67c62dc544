//! A stateless permutation of `0..size`: the shuffle that needs no memory and no history.
//!
//! A balanced Feistel network of eight rounds permutes the next even power of two; values that fall outside
//! `0..size` are fed in again (cycle walking) until they fall inside. The domain is less than four times `size`,
//! so a value takes under four rounds of walking on average.

/// A pseudo-random permutation of `0..size`, chosen by a 256-bit key.
#[derive(Clone, Debug)]
pub struct Permutation {
    size: u64,
    half_bits: u32,
    keys: [u64; Self::ROUNDS],
}

impl Permutation {
    const ROUNDS: usize = 8;

    /// The permutation of `0..size` that `key` selects.
    pub fn new(size: u64, key: &[u8; 32]) -> Self {
        let bits = u64::BITS - size.saturating_sub(1).leading_zeros();
        let mut reader = blake3::Hasher::new_keyed(key).finalize_xof();
        let mut keys = [0; Self::ROUNDS];
        for round_key in &mut keys {
            let mut bytes = [0; 8];
            reader.fill(&mut bytes);
            *round_key = u64::from_le_bytes(bytes);
        }
        Self {
            size,
            half_bits: bits.div_ceil(2).max(1),
            keys,
        }
    }

    /// Number of elements.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where `index` goes; `None` when `index` is not in `0..size`.
    pub fn apply(&self, index: u64) -> Option<u64> {
        if index >= self.size {
            return None;
        }
        let mut value = index;
        loop {
            value = self.feistel(value);
            if value < self.size {
                return Some(value);
            }
        }
    }

    fn feistel(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1; // half_bits <= 32
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
