//! The same maths in forms that are easy to believe, differentiated by Burn's own tape.
//!
//! They hold a state per chunk or an N×N matrix, so they serve as oracles only.

use burn::tensor::{Tensor, TensorData};

use super::scan::ScanSpec;

/// Block-causal linear attention: `O = Z W0ᵀ + η ((Z Zᵀ) ∘ M) V`, with M[p, q] = 1 iff q is in an
/// earlier chunk of p's document (docs/in-place-ttt.md, section 5, attention view).
pub fn masked_attention(z: Tensor<3>, v: Tensor<3>, w0: Tensor<2>, spec: &ScanSpec) -> Tensor<3> {
    let [rows, length, _] = z.dims();
    let mut mask = vec![0f64; rows * length * length];
    for row in 0..rows {
        let document = spec.packing.document_start(row);
        for p in 0..length {
            for q in 0..p {
                if document[p] == document[q] && q / spec.chunk < p / spec.chunk {
                    mask[(row * length + p) * length + q] = 1.0;
                }
            }
        }
    }
    let mask = Tensor::<3>::from_data(
        TensorData::new(mask, [rows, length, length]),
        (&z.device(), z.dtype()),
    );
    let scores = z.clone().matmul(z.clone().swap_dims(1, 2)) * mask;
    z.matmul(w0.transpose().unsqueeze()) + scores.matmul(v).mul_scalar(spec.lr)
}

/// Every chunk's weight at once: deltas `[B, T, D, F]` and their exclusive running sum, as the
/// official release does. Rows are one document each; N is a multiple of the chunk.
pub fn stored_states(z: Tensor<3>, v: Tensor<3>, w0: Tensor<2>, spec: &ScanSpec) -> Tensor<3> {
    let [rows, length, inner] = z.dims();
    let width = v.dims()[2];
    assert!(spec.packing.is_whole_rows() && length.is_multiple_of(spec.chunk));
    let chunks = length / spec.chunk;
    let z = z.reshape([rows, chunks, spec.chunk, inner]);
    let v = v.reshape([rows, chunks, spec.chunk, width]);
    let deltas = v.swap_dims(2, 3).matmul(z.clone());
    let sums = deltas.clone().cumsum(1) - deltas;
    let weights = w0.reshape([1, 1, width, inner]) + sums.mul_scalar(spec.lr);
    z.matmul(weights.swap_dims(2, 3))
        .reshape([rows, length, width])
}

/// Two levels: segments of `segment` chunks carry a state, inside a segment the attention form.
/// Rows are one document each.
pub fn two_level(
    z: Tensor<3>,
    v: Tensor<3>,
    w0: Tensor<2>,
    spec: &ScanSpec,
    segment: usize,
) -> Tensor<3> {
    let [rows, length, _] = z.dims();
    assert!(spec.packing.is_whole_rows());
    let step = segment * spec.chunk;
    let mut weight: Tensor<3> = w0.unsqueeze::<3>().repeat_dim(0, rows);
    let mut outputs = vec![];
    for begin in (0..length).step_by(step) {
        let end = (begin + step).min(length);
        let tz = z.clone().slice([0..rows, begin..end]);
        let tv = v.clone().slice([0..rows, begin..end]);
        let inside = ScanSpec {
            packing: crate::Packing::whole_rows(rows, end - begin),
            ..spec.clone()
        };
        let zero = Tensor::zeros([tv.dims()[2], tz.dims()[2]], (&tz.device(), tz.dtype()));
        let local = masked_attention(tz.clone(), tv.clone(), zero, &inside);
        outputs.push(tz.clone().matmul(weight.clone().swap_dims(1, 2)) + local);
        weight = weight + tv.swap_dims(1, 2).matmul(tz).mul_scalar(spec.lr);
    }
    Tensor::cat(outputs, 1)
}

/// One chunk after the other, each weight built from the last. Rows are one document each.
pub fn sequential(z: Tensor<3>, v: Tensor<3>, w0: Tensor<2>, spec: &ScanSpec) -> Tensor<3> {
    let [rows, length, _] = z.dims();
    assert!(spec.packing.is_whole_rows());
    let mut weight: Tensor<3> = w0.unsqueeze::<3>().repeat_dim(0, rows);
    let mut outputs = vec![];
    for begin in (0..length).step_by(spec.chunk) {
        let end = (begin + spec.chunk).min(length);
        let tz = z.clone().slice([0..rows, begin..end]);
        let tv = v.clone().slice([0..rows, begin..end]);
        outputs.push(tz.clone().matmul(weight.clone().swap_dims(1, 2)));
        weight = weight + tv.swap_dims(1, 2).matmul(tz).mul_scalar(spec.lr);
    }
    Tensor::cat(outputs, 1)
}
