//! Rates of single operations, at the shapes of a 500M model (hidden 1024, intermediate 3072, heads of
//! 128, vocabulary 32000, 32768 tokens).
//!
//! Data is random; a result of every row is read back, so that work that did not run cannot count.

mod elementwise;
mod products;

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};

use crate::clock::{Clock, median};
use crate::testing::values;
use crate::work::Work;

const TOKENS: usize = 32_768;
const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 3072;
const HEADS: usize = 8;
const HEAD_SIZE: usize = 128;
const VOCAB: usize = 32_000;
const WINDOW: usize = 2048;
const CHUNK: usize = 1024;

/// One measured operation.
#[derive(Clone, Debug)]
pub struct Row {
    /// The operation, as the PyTorch baseline names it where it has it.
    pub name: &'static str,
    /// Median milliseconds of the forward pass.
    pub forward_ms: Option<f64>,
    /// Of forward and backward pass.
    pub both_ms: Option<f64>,
    /// What the forward pass does at least.
    pub work: Work,
    /// What the backward pass does, relative to it.
    pub backward: f64,
}

impl Row {
    /// What forward and backward pass do together.
    pub fn both_work(&self) -> Work {
        let times = 1.0 + self.backward;
        match self.work {
            Work::Flops(flops) => Work::Flops(flops * times),
            Work::Bytes(bytes) => Work::Bytes(bytes * times),
        }
    }
}

/// A row's name, and what was measured or what went wrong.
pub type Measured = (&'static str, Result<Row, String>);

/// Something to time: its result is what says that it ran.
type Run<'a> = &'a mut dyn FnMut() -> Tensor<1>;

/// Measures every row whose name `wanted` accepts on `device`, a plain (not autodiff) one.
pub fn micro(device: &Device, wanted: impl Fn(&str) -> bool, mut report: impl FnMut(Measured)) {
    for (name, measure) in products::ROWS.iter().chain(&elementwise::ROWS) {
        if wanted(name) {
            report((name, measure(&Bench { device, name })));
        }
    }
}

/// One row being measured.
struct Bench<'a> {
    device: &'a Device,
    name: &'static str,
}

impl Bench<'_> {
    /// Median milliseconds of `run` after a warm-up, without a wait in between.
    fn time(&self, run: Run<'_>) -> Result<f64, String> {
        for _ in 0..3 {
            run();
        }
        let mut clock = Clock::new(self.device);
        clock.mark()?;
        for _ in 0..10 {
            run();
            clock.mark()?;
        }
        let times = clock.read()?;
        match values(&run()).iter().all(|x| x.is_finite()) {
            true => Ok(median(&times)),
            false => Err("the result is not finite".into()),
        }
    }

    fn row(
        &self,
        work: Work,
        backward: f64,
        forward: Option<Run<'_>>,
        both: Option<Run<'_>>,
    ) -> Result<Row, String> {
        Ok(Row {
            name: self.name,
            forward_ms: forward.map(|run| self.time(run)).transpose()?,
            both_ms: both.map(|run| self.time(run)).transpose()?,
            work,
            backward,
        })
    }

    fn random<const D: usize>(&self, shape: [usize; D], scale: f64) -> Tensor<D> {
        let normal = Distribution::Normal(0.0, scale);
        Tensor::random(shape, normal, (self.device, DType::BF16))
    }

    /// Random token ids: `[n]`.
    fn ids(&self) -> Tensor<1, Int> {
        let ids = (0..TOKENS as i64).map(|i| i * 7919 % VOCAB as i64);
        let data = TensorData::new(ids.collect::<Vec<_>>(), [TOKENS]);
        Tensor::from_data(data, self.device)
    }
}

/// `x` as a leaf whose gradient is wanted.
fn leaf<const D: usize>(x: &Tensor<D>) -> Tensor<D> {
    x.clone().autodiff().require_grad()
}

/// A few elements of `x`, which say whether it was written.
fn probe<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let count = x.dims().iter().product::<usize>();
    let flat: Tensor<1> = x.reshape([count]);
    flat.narrow(0, count.saturating_sub(8), count.min(8))
}

/// A few elements of the gradient of `x`, NaN if there is none.
fn probe_gradient<const D: usize>(x: &Tensor<D>, gradients: &burn::tensor::Gradients) -> Tensor<1> {
    match x.grad(gradients) {
        Some(gradient) => probe(gradient),
        None => probe(x.clone().inner()) * f32::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct() {
        let rows = products::ROWS.iter().chain(&elementwise::ROWS);
        let mut names: Vec<&str> = rows.map(|(name, _)| *name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn a_result_that_is_not_finite_is_no_measurement() {
        let device = Device::flex();
        let bench = Bench {
            device: &device,
            name: "x",
        };
        let x: Tensor<1> = bench.random([8], 1.0);
        assert!(bench.time(&mut || x.clone() + x.clone()).is_ok());
        let bad = bench.time(&mut || x.clone() * f32::NAN);
        assert!(bad.unwrap_err().contains("not finite"));
    }
}
