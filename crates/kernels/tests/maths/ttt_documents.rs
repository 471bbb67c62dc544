//! Documents packed into a row: the fast weights start afresh at each.

use burn::tensor::{DType, Device, Tensor};
use proptest::prelude::*;
use ttt_kernels::testing::{normal, relative_error, values};
use ttt_kernels::ttt::{chunk_conv, fast_weight_scan, oracle};
use ttt_kernels::{Packing, linear};

use crate::support::{assert_close, flat, layouts, random, spec, tape_gradients};

const WIDTH: usize = 5;
const INNER: usize = 7;

struct Layer {
    conv: Tensor<3>,
    projection: Tensor<2>,
    w0: Tensor<2>,
}

impl Layer {
    fn new(dtype: DType) -> Self {
        let device = Device::flex();
        Self {
            conv: normal([WIDTH, 1, 5], 1.0, 3, &device, dtype),
            projection: normal([WIDTH, WIDTH], 1.0, 4, &device, dtype),
            w0: normal([WIDTH, INNER], 1.0, 5, &device, dtype),
        }
    }

    fn run(&self, z: Tensor<3>, x: Tensor<3>, packing: &Packing, chunk: usize) -> Tensor<3> {
        let mixed = chunk_conv(x, self.conv.clone(), packing, chunk);
        let v = linear(mixed, self.projection.clone());
        let spec = spec(packing.clone(), chunk, 0.3);
        fast_weight_scan(z, v, self.w0.clone(), spec).output
    }
}

fn single<const R: usize>(shape: [usize; R], seed: u64) -> Tensor<R> {
    normal(shape, 1.0, seed, &Device::flex(), DType::F32)
}

/// At chunk-aligned starts a packed document equals a run of its own.
#[test]
fn aligned_documents_equal_runs_alone() {
    let (chunk, starts, length) = (4, [0, 4, 16, 20], 27);
    let (z, x) = (random([1, length, INNER], 1), random([1, length, WIDTH], 2));
    let layer = Layer::new(DType::F64);
    let packing = Packing::new(length, vec![starts.to_vec()]).unwrap();
    let packed = layer.run(z.clone(), x.clone(), &packing, chunk);
    for (i, &begin) in starts.iter().enumerate() {
        let end = starts.get(i + 1).copied().unwrap_or(length);
        let cut = |t: &Tensor<3>| t.clone().slice([0..1, begin..end]);
        let alone = Packing::whole_rows(1, end - begin);
        let alone = layer.run(cut(&z), cut(&x), &alone, chunk);
        let error = relative_error(&cut(&packed), &alone);
        assert!(error < 1e-14, "document {i}: {error:e}");
    }
}

