//! Initial values: a function of the run's seed and the parameter's name alone, so that they do not
//! depend on the number of ranks, their order or the device.

use std::sync::atomic::{AtomicUsize, Ordering};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Normal};
use ttt_model::{Init, ParamSpec};

/// The initial values of `spec`, row-major.
pub fn initial_values(spec: &ParamSpec, seed: u64) -> Vec<f32> {
    let count = spec.len();
    match spec.init {
        Init::Ones => vec![1.0; count],
        Init::Zeros => vec![0.0; count],
        Init::Normal(std) => normals(&spec.name, seed, std).take(count).collect(),
        Init::Diagonal(std) => {
            let width = spec.shape[0];
            let mut values = vec![0.0; count];
            for (i, value) in normals(&spec.name, seed, std).take(width).enumerate() {
                values[i * width + i] = value;
            }
            values
        }
    }
}

/// [`initial_values`] of several parameters, on all of the machine's cores.
pub fn initial_values_of(specs: &[ParamSpec], seed: u64) -> Vec<Vec<f32>> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let mut values = vec![vec![]; specs.len()];
    let made: Vec<(usize, Vec<f32>)> = std::thread::scope(|scope| {
        let work = || {
            let indices = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
            let mine = indices.map_while(|i| Some((i, initial_values(specs.get(i)?, seed))));
            mine.collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..workers.min(specs.len()))
            .map(|_| scope.spawn(work))
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("drawing numbers does not panic"))
            .collect()
    });
    for (i, made) in made {
        values[i] = made;
    }
    values
}

fn normals(name: &str, seed: u64, std: f64) -> impl Iterator<Item = f32> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    let generator = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    let normal = Normal::new(0.0, std).expect("standard deviations are checked with the config");
    normal.sample_iter(generator).map(|value: f64| value as f32)
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

    #[test]
    fn several_parameters_get_the_values_of_each() {
        let specs: Vec<ParamSpec> = (0..9)
            .map(|i| spec(&format!("p{i}"), Init::Normal(0.02)))
            .collect();
        let together = initial_values_of(&specs, 7);
        assert_eq!(together.len(), 9);
        for (spec, values) in specs.iter().zip(&together) {
            assert_eq!(*values, initial_values(spec, 7), "{}", spec.name);
        }
    }

    #[test]
    fn diagonal_matrices_are_zero_elsewhere() {
        let values = initial_values(&spec("p", Init::Diagonal(0.02)), 1);
        for (i, value) in values.iter().enumerate() {
            assert_eq!(*value != 0.0, i % 65 == 0, "element {i}");
        }
    }
}
