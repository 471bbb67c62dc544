//! Linear, RMSNorm, RoPE, SwiGLU and embedding: backward against finite differences, forward
//! against the formula on the host.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use ttt_kernels::testing::{relative_error_of, values};
use ttt_kernels::{backward_from, embedding, linear, rms_norm, rope, swiglu};

use crate::support::{assert_close, check_gradients, flat, random, tape_gradients};

#[test]
fn linear_differentiates() {
    let inputs = [flat(random([2, 3, 5], 1)), flat(random([4, 5], 2))];
    check_gradients("linear", &inputs, |x: &[Tensor<1>]| {
        flat(linear(
            x[0].clone().reshape([2, 3, 5]),
            x[1].clone().reshape([4, 5]),
        ))
    });
}

#[test]
fn linear_is_the_product_with_the_transpose() {
    let (x, w) = (random([3, 5], 1), random([4, 5], 2));
    let (xs, ws) = (values(&x), values(&w));
    let expected: Vec<f64> = (0..12)
        .map(|i| (0..5).map(|k| xs[i / 4 * 5 + k] * ws[i % 4 * 5 + k]).sum())
        .collect();
    assert!(relative_error_of(&values(&linear(x, w)), &expected) < 1e-14);
}

#[test]
fn rms_norm_differentiates() {
    let inputs = [flat(random([2, 3, 6], 3)), random([6], 4)];
    check_gradients("rms_norm", &inputs, |x: &[Tensor<1>]| {
        flat(rms_norm(
            x[0].clone().reshape([2, 3, 6]),
            x[1].clone(),
            1e-2,
        ))
    });
}

#[test]
fn rms_norm_follows_its_formula() {
    let (x, w) = (random([4, 6], 3), random([6], 4));
    let (xs, ws) = (values(&x), values(&w));
    let expected: Vec<f64> = (0..24)
        .map(|i| {
            let row = &xs[i / 6 * 6..i / 6 * 6 + 6];
            let mean = row.iter().map(|v| v * v).sum::<f64>() / 6.0;
            ws[i % 6] * xs[i] / (mean + 0.5).sqrt()
        })
        .collect();
    assert!(relative_error_of(&values(&rms_norm(x, w, 0.5)), &expected) < 1e-14);
}

fn tables(tokens: usize, half: usize) -> (Tensor<2>, Tensor<2>) {
    let angles = random([tokens, half], 5);
    let angles = angles.cast(DType::F32);
    (angles.clone().cos(), angles.sin())
}

#[test]
fn rope_differentiates() {
    let (cos, sin) = tables(3, 2);
    let inputs = [flat(random([2, 3, 2, 4], 6))];
    check_gradients("rope", &inputs, |x: &[Tensor<1>]| {
        let x: Tensor<4> = x[0].clone().reshape([2, 3, 2, 4]);
        flat(rope(x, cos.clone(), sin.clone()))
    });
}

/// Channel j turns with channel j + E/2, not with its neighbour.
#[test]
fn rope_pairs_the_two_halves() {
    let (cos, sin) = tables(3, 2);
    let x = random([2, 3, 2, 4], 6);
    let (xs, c, s) = (values(&x), values(&cos), values(&sin));
    let expected: Vec<f64> = (0..xs.len())
        .map(|i| {
            let (channel, token) = (i % 4, i / 8 % 3);
            let pair = token * 2 + channel % 2;
            match channel < 2 {
                true => xs[i] * c[pair] - xs[i + 2] * s[pair],
                false => xs[i] * c[pair] + xs[i - 2] * s[pair],
            }
        })
        .collect();
    assert!(relative_error_of(&values(&rope(x, cos, sin)), &expected) < 1e-14);
}

#[test]
fn swiglu_differentiates() {
    let inputs = [flat(random([2, 3, 4], 7)), flat(random([2, 3, 4], 8))];
    check_gradients("swiglu", &inputs, |x: &[Tensor<1>]| {
        let [gate, up] = [0, 1].map(|i| -> Tensor<3> { x[i].clone().reshape([2, 3, 4]) });
        flat(swiglu(gate, up))
    });
}

#[test]
fn swiglu_follows_its_formula() {
    let (gate, up) = (random([7], 7), random([7], 8));
    let pairs: Vec<_> = values(&gate).into_iter().zip(values(&up)).collect();
    let expected: Vec<f64> = pairs
        .iter()
        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
        .collect();
    assert!(relative_error_of(&values(&swiglu(gate, up)), &expected) < 1e-14);
}

/// Repeated ids must add up.
#[test]
fn embedding_differentiates() {
    let ids = [3, 1, 3, 0, 3, 1];
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids.to_vec(), [2, 3]), &Device::flex());
    let inputs = [flat(random([5, 4], 9))];
    check_gradients("embedding", &inputs, |x: &[Tensor<1>]| {
        flat(embedding(
            ids.clone(),
            x[0].clone().reshape([5, 4]),
            DType::F64,
        ))
    });
}

/// A graph cut in two and joined by `backward_from` gives the gradients of the whole.
#[test]
fn a_backward_pass_continues_from_a_known_gradient() {
    let inputs = [flat(random([3, 5], 1)), flat(random([4, 5], 2))];
    let first = |x: &[Tensor<1>]| -> Tensor<2> {
        linear(x[0].clone().reshape([3, 5]), x[1].clone().reshape([4, 5]))
    };
    let second = |y: Tensor<2>| swiglu(y.clone(), y);
    let whole = tape_gradients(&inputs, |x: &[Tensor<1>]| flat(second(first(x))));

    let y = first(&inputs);
    let dy = tape_gradients(&[flat(y.clone())], |y: &[Tensor<1>]| {
        flat(second(y[0].clone().reshape([3, 4])))
    });
    let dy = Tensor::<2>::from_data(
        TensorData::new(dy[0].clone(), [3, 4]),
        (&Device::flex(), DType::F64),
    );
    let leaves = inputs.map(|t| t.autodiff().require_grad());
    let mut gradients = backward_from(first(&leaves), dy);
    let parts: Vec<_> = leaves
        .iter()
        .map(|leaf| values(&leaf.grad_remove(&mut gradients).expect("a gradient")))
        .collect();
    assert_close("backward_from", &parts, &whole, 1e-14);
}