/// Rows of a batch do not know each other.
#[test]
fn rows_are_independent() {
    let packing = Packing::new(19, vec![vec![0, 9], vec![0], vec![0, 4, 12]]).unwrap();
    let (z, x) = (random([3, 19, INNER], 1), random([3, 19, WIDTH], 2));
    let layer = Layer::new(DType::F64);
    let together = layer.run(z.clone(), x.clone(), &packing, 4);
    for row in 0..3 {
        let cut = |t: &Tensor<3>| t.clone().narrow(0, row, 1);
        let alone = Packing::new(19, vec![packing.rows()[row].clone()]).unwrap();
        let alone = layer.run(cut(&z), cut(&x), &alone, 4);
        let error = relative_error(&cut(&together), &alone);
        assert!(error < 1e-14, "row {row}: {error:e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Starts anywhere: outputs and gradients equal the token mask, differentiated by the tape.
    #[test]
    fn any_documents_equal_the_token_mask((packing, chunk) in layouts(40), seed in 0u64..1 << 32) {
        let (rows, length) = (packing.rows().len(), packing.length());
        let spec = spec(packing, chunk, 0.3);
        let inputs = [
            flat(random([rows, length, INNER], seed)),
            flat(random([rows, length, WIDTH], seed + 1)),
            flat(random([WIDTH, INNER], seed + 2)),
        ];
        let shaped = |x: &[Tensor<1>]| -> (Tensor<3>, Tensor<3>, Tensor<2>) {
            (
                x[0].clone().reshape([rows, length, INNER]),
                x[1].clone().reshape([rows, length, WIDTH]),
                x[2].clone().reshape([WIDTH, INNER]),
            )
        };
        let scan = |x: &[Tensor<1>]| {
            let (z, v, w0) = shaped(x);
            flat(fast_weight_scan(z, v, w0, spec.clone()).output)
        };
        let mask = |x: &[Tensor<1>]| {
            let (z, v, w0) = shaped(x);
            flat(oracle::masked_attention(z, v, w0, &spec))
        };
        prop_assert!(relative_error(&scan(&inputs), &mask(&inputs)) < 1e-12);
        let expected = tape_gradients(&inputs, mask);
        let got = tape_gradients(&inputs, scan);
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let error = ttt_kernels::testing::relative_error_of(got, expected);
            println!("token mask, gradient {i}: worst {error:.1e}, limit 1e-12");
            prop_assert!(error < 1e-12, "input {i}: {error:e}");
        }
    }
}

/// Outputs and the gradients with respect to z and x, of one row.
fn outputs_and_gradients(z: &Tensor<3>, x: &Tensor<3>, packing: &Packing) -> [Vec<f64>; 3] {
    let layer = Layer::new(DType::F32);
    let length = packing.length();
    let run = |t: &[Tensor<1>]| {
        let z = t[0].clone().reshape([1, length, INNER]);
        let x = t[1].clone().reshape([1, length, WIDTH]);
        flat(layer.run(z, x, packing, 4))
    };
    let inputs = [flat(z.clone()), flat(x.clone())];
    let mut gradients = tape_gradients(&inputs, run).into_iter();
    let output = values(&run(&inputs));
    [output, gradients.next().unwrap(), gradients.next().unwrap()]
}

/// Rewriting one document, be it text or padding, moves no bit of another: neither its outputs
/// nor its gradients, whichever comes first.
#[test]
fn a_document_never_moves_another() {
    let length = 30;
    let starts = [0, 6, 7, 17, 24];
    let packing = Packing::new(length, vec![starts.to_vec()]).unwrap();
    let (z, x) = (single([1, length, INNER], 1), single([1, length, WIDTH], 2));
    let before = outputs_and_gradients(&z, &x, &packing);
    for (i, &begin) in starts.iter().enumerate() {
        let end = starts.get(i + 1).copied().unwrap_or(length);
        let rewrite = |t: &Tensor<3>, width: usize| {
            // Large: a trace of it would not round away.
            let other = single([1, end - begin, width], 9).mul_scalar(1e6);
            t.clone().slice_assign([0..1, begin..end, 0..width], other)
        };
        let after = outputs_and_gradients(&rewrite(&z, INNER), &rewrite(&x, WIDTH), &packing);
        assert_ne!(before[0], after[0], "document {i} moved nothing at all");
        for (name, width, before, after) in [
            ("output", WIDTH, &before[0], &after[0]),
            ("dz", INNER, &before[1], &after[1]),
            ("dx", WIDTH, &before[2], &after[2]),
        ] {
            for token in (0..length).filter(|t| !(begin..end).contains(t)) {
                let of = |all: &[f64]| all[token * width..][..width].to_vec();
                assert_eq!(
                    of(before),
                    of(after),
                    "{name} of token {token}, document {i}"
                );
            }
        }
    }
}

/// Negative control: without the document boundary the same rewriting does move the other.
#[test]
fn without_a_boundary_documents_move_each_other() {
    let (z, x) = (single([1, 12, INNER], 1), single([1, 12, WIDTH], 2));
    let packing = Packing::whole_rows(1, 12);
    let before = outputs_and_gradients(&z, &x, &packing);
    let other = single([1, 8, INNER], 9);
    let z = z.slice_assign([0..1, 0..8, 0..INNER], other);
    let after = outputs_and_gradients(&z, &x, &packing);
    assert_ne!(before[0][8 * WIDTH..], after[0][8 * WIDTH..]);
}

/// Padding is a document of its own at the end of a row; cutting it off changes nothing before it.
#[test]
fn padding_is_neither_read_nor_written() {
    let (z, x) = (single([1, 24, INNER], 1), single([1, 24, WIDTH], 2));
    let layer = Layer::new(DType::F64);
    let double = |t: Tensor<3>| t.cast(DType::F64);
    let (z, x) = (double(z), double(x));
    for text in [8, 13, 16, 23] {
        let run = |z: Tensor<1>, x: Tensor<1>, length: usize, starts: Vec<usize>| {
            let packing = Packing::new(length, vec![starts]).unwrap();
            let z = z.reshape([1, length, INNER]);
            let x = x.reshape([1, length, WIDTH]);
            layer
                .run(z, x, &packing, 4)
                .slice([0..1, 0..text, 0..WIDTH])
        };
        let cut = |t: &Tensor<3>| flat(t.clone().slice([0..1, 0..text]));
        let padded = tape_gradients(&[flat(z.clone()), flat(x.clone())], |t: &[Tensor<1>]| {
            flat(run(t[0].clone(), t[1].clone(), 24, vec![0, text]))
        });
        let alone = tape_gradients(&[cut(&z), cut(&x)], |t: &[Tensor<1>]| {
            flat(run(t[0].clone(), t[1].clone(), text, vec![0]))
        });
        let kept = [
            padded[0][..text * INNER].to_vec(),
            padded[1][..text * WIDTH].to_vec(),
        ];
        assert_close("padding", &kept, &alone, 1e-14);
        assert!(padded[0][text * INNER..].iter().all(|&g| g == 0.0));
        assert!(padded[1][text * WIDTH..].iter().all(|&g| g == 0.0));
    }
}
