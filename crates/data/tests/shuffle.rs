//! The stateless shuffle and the mixture, for any size and weights.

use proptest::prelude::*;
use ttt_data::mixture::Mixture;
use ttt_data::prp::Permutation;

proptest! {
    #[test]
    fn a_permutation_hits_every_element_once(size in 1u64..3000, key in any::<[u8; 32]>()) {
        let permutation = Permutation::new(size, &key);
        let mut hit = vec![false; size as usize];
        for index in 0..size {
            let image = permutation.apply(index).unwrap();
            prop_assert!(image < size);
            prop_assert!(!std::mem::replace(&mut hit[image as usize], true), "{image} hit twice");
        }
        prop_assert_eq!(permutation.apply(size), None);
    }

    #[test]
    fn a_permutation_stays_inside_any_size(size in 1u64.., index in any::<u64>(), key in any::<[u8; 32]>()) {
        match Permutation::new(size, &key).apply(index) {
            Some(image) => prop_assert!(index < size && image < size),
            None => prop_assert!(index >= size),
        }
    }

    #[test]
    fn every_block_has_the_sources_shares(
        weights in prop::collection::vec(1e-3f64..1e3, 1..12),
        seed in any::<u64>(),
        block in 0u64..1 << 40,
    ) {
        let mixture = Mixture::new(&weights, seed).unwrap();
        let size = mixture.block();
        prop_assert_eq!(mixture.quotas().iter().sum::<u64>(), size);
        let total: f64 = weights.iter().sum();
        for (weight, &quota) in weights.iter().zip(mixture.quotas()) {
            // Largest remainder: never off by one row or more, and within 1 % where the largest block allows it.
            let ideal = weight / total * size as f64;
            prop_assert!((quota as f64 - ideal).abs() < 1.0, "{} of {}", quota, ideal);
            prop_assert!(size == 1 << 20 || (quota as f64 - ideal).abs() <= 0.01 * ideal + 1e-9);
        }
        if size <= 1 << 13 {
            // All ordinals of this block, once each.
            let mut ordinals = vec![Vec::new(); weights.len()];
            for row in block * size..(block + 1) * size {
                let draw = mixture.draw(row);
                ordinals[draw.source].push(draw.ordinal);
            }
            for (mut ordinals, &quota) in ordinals.into_iter().zip(mixture.quotas()) {
                ordinals.sort_unstable();
                prop_assert!(ordinals.into_iter().eq(block * quota..(block + 1) * quota));
            }
        }
    }
}

#[test]
fn a_permutation_shuffles() {
    // The mean distance between neighbours' images is a third of the size for a uniform shuffle; for the identity it
    // would be 1.
    let size = 10_000u64;
    let permutation = Permutation::new(size, &[7; 32]);
    let images: Vec<_> = (0..size)
        .map(|index| permutation.apply(index).unwrap())
        .collect();
    let distance = images
        .windows(2)
        .map(|pair| pair[0].abs_diff(pair[1]) as f64)
        .sum::<f64>()
        / size as f64;
    // Standard deviation of the mean is about 0.24 * size / sqrt(size) = 24.
    assert!((distance - size as f64 / 3.0).abs() < 150.0, "{distance}");
    let other = Permutation::new(size, &[8; 32]);
    let same = (0..size)
        .filter(|&index| other.apply(index) == Some(images[index as usize]))
        .count();
    assert!(same < 10, "{same} fixed between two keys"); // one is expected
}

#[test]
fn weights_that_cannot_be_drawn_are_refused() {
    for (weights, bad) in [
        (vec![1.0, 0.0], 1),
        (vec![-1.0, 2.0], 0),
        (vec![1.0, f64::NAN], 1),
        (vec![1.0, f64::INFINITY], 1),
        (vec![1.0, 1e-9], 1),
        (vec![f64::MAX, f64::MAX], 0),
    ] {
        assert_eq!(Mixture::new(&weights, 0).unwrap_err(), bad, "{weights:?}");
    }
    assert!(Mixture::new(&[1.0, 1e-5], 0).is_ok());
}
