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

/// The operation in bf16 on `device` against f32 on the CPU, from the same inputs.
pub fn compare(op: &Op, device: &Device) -> Vec<Comparison> {
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
    let ours = results(op, &data, &dy, device, DType::BF16);
    let reference = results(op, &data, &dy, &host, DType::F32);
    let label = |i: usize| match i {
        0 => op.name.clone(),
        i => format!("{}, gradient {i}", op.name),
    };
    let pairs = ours.iter().zip(&reference).enumerate();
    pairs
        .map(|(i, (a, b))| Comparison {
            name: label(i),
            error: match a.len() == b.len() {
                true => relative_error_of(a, b),
                false => f64::INFINITY,
            },
            bound: op.bound,
        })
        .collect()
}
