//! One operation on two devices: values and gradients.

use std::fmt;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::dtype::cast;
use crate::ops::seed::backward_from;
use crate::profile::{Timed, record};
use crate::testing::{normal, relative_error_of, values};
use crate::work::Work;

/// An operation on flat tensors.
pub type OpFn = Box<dyn Fn(&[Tensor<1>]) -> Tensor<1>>;

/// What is compared: an operation, its inputs, how far it may be off.
pub struct Op {
    /// Shown to the user.
    pub name: String,
    /// Elements and standard deviation of each input.
    pub inputs: Vec<(usize, f64)>,
    /// Largest relative error (Frobenius) of the value and of each gradient.
    pub bound: f64,
    /// From flat inputs to a flat output.
    pub run: OpFn,
}

/// How far one result is off.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Operation and result.
    pub name: String,
    /// ‖a − b‖ / ‖b‖ against the reference b.
    pub error: f64,
    /// What is allowed.
    pub bound: f64,
    /// The rate of the CUDA operations that it took, with its unit; `None` on another device.
    pub rate: Option<Rate>,
}

/// What is done in a second, and its unit.
pub type Rate = (f64, &'static str);

/// The rate of `operations` together: of their arithmetic if they have any, else of their traffic.
pub(super) fn rate_of(operations: &[Timed]) -> Option<Rate> {
    let ms: f64 = operations.iter().map(|timed| timed.ms).sum();
    let (mut flops, mut bytes) = (0.0, 0.0);
    for work in operations.iter().filter_map(|timed| timed.work) {
        match work {
            Work::Flops(more) => flops += more,
            Work::Bytes(more) => bytes += more,
        }
    }
    match (flops, bytes) {
        (0.0, 0.0) => None,
        (0.0, bytes) => Some(Work::Bytes(bytes).rate(ms)),
        (flops, _) => Some(Work::Flops(flops).rate(ms)),
    }
}

impl Comparison {
    /// False also for NaN.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.passed() { "pass" } else { "FAIL" };
        let Self {
            name, error, bound, ..
        } = self;
        write!(
            f,
            "{verdict}  {name:<56} error {error:.1e} (at most {bound:.0e})"
        )?;
        match self.rate {
            Some((rate, unit)) => write!(f, "  {rate:.2} {unit}"),
            None => Ok(()),
        }
    }
}

/// Inputs whose gradients are wanted, from the same bf16 values on every device.
fn leaves(data: &[TensorData], device: &Device, dtype: DType) -> Vec<Tensor<1>> {
    let device = device.clone().autodiff();
    let load = |d: &TensorData| {
        let rounded = Tensor::<1>::from_data(d.clone(), (&device, DType::BF16));
        cast(rounded, dtype).require_grad()
    };
    data.iter().map(load).collect()
}

/// The gradient that the backward pass from `y` begins with: a loss starts its own with 1.
fn seed(y: &Tensor<1>, dy: &TensorData, device: &Device) -> Tensor<1> {
    let device = device.clone().autodiff();
    match y.dims()[0] {
        1 => Tensor::ones([1], (&device, y.dtype())),
        _ => {
            let rounded = Tensor::from_data(dy.clone(), (&device, DType::BF16));
            cast(rounded, y.dtype())
        }
    }
}

/// The rates of the forward and of the backward pass in bf16, after they have run once.
fn rates(op: &Op, data: &[TensorData], dy: &TensorData, device: &Device) -> [Option<Rate>; 2] {
    let inputs = leaves(data, device, DType::BF16);
    let Some(Ok((y, forward))) = record(device, || (op.run)(&inputs)) else {
        return [None, None];
    };
    let seed = seed(&y, dy, device);
    let backward = match record(device, || backward_from(y, seed)) {
        Some(Ok((_, backward))) => rate_of(&backward.operations),
        _ => None,
    };
    [rate_of(&forward.operations), backward]
}

/// The output and the gradients of all inputs.
fn results(
    op: &Op,
    data: &[TensorData],
    dy: &TensorData,
    device: &Device,
    dtype: DType,
) -> Vec<Vec<f64>> {
    let inputs = leaves(data, device, dtype);
    let y = (op.run)(&inputs);
    let mut all = vec![values(&y)];
    let seed = seed(&y, dy, device);
    let gradients = backward_from(y, seed);
    for input in &inputs {
        let gradient = input.grad(&gradients);
        all.push(gradient.map_or(vec![], |g| values(&g)));
    }
    all
}

