//! The update, from gradients of either precision, and such gradients in one buffer.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::compare::{Comparison, rate_of};
use crate::ops::adamw::{AdamW, Moments, adamw_step, square_sum};
use crate::ops::flat::{Part, accumulate};
use crate::ops::master::Master;
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

/// A step: the gradient, how many weights are f32 and not in halves, and whether a NaN in the gradient lets
/// it be skipped.
#[derive(Clone, Copy)]
struct Case {
    form: Form,
    wide: usize,
    poisoned: bool,
}

/// Weights, moments and Σ g².
fn results(device: &Device, case: Case) -> [Tensor<1>; 4] {
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
    let Case { form, wide, .. } = case;
    let sum = square_sum(&form.parts(device, 1.0));
    let (factor, keep) = match case.poisoned {
        true => (f32::NAN, 0.0),
        false => (1.0, 1.0),
    };
    let (w, m) = adamw_step(
        Master::new(start(), wide, device),
        moments,
        form.parts(device, factor),
        5..70_001,
        1e-2,
        7,
        scalar(0.5),
        scalar(keep),
        &hyper,
    );
    [w.to_f32(), m.first, m.second, sum]
}

/// The weights before the step.
fn start() -> Vec<f32> {
    let drawn: Tensor<1> = normal([COUNT], 1.0, 1, &Device::flex(), DType::F32);
    values(&drawn).iter().map(|w| *w as f32).collect()
}

/// AdamW in f32 on both sides from the same gradient, a skipped step with NaN, and the sum of squares.
/// Weights in halves must be those in f32, bit for bit.
pub fn all(device: &Device) -> Vec<Comparison> {
    let mut all = vec![];
    // In halves from a multiple of what a vector takes on, from another element, and from the first.
    let (even, odd) = (40_000, 36_999);
    for (name, form, wide, poisoned) in [
        ("AdamW", Form::Wide, COUNT, false),
        ("AdamW, skipped", Form::Wide, COUNT, true),
        ("AdamW, bf16 and f32", Form::Mixed, COUNT, false),
        ("AdamW, bf16 and f32, skipped", Form::Mixed, COUNT, true),
        ("AdamW, odd parts", Form::Odd, COUNT, false),
        ("AdamW in halves", Form::Mixed, 0, false),
        ("AdamW in halves, skipped", Form::Mixed, 0, true),
        ("AdamW, f32 and halves", Form::Mixed, even, false),
        ("AdamW, f32 and halves, skipped", Form::Wide, even, true),
        ("AdamW, f32 to an odd end", Form::Mixed, odd, false),
        ("AdamW, f32 to an odd end, odd parts", Form::Odd, odd, false),
        ("AdamW, f32 to an odd end, skipped", Form::Odd, odd, true),
    ] {
        let case = Case {
            form,
            wide,
            poisoned,
        };
        let ours = results(device, case);
        let reference = results(&Device::flex(), case);
        let rate = match record(device, || results(device, case)) {
            Some(Ok((_, profile))) => rate_of(&profile.operations),
            _ => None,
        };
        let parts = ["weights", "mean", "square", "Σ g²"];
        for (part, (a, b)) in parts.iter().zip(ours.iter().zip(&reference)) {
            all.push(Comparison {
                name: format!("{name}: {part}"),
                error: relative_error(a, b),
                // A few f32 roundings, since both begin with the same gradient; a sum of 10⁵ terms in
                // another order.
                bound: 1e-5,
                rate,
            });
        }
        if wide < COUNT {
            let whole = results(
                device,
                Case {
                    wide: COUNT,
                    ..case
                },
            );
            let same = |(a, b): (&Tensor<1>, &Tensor<1>)| bits(a) == bits(b);
            all.push(equal(
                format!("{name}: as all in f32"),
                ours[..3].iter().zip(&whole).all(same),
            ));
        }
        if poisoned {
            let before: Vec<u64> = start().iter().map(|w| f64::from(*w).to_bits()).collect();
            all.push(equal(
                format!("{name}: as before"),
                bits(&ours[0]) == before,
            ));
        }
    }
    for (name, form) in [
        ("f32", Form::Wide),
        ("bf16 and f32", Form::Mixed),
        ("odd parts", Form::Odd),
    ] {
        let [reference, ours] = [&Device::flex(), device].map(|device| {
            let once = accumulate(None, form.parts(device, 1.0));
            let twice = accumulate(Some(once.clone()), form.parts(device, 3.0));
            [once, twice].map(|sum| bits(&sum))
        });
        // One addition of the same numbers.
        all.push(equal(
            format!("gradients end to end and added up, {name}"),
            ours == reference,
        ));
    }
    // As parameters with learning rates of their own are cut, in places where slices are no views.
    let held = Master::new(start(), odd, device);
    let cuts = [0..777, 777..odd + 1, odd + 1..COUNT];
    let again = Master::cat(cuts.map(|range| held.slice(range)).to_vec());
    let same = again.wide_len() == odd && again.read(0..COUNT) == Ok(start());
    all.push(equal("weights in halves, cut and joined".into(), same));
    all
}

fn bits(tensor: &Tensor<1>) -> Vec<u64> {
    values(tensor).into_iter().map(f64::to_bits).collect()
}

/// What must be the same to the last bit.
fn equal(name: String, holds: bool) -> Comparison {
    Comparison {
        name,
        error: if holds { 0.0 } else { f64::INFINITY },
        bound: 0.0,
        rate: None,
    }
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
