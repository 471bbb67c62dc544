//! What low precision keeps and loses.

use burn::tensor::{DType, Device, Tensor};
use ttt_kernels::Packing;
use ttt_kernels::testing::{normal, relative_error_of, values};
use ttt_kernels::ttt::{fast_weight_scan, outer_update};

use crate::support::{flat, spec, tape_gradients};

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// ⟨change, ideal⟩ / ‖ideal‖²: 1 if the whole of the ideal change arrived, 0 if none.
fn share(change: &[f64], ideal: &[f64]) -> f64 {
    let dot: f64 = change.iter().zip(ideal).map(|(a, b)| a * b).sum();
    dot / norm(ideal).powi(2)
}

/// What arrives of 32 equal updates of `size` ‖W0‖_F each with bf16 z and v: through the scan with W0
/// kept in `master`, and through a bf16 weight that they are added to one by one.
fn shares(size: f64, master: DType) -> (f64, f64) {
    const UPDATES: usize = 32;
    let (width, inner) = (96, 128); // a chunk is `inner` tokens
    let device = Device::flex();
    let bf16 = |t: Tensor<2>| t.cast(DType::BF16);
    let w0 = normal([width, inner], 0.02, 1, &device, DType::F32).cast(master);
    let z = bf16(normal([inner, inner], 1.0, 2, &device, DType::F32));
    let v = normal([inner, width], 1.0, 3, &device, DType::F32);
    let unscaled = outer_update(v.clone(), z.clone().cast(DType::F32), None);
    let scale = size * norm(&values(&w0)) / norm(&values(&unscaled));
    let v = bf16(v.mul_scalar(scale));
    // The last chunk's z is the identity, so that its outputs are the columns of the weight read.
    let mut zs = vec![z.clone(); UPDATES];
    zs.push(bf16(Tensor::eye(inner, &device)));
    let z_row: Tensor<3> = Tensor::cat(zs, 0).unsqueeze();
    let v_row: Tensor<3> = v.clone().repeat_dim(0, UPDATES + 1).unsqueeze();
    let length = (UPDATES + 1) * inner;
    let spec = spec(Packing::whole_rows(1, length), inner, 1.0);
    let output = fast_weight_scan(z_row, v_row, w0.clone(), spec).output;
    assert_eq!(output.dtype(), DType::BF16);
    let read = output.slice([0..1, UPDATES * inner..length]);
    let read: Tensor<2> = read.squeeze_dim::<2>(0).transpose();

    let delta = outer_update(v, z, None);
    assert_eq!(delta.dtype(), DType::F32);
    let start = bf16(w0.clone());
    let mut running = start.clone();
    for _ in 0..UPDATES {
        running = running + bf16(delta.clone());
    }

    let ideal: Vec<f64> = values(&delta).iter().map(|d| d * UPDATES as f64).collect();
    let arrived = |w: &Tensor<2>, start: &Tensor<2>| {
        let pairs = values(w).into_iter().zip(values(start));
        share(&pairs.map(|(a, b)| a - b).collect::<Vec<f64>>(), &ideal)
    };
    (arrived(&read, &w0), arrived(&running, &start))
}

/// S is kept in f32 and W0 + ηS rounded once, so small updates survive bf16 inputs; far smaller ones
/// do where W0 is kept in f32 as well, since rounding is unbiased only off bf16's own grid. Adding
/// them to a bf16 weight one by one loses them.
#[test]
fn small_updates_survive_bf16_inputs() {
    for (size, master, most_lost) in [(1e-3, DType::BF16, 0.6), (5e-5, DType::F32, 0.1)] {
        let (survived, lost) = shares(size, master);
        println!("updates of {size:e}: f32 state {survived:.3}, bf16 sum {lost:.3}");
        // At the smaller size one rounding leaves an error of a few per cent on the share.
        assert!(
            (survived - 1.0).abs() < 0.1,
            "{size:e} survived: {survived}"
        );
        assert!(lost < most_lost, "{size:e}: the control kept {lost}");
    }
}

/// 256 chunks added and peeled off again in f32 leave at most 1e-6 of ‖S_T‖.
#[test]
fn peeling_256_chunks_drifts_little() {
    const CHUNKS: usize = 256;
    let (width, inner) = (32, 48); // a chunk is `width` tokens
    let length = CHUNKS * width;
    let device = Device::flex();
    let z = normal([1, length, inner], 1.0, 1, &device, DType::F32);
    let v = normal([1, length, width], 1.0, 2, &device, DType::F32);
    let inputs = [flat(z.clone())];
    let spec = spec(Packing::whole_rows(1, length), width, 1.0);
    // With W0 = 0 and dO the identity in chunk 1, zero elsewhere, dZ of chunk 1 is the state that
    // it read, as the backward pass rebuilds it after peeling off all later chunks.
    let identity = Tensor::<2>::eye(width, &device);
    let chunk = |t: &Tensor<3>, range: std::ops::Range<usize>| -> Tensor<2> {
        t.clone().slice([0..1, range]).squeeze_dim(0)
    };
    let leaf = inputs[0].clone().autodiff().require_grad();
    let scan = fast_weight_scan(
        leaf.clone().reshape([1, length, inner]),
        v.clone(),
        Tensor::zeros([width, inner], &device),
        spec,
    );
    let read = chunk(&scan.output, width..2 * width) * identity.autodiff();
    let mut gradients = read.sum().backward();
    let dz: Tensor<3> = leaf
        .grad_remove(&mut gradients)
        .unwrap()
        .reshape([1, length, inner]);
    let peeled = values(&chunk(&dz, width..2 * width));

    let double = |t: Tensor<2>| t.cast(DType::F64);
    let sum = |range: std::ops::Range<usize>| {
        let (v, z) = (double(chunk(&v, range.clone())), double(chunk(&z, range)));
        values(&outer_update(v, z, None))
    };
    let first = sum(0..width);
    let last = norm(&sum(0..length - width));
    let drift: Vec<f64> = peeled.iter().zip(&first).map(|(a, b)| a - b).collect();
    let drift = norm(&drift) / last;
    println!("drift of the earliest state: {drift:.2e} of the last state's norm");
    assert!(drift < 1e-6, "drift {drift:e}");
}

/// The gradients of a long f32 scan stay with those in f64.
#[test]
fn long_f32_gradients_stay_close_to_f64() {
    let (length, width, inner) = (1024, 16, 24);
    let device = Device::flex();
    let spec = spec(Packing::whole_rows(1, length), 8, 0.01);
    let gradients = |dtype: DType| {
        let inputs = [
            flat(normal([1, length, inner], 1.0, 1, &device, DType::F32)),
            flat(normal([1, length, width], 1.0, 2, &device, DType::F32)),
            flat(normal([width, inner], 1.0, 3, &device, DType::F32)),
        ];
        let inputs = inputs.map(|t| t.cast(dtype));
        tape_gradients(&inputs, |x: &[Tensor<1>]| {
            let z = x[0].clone().reshape([1, length, inner]);
            let v = x[1].clone().reshape([1, length, width]);
            let w0 = x[2].clone().reshape([width, inner]);
            flat(fast_weight_scan(z, v, w0, spec.clone()).output)
        })
    };
    for (i, (single, double)) in gradients(DType::F32)
        .iter()
        .zip(gradients(DType::F64))
        .enumerate()
    {
        let error = relative_error_of(single, &double);
        println!("input {i}: {error:.1e}");
        assert!(error < 1e-5, "input {i}: {error:e}");
    }
}
