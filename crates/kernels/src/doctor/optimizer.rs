//! The update, from gradients of either precision.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::compare::{Comparison, rate_of};
use crate::dtype::cast;
use crate::ops::adamw::{AdamW, Moments, adamw_step, square_sum};
use crate::ops::flat::Part;
use crate::profile::record;
use crate::testing::{normal, relative_error, values};

/// Elements: no multiple of what a thread or a vector takes.
const COUNT: usize = 100_003;

/// How the elements of a gradient lie.
#[derive(Clone, Copy)]
enum Form {
    /// f32, and zeros between two parts, as a parameter without a gradient leaves them.
    Wide,
    /// bf16 as one product leaves several parameters, zeros, f32, and bf16 to an odd end.
    Mixed,
    /// bf16, then f32 from an odd element on.
    Odd,
}

impl Form {
    /// The gradient, times `factor`.
    fn parts(self, device: &Device, factor: f32) -> Vec<Part> {
        let drawn = |count: usize, seed, dtype| -> Tensor<1> {
            normal([count], 1.0, seed, device, dtype) * factor
        };
        let part = |count, seed, dtype| Part::Values(drawn(count, seed, dtype));
        match self {
            Self::Wide => vec![
                part(40_000, 4, DType::F32),
                Part::Zeros(20_000),
                part(COUNT - 60_000, 5, DType::F32),
            ],
            Self::Mixed => {
                // Cut where a GPU's slices are views, so that the parts are neighbours in memory.
                let (cut, both) = (160 << 8, 240 << 8);
                let product = drawn(both, 4, DType::BF16);
                vec![
                    Part::Values(product.clone().narrow(0, 0, cut)),
                    Part::Values(product.narrow(0, cut, both - cut)),
                    Part::Zeros(70_000 - both),
                    part(20_000, 5, DType::F32),
                    part(COUNT - 90_000, 6, DType::BF16),
                ]
            }
            Self::Odd => vec![
                part(37_001, 4, DType::BF16),
                part(COUNT - 37_001, 5, DType::F32),
            ],
        }
    }
}

/// Weights, moments, Σ g², and by how much the copy differs from the weights rounded once.
fn results(device: &Device, form: Form, poisoned: bool) -> [Tensor<1>; 5] {
    let t = |seed| -> Tensor<1> { normal([COUNT], 1.0, seed, device, DType::F32) };
    let scalar = |x: f32| Tensor::from_data(TensorData::new(vec![x], [1]), (device, DType::F32));
    let hyper = AdamW {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let moments = Moments {
        first: t(2),
        second: t(3).square(),
    };
    let sum = square_sum(&form.parts(device, 1.0));
    let (factor, keep) = match poisoned {
        true => (f32::NAN, 0.0),
        false => (1.0, 1.0),
    };
    let (w, m, copy) = adamw_step(
        t(1),
        moments,
        form.parts(device, factor),
        5..70_001,
        1e-2,
        7,
        scalar(0.5),
        scalar(keep),
        &hyper,
        true,
    );
    let rounded = cast(copy.expect("asked for"), DType::F32);
    let exact = cast(cast(w.clone(), DType::BF16), DType::F32);
    [w, m.first, m.second, sum, rounded - exact]
}

/// AdamW in f32 on both sides from the same gradient, a skipped step with NaN, and the sum of squares.
pub fn all(device: &Device) -> Vec<Comparison> {
    let mut all = vec![];
    for (name, form, poisoned) in [
        ("AdamW", Form::Wide, false),
        ("AdamW, skipped", Form::Wide, true),
        ("AdamW, bf16 and f32", Form::Mixed, false),
        ("AdamW, bf16 and f32, skipped", Form::Mixed, true),
        ("AdamW, odd parts", Form::Odd, false),
    ] {
        let ours = results(device, form, poisoned);
        let reference = results(&Device::flex(), form, poisoned);
        let copy = values(&ours[4]).iter().all(|difference| *difference == 0.0);
        all.push(Comparison {
            name: format!("{name}: bf16 copy"),
            error: if copy { 0.0 } else { f64::INFINITY },
            bound: 0.0,
            rate: None,
        });
        let rate = match record(device, || results(device, form, poisoned)) {
            Some(Ok((_, timed))) => rate_of(&timed),
            _ => None,
        };
        for (part, (a, b)) in ["weights", "mean", "square", "Σ g²"]
            .iter()
            .zip(ours.iter().zip(&reference))
        {
            all.push(Comparison {
                name: format!("{name}: {part}"),
                error: relative_error(a, b),
                // A few f32 roundings, since both begin with the same gradient; a sum of 10⁵ terms in
                // another order.
                bound: 1e-5,
                rate,
            });
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_has_all_elements_and_agrees_with_itself() {
        let host = Device::flex();
        for form in [Form::Wide, Form::Mixed, Form::Odd] {
            let parts = form.parts(&host, 1.0);
            assert_eq!(parts.iter().map(Part::len).sum::<usize>(), COUNT);
        }
        for comparison in all(&host) {
            assert!(comparison.passed(), "{comparison}");
        }
    }
}
