//! Target convolution, next-token shift, the chunk update and its clip.

use burn::tensor::{DType, Device, Tensor, TensorData};
use proptest::prelude::*;
use ttt_kernels::Packing;
use ttt_kernels::testing::{relative_error, relative_error_of, values};
use ttt_kernels::ttt::{ScanSpec, chunk_conv, fast_weight_scan, outer_update, shift_targets};

use crate::support::{check_gradients, flat, layouts, random, spec};

/// The definition, token by token.
fn conv_on_host(x: &Tensor<3>, weight: &Tensor<3>, packing: &Packing, chunk: usize) -> Vec<f64> {
    let [rows, length, width] = x.dims();
    let taps = weight.dims()[2];
    let (x, weight) = (values(x), values(weight));
    let mut u = vec![0.0; rows * length * width];
    for row in 0..rows {
        let document = packing.document_start(row);
        for t in 0..length {
            for k in 0..taps {
                let Some(other) = (t + k).checked_sub(taps / 2).filter(|&o| o < length) else {
                    continue;
                };
                if document[other] != document[t] || other / chunk != t / chunk {
                    continue;
                }
                for c in 0..width {
                    u[(row * length + t) * width + c] +=
                        weight[c * taps + k] * x[(row * length + other) * width + c];
                }
            }
        }
    }
    u
}

proptest! {
    #[test]
    fn the_convolution_follows_its_definition(
        (packing, chunk) in layouts(30),
        half in 0usize..4,
        seed in 0u64..1 << 32,
    ) {
        let x = random([packing.rows().len(), packing.length(), 3], seed);
        let weight = random([3, 1, 2 * half + 1], seed + 1);
        let expected = conv_on_host(&x, &weight, &packing, chunk);
        let got = values(&chunk_conv(x, weight, &packing, chunk));
        prop_assert!(relative_error_of(&got, &expected) < 1e-14);
    }
}

#[test]
fn the_convolution_differentiates() {
    let packing = Packing::new(11, vec![vec![0, 3], vec![0, 6, 7]]).unwrap();
    let inputs = [flat(random([2, 11, 3], 1)), flat(random([3, 1, 5], 2))];
    check_gradients("chunk_conv", &inputs, |x: &[Tensor<1>]| {
        let source = x[0].clone().reshape([2, 11, 3]);
        flat(chunk_conv(
            source,
            x[1].clone().reshape([3, 1, 5]),
            &packing,
            4,
        ))
    });
}

/// A convolution whose only tap is the next token is the shift.
#[test]
fn shifted_targets_are_the_next_tap() {
    let packing = Packing::new(11, vec![vec![0, 3], vec![0, 6, 7]]).unwrap();
    let x = random([2, 11, 3], 1);
    let taps = Tensor::<1>::from_data(
        TensorData::new(vec![0.0, 0.0, 0.0, 1.0, 0.0], [5]),
        (&Device::flex(), DType::F64),
    );
    let weight: Tensor<3> = taps.reshape([1, 1, 5]).repeat_dim(0, 3);
    let expected = values(&chunk_conv(x.clone(), weight, &packing, 4));
    assert_eq!(values(&shift_targets(x.clone(), &packing, 4)), expected);
    check_gradients("shift_targets", &[flat(x)], |x: &[Tensor<1>]| {
        flat(shift_targets(x[0].clone().reshape([2, 11, 3]), &packing, 4))
    });
}

fn norm(t: &Tensor<2>) -> f64 {
    values(t).iter().map(|v| v * v).sum::<f64>().sqrt()
}

#[test]
fn a_clip_bounds_an_update_and_leaves_its_direction() {
    let (v, z) = (random([6, 3], 1), random([6, 4], 2));
    let free = outer_update(v.clone(), z.clone(), None);
    let expected = v.clone().transpose().matmul(z.clone());
    assert!(relative_error(&free, &expected) < 1e-14);
    let clipped = outer_update(v.clone(), z.clone(), Some(0.5));
    assert!((norm(&clipped) - 0.5).abs() < 1e-14);
    let rescaled = clipped.mul_scalar(norm(&free) / 0.5);
    assert!(relative_error(&rescaled, &free) < 1e-14);
    let loose = outer_update(v.clone(), z.clone(), Some(1e6));
    assert_eq!(values(&loose), values(&free));
    let none = outer_update(v.zeros_like(), z, Some(0.5));
    assert!(values(&none).iter().all(|&x| x == 0.0));
}

/// Each chunk is clipped by itself, before η; the state norm tells.
#[test]
fn a_scan_clips_every_chunk() {
    let (z, v) = (random([1, 12, 4], 1), random([1, 12, 3], 2));
    let clipped = ScanSpec {
        clip: Some(1e-3),
        ..spec(Packing::whole_rows(1, 12), 4, 2.0)
    };
    let w0 = random([3, 4], 3);
    let got = fast_weight_scan(z.clone(), v.clone(), w0.clone(), clipped).output;
    let mut weight = w0;
    let mut outputs = vec![];
    for begin in [0, 4, 8] {
        let rows = |t: &Tensor<3>| -> Tensor<2> {
            t.clone().slice([0..1, begin..begin + 4]).squeeze_dim(0)
        };
        outputs.push(rows(&z).matmul(weight.clone().transpose()));
        let delta = rows(&v).transpose().matmul(rows(&z));
        let scale = (1e-3 / norm(&delta)).min(1.0);
        weight = weight + delta.mul_scalar(2.0 * scale);
    }
    let expected = Tensor::cat(outputs, 0).unsqueeze::<3>();
    assert!(relative_error(&got, &expected) < 1e-13);
}

/// The backward pass does not know the clip, so a gradient through it must not be had.
#[test]
#[should_panic(expected = "clipped updates are for inference")]
fn a_clip_refuses_gradients() {
    let clipped = ScanSpec {
        clip: Some(1e-3),
        ..spec(Packing::whole_rows(1, 12), 4, 2.0)
    };
    let z = random([1, 12, 4], 1).autodiff().require_grad();
    fast_weight_scan(z, random([1, 12, 3], 2), random([3, 4], 3), clipped);
}

/// The logged norm is that of the largest state that was read, over documents and rows.
#[test]
fn the_state_norm_is_that_of_the_largest_state_read() {
    let packing = Packing::new(12, vec![vec![0], vec![0, 8]]).unwrap();
    let (z, v) = (random([2, 12, 4], 1), random([2, 12, 3], 2));
    let of = |row: usize, range: std::ops::Range<usize>| {
        let cut = |t: &Tensor<3>| -> Tensor<2> {
            t.clone()
                .slice([row..row + 1, range.clone()])
                .squeeze_dim(0)
        };
        norm(&cut(&v).transpose().matmul(cut(&z)))
    };
    let expected = of(0, 0..8).max(of(1, 0..4));
    let scan = fast_weight_scan(
        z.clone(),
        v.clone(),
        random([3, 4], 3),
        spec(packing, 4, 0.3),
    );
    assert!((values(&scan.state_norm)[0] - expected).abs() < 1e-12 * expected);
    let short = spec(Packing::whole_rows(2, 12), 12, 0.3);
    let scan = fast_weight_scan(z, v, random([3, 4], 3), short);
    assert_eq!(values(&scan.state_norm), [0.0]);
}