/// The operation's inputs in bf16 and the gradient of its output; it runs on `device` in `dtype` to tell
/// the size of that.
fn inputs(op: &Op, device: &Device, dtype: DType) -> (Vec<TensorData>, TensorData) {
    let host = Device::flex();
    let draw = |(i, &(count, scale)): (usize, &(usize, f64))| {
        normal([count], scale, 1000 + i as u64, &host, DType::BF16).to_data()
    };
    let data: Vec<TensorData> = op.inputs.iter().enumerate().map(draw).collect();
    let plain: Vec<Tensor<1>> = data
        .iter()
        .map(|d| Tensor::from_data(d.clone(), (device, dtype)))
        .collect();
    let length = (op.run)(&plain).dims()[0];
    let dy = normal([length], 1.0, 77, &host, DType::BF16).to_data();
    (data, dy)
}

/// What [`results`] are called.
fn label(op: &Op, i: usize) -> String {
    match i {
        0 => op.name.clone(),
        i => format!("{}, gradient {i}", op.name),
    }
}

/// The operation several times over on `device`: every result must have the bits of the first time.
pub fn repeated(op: &Op, device: &Device, times: usize) -> Vec<Comparison> {
    let (data, dy) = inputs(op, device, DType::BF16);
    let run = || results(op, &data, &dy, device, DType::BF16);
    let first = run();
    let mut errors = vec![0f64; first.len()];
    for _ in 1..times {
        for (error, (a, b)) in errors.iter_mut().zip(run().iter().zip(&first)) {
            let now = match a.len() == b.len() && !a.is_empty() {
                true => relative_error_of(a, b),
                false => f64::INFINITY,
            };
            if !error.is_nan() && (now.is_nan() || now > *error) {
                *error = now;
            }
        }
    }
    let named = errors.into_iter().enumerate();
    named
        .map(|(i, error)| Comparison {
            name: format!("{}, {times} times", label(op, i)),
            error,
            bound: 0.0,
            rate: None,
        })
        .collect()
}

/// The operation in bf16 on `device` against f32 on the CPU, from the same inputs.
pub fn compare(op: &Op, device: &Device) -> Vec<Comparison> {
    let host = Device::flex();
    let (data, dy) = inputs(op, &host, DType::F32);
    let ours = results(op, &data, &dy, device, DType::BF16);
    let reference = results(op, &data, &dy, &host, DType::F32);
    let [forward, backward] = rates(op, &data, &dy, device);
    let pairs = ours.iter().zip(&reference).enumerate();
    pairs
        .map(|(i, (a, b))| Comparison {
            name: label(op, i),
            error: match a.len() == b.len() {
                true => relative_error_of(a, b),
                false => f64::INFINITY,
            },
            bound: op.bound,
            rate: if i == 0 { forward } else { backward },
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Doubles its input, and adds `drift` more at each call.
    fn drifting(drift: f64) -> Op {
        let calls = Cell::new(0.0);
        Op {
            name: "x".into(),
            inputs: vec![(16, 1.0)],
            bound: 1e-2,
            run: Box::new(move |x| {
                calls.set(calls.get() + drift);
                x[0].clone() * (2.0 + calls.get())
            }),
        }
    }

    #[test]
    fn a_rate_counts_arithmetic_before_traffic() {
        let timed = |ms, work| Timed {
            name: "x".into(),
            ms,
            work,
            beside: false,
            gap: 0.0,
        };
        let gemm = timed(1.0, Some(Work::Flops(3e9)));
        let rope = timed(2.0, Some(Work::Bytes(6e6)));
        assert_eq!(
            rate_of(&[gemm.clone(), rope.clone()]),
            Some((1.0, "TFLOP/s"))
        );
        assert_eq!(rate_of(&[rope]), Some((3.0, "GB/s")));
        assert_eq!(rate_of(&[timed(1.0, None)]), None);
    }

    #[test]
    fn a_result_that_changes_from_run_to_run_is_told() {
        let device = Device::flex();
        let passed = |op: &Op| -> Vec<bool> {
            let found = repeated(op, &device, 3);
            found.iter().map(Comparison::passed).collect()
        };
        assert_eq!(passed(&drifting(0.0)), [true, true]);
        assert_eq!(passed(&drifting(0.5)), [false, false]);
        assert_eq!(passed(&drifting(f64::NAN)), [false, false]);
    }
}
