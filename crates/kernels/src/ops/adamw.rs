//! AdamW over flat buffers, and the sum of squares that its clipping needs.
//!
//! n: elements of a buffer.

use std::ops::Range;

use burn::tensor::{Bool, Tensor};

use super::flat::{Part, joined};
use super::master::Master;

/// What stays the same over a run (Loshchilov and Hutter, "Decoupled weight decay regularization").
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// Share of a decaying weight that lr = 1 would take away.
    pub weight_decay: f64,
}

/// Running means of the gradient and of its square: `[n]` f32 each.
#[derive(Clone, Debug)]
pub struct Moments {
    /// E\[g\]
    pub first: Tensor<1>,
    /// E\[g²\]
    pub second: Tensor<1>,
}

/// One step: master `[n]`, grad, n elements end to end, f32 or bf16 → the new master, held as it was, and
/// moments.
///
/// With g = `scale` · grad and t = `step` (from 1):
/// m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g²,
/// w ← w (1 − lr λ on `decayed`) − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + eps).
///
/// `scale` and `keep` are `[1]` f32 on the device, so that clipping and skipping need no answer from
/// it. Where `keep` is 0 nothing changes, whatever the gradient holds (NaN included).
///
/// Where nothing else refers to the given tensors, they are written in place. The reference form goes
/// through the host where weights are in halves.
///
/// # Panics
/// If `step` is 0 or `decayed` reaches past n.
#[allow(clippy::too_many_arguments)] // the operands of one formula
pub fn adamw_step(
    master: Master,
    moments: Moments,
    grad: Vec<Part>,
    decayed: Range<usize>,
    lr: f64,
    step: u64,
    scale: Tensor<1>,
    keep: Tensor<1>,
    hyper: &AdamW,
) -> (Master, Moments) {
    assert!(step > 0, "steps count from 1");
    assert!(
        decayed.end <= master.len() || decayed.is_empty(),
        "decaying elements {decayed:?} of {}",
        master.len()
    );
    #[cfg(feature = "cuda")]
    let (master, moments) = match crate::cuda::adamw::step(
        master, moments, &grad, &decayed, lr, step, &scale, &keep, hyper,
    ) {
        Ok(done) => return done,
        Err(elsewhere) => elsewhere,
    };
    let held = master;
    let master = held.to_f32();
    let grad = joined(grad);
    let AdamW {
        beta1,
        beta2,
        eps,
        weight_decay,
    } = *hyper;
    let shape = master.dims();
    // A select, not a product: 0 · NaN is NaN.
    let skipped: Tensor<1, Bool> = keep.equal_scalar(0.0).expand(shape);
    let or_old = |new: Tensor<1>, old: Tensor<1>| new.mask_where(skipped.clone(), old);

    let g = grad * scale.expand(shape);
    let first = moments.first.clone() * beta1 + g.clone() * (1.0 - beta1);
    let second = moments.second.clone() * beta2 + g.square() * (1.0 - beta2);
    let root = (second.clone() / (1.0 - power(beta2, step))).sqrt() + eps;
    let update = first.clone() / (1.0 - power(beta1, step)) / root;
    let mut shrunk = master.clone();
    if !decayed.is_empty() && weight_decay != 0.0 {
        let part = shrunk.clone().slice([decayed.clone()]) * (1.0 - lr * weight_decay);
        shrunk = shrunk.slice_assign([decayed], part);
    }
    let stepped = shrunk - update * lr;
    let moments = Moments {
        first: or_old(first, moments.first),
        second: or_old(second, moments.second),
    };
    (held.like(or_old(stepped, master)), moments)
}

/// Σ grad²: n elements end to end → `[1]` f32. Infinite or NaN if the gradient holds either.
pub fn square_sum(grad: &[Part]) -> Tensor<1> {
    #[cfg(feature = "cuda")]
    if let Some(sum) = crate::cuda::adamw::square_sum(grad) {
        return sum;
    }
    joined(grad.to_vec()).square().sum()
}

