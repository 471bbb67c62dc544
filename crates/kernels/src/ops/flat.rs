//! Tensors laid end to end in one long f32 buffer.

use burn::tensor::{DType, Tensor};

use crate::dtype::cast;

/// A piece of a flat buffer.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // a few live at a time
pub enum Part {
    /// These values, f32 or bf16: `[n]`.
    Values(Tensor<1>),
    /// So many zeros.
    Zeros(usize),
}

impl Part {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Values(values) => values.dims()[0],
            Self::Zeros(count) => *count,
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The values of `parts` in one buffer; free where they already are.
///
/// # Panics
/// If there are no parts.
pub fn joined(mut parts: Vec<Part>) -> Tensor<1> {
    match &parts[..] {
        [Part::Values(values)] if values.dtype() == DType::F32 => match parts.pop() {
            Some(Part::Values(values)) => values,
            _ => unreachable!("matched above"),
        },
        _ => accumulate(None, parts),
    }
}

/// `parts` end to end in f32, added to `sum` `[n]` if there is one: → `[n]` f32. `sum` is used up and,
/// where nothing else refers to it, written in place.
///
/// # Panics
/// If there are no parts, or they are not as long as `sum`.
pub fn accumulate(sum: Option<Tensor<1>>, parts: Vec<Part>) -> Tensor<1> {
    let len = parts.iter().map(Part::len).sum::<usize>();
    assert!(len > 0, "something to accumulate");
    if let Some(sum) = &sum {
        assert_eq!(sum.dims(), [len], "parts as long as their sum");
    }
    #[cfg(feature = "cuda")]
    let sum = match crate::cuda::flat::accumulate(sum, &parts, len) {
        Ok(done) => return done,
        Err(elsewhere) => elsewhere,
    };
    let device = parts.iter().find_map(|part| match part {
        Part::Values(values) => Some(values.device()),
        Part::Zeros(_) => None,
    });
    let device = device.or_else(|| sum.as_ref().map(Tensor::device));
    let device = device.unwrap_or_else(burn::tensor::Device::flex);
    let parts = parts.into_iter().map(|part| match part {
        Part::Values(values) => cast(values, DType::F32),
        Part::Zeros(count) => Tensor::zeros([count], (&device, DType::F32)),
    });
    let flat = Tensor::cat(parts.collect(), 0);
    match sum {
        Some(sum) => sum + flat,
        None => flat,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, values};
    use burn::tensor::Device;

    #[test]
    fn parts_follow_each_other_and_add_up() {
        let device = Device::flex();
        let a: Tensor<1> = normal([3], 1.0, 1, &device, DType::F32);
        let b: Tensor<1> = normal([4], 1.0, 2, &device, DType::BF16);
        let parts = || {
            vec![
                Part::Values(a.clone()),
                Part::Zeros(2),
                Part::Values(b.clone()),
            ]
        };
        let once = values(&accumulate(None, parts()));
        let mut expected = values(&a);
        expected.extend([0.0; 2]);
        expected.extend(values(&cast(b.clone(), DType::F32)));
        assert_eq!(once, expected);
        let twice = values(&accumulate(Some(accumulate(None, parts())), parts()));
        let doubled: Vec<f64> = expected.iter().map(|x| 2.0 * x).collect();
        assert_eq!(twice, doubled);
    }
}
