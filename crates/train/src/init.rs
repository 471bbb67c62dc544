//! Initial values: a function of the run's seed and the parameter's name alone, so that they do not
//! depend on the number of ranks, their order or the device.

use std::ops::Range;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;
use ttt_model::{Init, ParamSpec};

/// Elements that are drawn one after the other. Blocks have seeds of their own, so that any core, and any
/// rank, draws any of them.
const BLOCK: usize = 1 << 16;

/// The initial values of `spec`, row-major.
pub fn initial_values(spec: &ParamSpec, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; spec.len()];
    draw(spec, seed, 0..spec.len(), &mut values);
    values
}

/// Elements `range` of [`initial_values`] into `values`, of the same length, on all of the machine's cores.
pub fn draw(spec: &ParamSpec, seed: u64, range: Range<usize>, values: &mut [f32]) {
    match spec.init {
        Init::Ones => values.fill(1.0),
        Init::Zeros => values.fill(0.0),
        Init::Normal(std) => normals(&spec.name, seed, std, range, values),
        Init::Diagonal(std) => {
            let width = spec.shape[0];
            let mut diagonal = vec![0.0; width];
            normals(&spec.name, seed, std, 0..width, &mut diagonal);
            values.fill(0.0);
            for (i, value) in diagonal.into_iter().enumerate() {
                let at = i * width + i;
                if range.contains(&at) {
                    values[at - range.start] = value;
                }
            }
        }
    }
}

/// Elements `range` of endless normal numbers, block by block.
fn normals(name: &str, seed: u64, std: f64, range: Range<usize>, values: &mut [f32]) {
    let normal = Normal::new(0.0, std).expect("standard deviations are checked with the config");
    let one = |block: usize, values: &mut [f32]| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(block as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        let generator = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
        let skipped = range.start.saturating_sub(block * BLOCK);
        let drawn = normal.sample_iter(generator).skip(skipped);
        for (value, drawn) in values.iter_mut().zip(drawn) {
            *value = drawn as f32;
        }
    };
    // What each block of the range fills.
    let mut parts = vec![];
    let (mut at, mut rest) = (range.start, values);
    while !rest.is_empty() {
        let block = at / BLOCK;
        let (part, behind) = rest.split_at_mut(((block + 1) * BLOCK - at).min(rest.len()));
        at += part.len();
        rest = behind;
        parts.push((block, part));
    }
    let parts = parts.into_par_iter();
    parts.for_each(|(block, part)| one(block, part));
}

#[cfg(test)]
mod tests {
    use super::*;
    use ttt_model::ParamGroup;

    fn spec(name: &str, init: Init) -> ParamSpec {
        ParamSpec {
            name: name.into(),
            shape: vec![64, 64],
            init,
            group: ParamGroup::Mlp,
            master_precision: false,
        }
    }

    #[test]
    fn values_depend_on_name_and_seed_only() {
        let a = initial_values(&spec("a", Init::Normal(0.02)), 1);
        assert_eq!(a, initial_values(&spec("a", Init::Normal(0.02)), 1));
        assert_ne!(a, initial_values(&spec("b", Init::Normal(0.02)), 1));
        assert_ne!(a, initial_values(&spec("a", Init::Normal(0.02)), 2));
        let variance = a.iter().map(|v| f64::from(v * v)).sum::<f64>() / a.len() as f64;
        // 4096 draws: the sample deviation lies within 5 of its own standard errors (1.1 % each).
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.055);
    }

    /// Ranks draw their parts alone; parts begin and end inside of blocks.
    #[test]
    fn a_part_is_that_of_the_whole() {
        for init in [Init::Normal(0.02), Init::Diagonal(0.02), Init::Ones] {
            let mut spec = spec("p", init);
            spec.shape = vec![520, 520];
            let whole = initial_values(&spec, 3);
            for range in [0..7, 60_000..70_000, 65_535..65_537, 131_072..270_400] {
                let mut part = vec![-1.0; range.len()];
                draw(&spec, 3, range.clone(), &mut part);
                assert_eq!(part, whole[range]);
            }
        }
    }

    #[test]
    fn blocks_differ() {
        let mut spec = spec("p", Init::Normal(0.02));
        spec.shape = vec![2, BLOCK];
        let values = initial_values(&spec, 3);
        assert_ne!(values[..BLOCK], values[BLOCK..]);
    }

    #[test]
    fn diagonal_matrices_are_zero_elsewhere() {
        let values = initial_values(&spec("p", Init::Diagonal(0.02)), 1);
        for (i, value) in values.iter().enumerate() {
            assert_eq!(*value != 0.0, i % 65 == 0, "element {i}");
        }
    }
}