/// βᵗ for any t that fits the counter.
fn power(beta: f64, step: u64) -> f64 {
    beta.powf(step as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::cast;
    use crate::testing::{normal, relative_error_of, values};
    use burn::tensor::{DType, Device, TensorData};

    const HYPER: AdamW = AdamW {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };

    fn scalar(value: f32) -> Tensor<1> {
        Tensor::from_data(TensorData::new(vec![value], [1]), &Device::flex())
    }

    fn random(seed: u64) -> Tensor<1> {
        normal([37], 1.0, seed, &Device::flex(), DType::F32)
    }

    /// Weights of which the first `wide` are f32 and the others in halves.
    fn held(wide: usize) -> Master {
        let values = values(&random(1)).iter().map(|w| *w as f32).collect();
        Master::new(values, wide, &Device::flex())
    }

    fn start() -> (Master, Moments) {
        let zeros = || random(0).zeros_like();
        let moments = Moments {
            first: zeros(),
            second: zeros(),
        };
        (held(37), moments)
    }

    /// All bits of weights and moments.
    fn bits((master, moments): &(Master, Moments)) -> [Vec<u64>; 3] {
        [&master.to_f32(), &moments.first, &moments.second]
            .map(|t| values(t).into_iter().map(f64::to_bits).collect())
    }

    /// The textbook loop in f64, element by element.
    #[test]
    fn agrees_with_the_scalar_formula() {
        let (mut master, mut moments) = start();
        let mut w = values(&master.to_f32());
        let (mut m, mut v) = (vec![0.0; w.len()], vec![0.0; w.len()]);
        for step in 1..=5 {
            let grad = random(10 + step);
            let lr = 1e-2 / step as f64;
            for (i, g) in values(&grad).into_iter().enumerate() {
                let g = 0.5 * g;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                if (4..20).contains(&i) {
                    w[i] -= lr * 0.1 * w[i];
                }
                let (mean, square) = (
                    m[i] / (1.0 - 0.9f64.powi(step as i32)),
                    v[i] / (1.0 - 0.95f64.powi(step as i32)),
                );
                w[i] -= lr * mean / (square.sqrt() + 1e-8);
            }
            (master, moments) = adamw_step(
                master,
                moments,
                vec![Part::Values(grad)],
                4..20,
                lr,
                step,
                scalar(0.5),
                scalar(1.0),
                &HYPER,
            );
        }
        // Five steps of f32 arithmetic: a few units of 2⁻²⁴ each.
        assert!(relative_error_of(&values(&master.to_f32()), &w) < 1e-6);
        assert!(relative_error_of(&values(&moments.first), &m) < 1e-6);
        assert!(relative_error_of(&values(&moments.second), &v) < 1e-6);
    }

    #[test]
    fn a_skipped_step_leaves_everything_even_with_nan() {
        let moments = Moments {
            first: random(3),
            second: random(4).square(),
        };
        for wide in [0, 6, 37] {
            let stepped = |grad: Tensor<1>, keep: f32| {
                adamw_step(
                    held(wide),
                    moments.clone(),
                    vec![Part::Values(grad)],
                    0..37,
                    1e-2,
                    3,
                    scalar(keep),
                    scalar(keep),
                    &HYPER,
                )
            };
            let before = bits(&(held(wide), moments.clone()));
            assert_eq!(before, bits(&stepped(random(2) * f32::NAN, 0.0)));
            // Control: the same step with a sound gradient and keep = 1 moves the weights.
            assert_ne!(before[0], bits(&stepped(random(2), 1.0))[0]);
        }
    }

    /// Weights in halves, all or from some element on, are those in f32, bit for bit.
    #[test]
    fn how_weights_are_held_changes_nothing() {
        let course = |wide: usize| {
            let mut state = (held(wide), start().1);
            for step in 1..=5 {
                state = adamw_step(
                    state.0,
                    state.1,
                    vec![Part::Values(random(10 + step))],
                    4..20,
                    1e-2,
                    step,
                    scalar(0.5),
                    scalar(1.0),
                    &HYPER,
                );
            }
            assert_eq!(state.0.wide_len(), wide);
            bits(&state)
        };
        let whole = course(37);
        for wide in [0, 6, 8, 36] {
            assert_eq!(course(wide), whole, "{wide} in f32");
        }
    }

    /// Parts in bf16, beside others and up to odd ends, are what their values in f32 would be.
    #[test]
    fn parts_of_either_precision_count_alike() {
        let narrow: Tensor<1> = normal([21], 1.0, 6, &Device::flex(), DType::BF16);
        let wide: Tensor<1> = normal([11], 1.0, 7, &Device::flex(), DType::F32);
        let grad = |first: &Tensor<1>| {
            let values = |part: &Tensor<1>| Part::Values(part.clone());
            vec![values(first), Part::Zeros(5), values(&wide)]
        };
        let stepped = |grad: Vec<Part>| {
            let sum = square_sum(&grad);
            let (master, moments) = start();
            let (one, keep) = (scalar(0.5), scalar(1.0));
            let (w, m) = adamw_step(master, moments, grad, 0..20, 1e-2, 1, one, keep, &HYPER);
            [w.to_f32(), m.first, m.second, sum].map(|t| values(&t))
        };
        let mixed = stepped(grad(&narrow));
        assert_eq!(mixed, stepped(grad(&cast(narrow.clone(), DType::F32))));
        // Control: other bf16 values are seen in the weights, the moments and the sum.
        let other = narrow.clone() + 1.0;
        let other = stepped(grad(&other));
        for (mixed, other) in mixed.iter().zip(&other) {
            assert_ne!(mixed, other);
        }
    }

    #[test]
    fn square_sum_is_a_sum_of_squares_and_shows_nan() {
        let grad = random(5);
        let expected: f64 = values(&grad).iter().map(|g| g * g).sum();
        let sum = values(&square_sum(&[Part::Values(grad.clone())]))[0];
        assert!((sum / expected - 1.0).abs() < 1e-5);
        assert!(values(&square_sum(&[Part::Values(grad * f32::NAN)]))[0].is_nan());
    }
}
