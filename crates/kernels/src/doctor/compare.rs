//! One operation on two devices: values and gradients.

use std::fmt;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::dtype::cast;
use crate::ops::seed::backward_from;
use crate::testing::{normal, relative_error_of, values};

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
        let Self { name, error, bound } = self;
        write!(
            f,
            "{verdict}  {name:<44} error {error:.1e} (at most {bound:.0e})"
        )
    }
}

/// The output and the gradients of all inputs.
fn results(
    op: &Op,
    data: &[TensorData],
    dy: &TensorData,
    device: &Device,
    dtype: DType,
) -> Vec<Vec<f64>> {
    let device = device.clone().autodiff();
    // Both sides start from the same bf16 values.
    let load = |d: &TensorData| -> Tensor<1> {
        let rounded = Tensor::from_data(d.clone(), (&device, DType::BF16));
        cast(rounded, dtype)
    };
    let inputs: Vec<Tensor<1>> = data.iter().map(|d| load(d).require_grad()).collect();
    let y = (op.run)(&inputs);
    let mut all = vec![values(&y)];
    // A loss starts its own backward pass with 1.
    let seed = match y.dims()[0] {
        1 => Tensor::ones([1], (&device, y.dtype())),
        _ => cast(load(dy), y.dtype()),
    };
    let gradients = backward_from(y, seed);
    for input in &inputs {
        let gradient = input.grad(&gradients);
        all.push(gradient.map_or(vec![], |g| values(&g)));
    }
    all
}

/// The operation's inputs, in bf16 on the host, and the gradient of its output.
fn inputs(op: &Op) -> (Vec<TensorData>, TensorData) {
    let host = Device::flex();
    let draw = |(i, &(count, scale)): (usize, &(usize, f64))| {
        normal([count], scale, 1000 + i as u64, &host, DType::BF16).to_data()
    };
    let data: Vec<TensorData> = op.inputs.iter().enumerate().map(draw).collect();
    let plain: Vec<Tensor<1>> = data
        .iter()
        .map(|d| Tensor::from_data(d.clone(), (&host, DType::F32)))
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
    let (data, dy) = inputs(op);
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
        })
        .collect()
}

/// The operation in bf16 on `device` against f32 on the CPU, from the same inputs.
pub fn compare(op: &Op, device: &Device) -> Vec<Comparison> {
    let host = Device::flex();
    let (data, dy) = inputs(op);
    let ours = results(op, &data, &dy, device, DType::BF16);
    let reference = results(op, &data, &dy, &host, DType::F32);
    let pairs = ours.iter().zip(&reference).enumerate();
    pairs
        .map(|(i, (a, b))| Comparison {
            name: label(op, i),
            error: match a.len() == b.len() {
                true => relative_error_of(a, b),
                false => f64::INFINITY,
            },
            bound: op.bound,
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
