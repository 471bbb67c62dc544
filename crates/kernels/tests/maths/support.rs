//! Inputs, gradients by the tape and by finite differences, and document layouts.

use burn::tensor::{DType, Device, Tensor, TensorData};
use proptest::prelude::*;
use ttt_kernels::Packing;
use ttt_kernels::testing::{normal, relative_error_of, values};
use ttt_kernels::ttt::ScanSpec;

/// Standard normal values in f64.
pub fn random<const R: usize>(shape: [usize; R], seed: u64) -> Tensor<R> {
    normal(shape, 1.0, seed, &Device::flex(), DType::F64)
}

/// All elements in one row.
pub fn flat<const R: usize>(t: Tensor<R>) -> Tensor<1> {
    t.reshape([-1])
}

/// A function of several flat tensors, whose result is flat as well. Closures that call an operation
/// reshape on the way in and out, so that one helper serves every rank.
pub trait Operation: Fn(&[Tensor<1>]) -> Tensor<1> {}
impl<F: Fn(&[Tensor<1>]) -> Tensor<1>> Operation for F {}

/// The gradient of ⟨f(inputs), c⟩ for a fixed random c with respect to each input, by the tape.
pub fn tape_gradients(inputs: &[Tensor<1>], f: impl Operation) -> Vec<Vec<f64>> {
    let leaves: Vec<_> = inputs
        .iter()
        .map(|t| t.clone().autodiff().require_grad())
        .collect();
    let output = f(&leaves);
    let c = weights(&output).autodiff();
    let mut gradients = (output * c).sum().backward();
    let gradient = |(i, leaf): (usize, &Tensor<1>)| {
        let gradient = leaf.grad_remove(&mut gradients);
        values(&gradient.unwrap_or_else(|| panic!("no gradient reached input {i}")))
    };
    leaves.iter().enumerate().map(gradient).collect()
}

/// The same by central differences of fourth order, element by element: f64 inputs only.
pub fn finite_differences(inputs: &[Tensor<1>], f: impl Operation) -> Vec<Vec<f64>> {
    // Truncation h⁴ and rounding 1e-16/h are both near 1e-13 of the value.
    const STEP: f64 = 1e-3;
    let c = values(&weights(&f(inputs)));
    let gradient = |i: usize| {
        let base = values(&inputs[i]);
        let at = |j: usize, by: f64| {
            let mut moved = base.clone();
            moved[j] += by;
            let mut inputs = inputs.to_vec();
            let data = TensorData::new(moved, [base.len()]);
            inputs[i] = Tensor::from_data(data, (&Device::flex(), DType::F64));
            let output = values(&f(&inputs));
            output.iter().zip(&c).map(|(y, c)| y * c).sum::<f64>()
        };
        let slope = |j| {
            let near = at(j, STEP) - at(j, -STEP);
            let far = at(j, 2.0 * STEP) - at(j, -2.0 * STEP);
            (8.0 * near - far) / (12.0 * STEP)
        };
        (0..base.len()).map(slope).collect()
    };
    (0..inputs.len()).map(gradient).collect()
}

fn weights(output: &Tensor<1>) -> Tensor<1> {
    normal(output.dims(), 1.0, 4242, &Device::flex(), output.dtype())
}

/// Asserts that two sets of gradients agree input by input, and prints the worst relative error.
pub fn assert_close(name: &str, got: &[Vec<f64>], expected: &[Vec<f64>], limit: f64) {
    assert_eq!(got.len(), expected.len());
    let errors: Vec<f64> = got
        .iter()
        .zip(expected)
        .map(|(a, b)| relative_error_of(a, b))
        .collect();
    let worst = errors.iter().copied().fold(0.0, f64::max);
    println!("{name}: worst {worst:.1e}, limit {limit:.0e}");
    for (i, &error) in errors.iter().enumerate() {
        assert!(
            error <= limit,
            "{name}: input {i} is off by {error:e}, limit {limit:e}"
        );
    }
}

/// Checks the hand-written backward of `f` against finite differences.
pub fn check_gradients(name: &str, inputs: &[Tensor<1>], f: impl Operation) {
    let got = tape_gradients(inputs, &f);
    assert_close(name, &got, &finite_differences(inputs, &f), 1e-7);
}

/// Documents of one to three rows of equal length, with starts anywhere, and a chunk size.
pub fn layouts(longest: usize) -> impl Strategy<Value = (Packing, usize)> {
    (1..=longest, 1usize..4, 1usize..9).prop_flat_map(|(length, rows, chunk)| {
        let row = proptest::collection::btree_set(0..length, 0..5).prop_map(|mut starts| {
            starts.insert(0);
            starts.into_iter().collect::<Vec<usize>>()
        });
        proptest::collection::vec(row, rows)
            .prop_map(move |rows| (Packing::new(length, rows).unwrap(), chunk))
    })
}

/// A scan without a clip.
pub fn spec(packing: Packing, chunk: usize, lr: f64) -> ScanSpec {
    ScanSpec {
        lr,
        chunk,
        clip: None,
        packing,
        context: None,
    }
}

/// The rows in which two `[1, N, X]` tensors differ by a bit.
pub fn moved<const R: usize>(a: &Tensor<R>, b: &Tensor<R>, width: usize) -> Vec<usize> {
    let (a, b) = (values(a), values(b));
    let pairs = a.chunks(width).zip(b.chunks(width)).enumerate();
    pairs
        .filter(|(_, (a, b))| a.iter().zip(*b).any(|(a, b)| a.to_bits() != b.to_bits()))
        .map(|(token, _)| token)
        .collect()
}

/// `x` with row `token` of batch row 0 replaced by other values: `[1, N, X]`.
pub fn perturb(x: &Tensor<3>, token: usize, seed: u64) -> Tensor<3> {
    let [_, _, width] = x.dims();
    let other = normal([1, 1, width], 1.0, seed, &x.device(), x.dtype());
    x.clone()
        .slice_assign([0..1, token..token + 1, 0..width], other)
}
