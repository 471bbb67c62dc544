//! The scan and four other ways to compute the same outputs.

use burn::tensor::{DType, Tensor};
use proptest::prelude::*;
use ttt_kernels::Packing;
use ttt_kernels::testing::relative_error;
use ttt_kernels::ttt::{ScanSpec, fast_weight_scan, oracle};

use crate::support::{random, spec};

type Inputs = (Tensor<3>, Tensor<3>, Tensor<2>);

/// [`oracle::stored_states`] wants whole chunks: zero-pad on the right, then crop.
fn stored_states((z, v, w0): Inputs, spec: &ScanSpec) -> Tensor<3> {
    let [rows, length, inner] = z.dims();
    let width = v.dims()[2];
    let padded = length.next_multiple_of(spec.chunk);
    let pad = |t: Tensor<3>, width: usize| match padded - length {
        0 => t,
        gap => {
            let zeros = Tensor::zeros([rows, gap, width], (&t.device(), t.dtype()));
            Tensor::cat(vec![t, zeros], 1)
        }
    };
    let spec = ScanSpec {
        packing: Packing::whole_rows(rows, padded),
        ..spec.clone()
    };
    oracle::stored_states(pad(z, inner), pad(v, width), w0, &spec).slice([0..rows, 0..length])
}

/// Every form in the precision of the inputs.
fn forms(inputs: Inputs, spec: &ScanSpec) -> Vec<(&'static str, Tensor<3>)> {
    let (z, v, w0) = inputs.clone();
    let scan = fast_weight_scan(z.clone(), v.clone(), w0.clone(), spec.clone());
    let attention = oracle::masked_attention(z.clone(), v.clone(), w0.clone(), spec);
    let sequential = oracle::sequential(z.clone(), v.clone(), w0.clone(), spec);
    vec![
        ("scan", scan.output),
        ("stored states", stored_states(inputs, spec)),
        ("masked attention", attention),
        ("sequential", sequential),
        (
            "two levels of 1",
            oracle::two_level(z.clone(), v.clone(), w0.clone(), spec, 1),
        ),
        ("two levels of 3", oracle::two_level(z, v, w0, spec, 3)),
    ]
}

fn check(rows: usize, length: usize, chunk: usize, sizes: [usize; 2], seed: u64) {
    let [width, inner] = sizes;
    let inputs = (
        random([rows, length, inner], seed),
        random([rows, length, width], seed + 1),
        random([width, inner], seed + 2),
    );
    let spec = spec(Packing::whole_rows(rows, length), chunk, 0.3);
    let exact = forms(inputs.clone(), &spec);
    let truth = &exact[2].1;
    for (name, output) in &exact {
        let error = relative_error(output, truth);
        println!("{name} in f64: worst {error:.1e}, limit 1e-12");
        assert!(error < 1e-12, "{name} in f64: {error:e}");
    }
    let single = |t: Tensor<3>| t.cast(DType::F32);
    let (z, v, w0) = inputs;
    let inputs = (single(z), single(v), w0.cast(DType::F32));
    for (name, output) in forms(inputs, &spec) {
        let error = relative_error(&output.cast(DType::F64), truth);
        println!("{name} in f32: worst {error:.1e}, limit 1e-5");
        assert!(error < 1e-5, "{name} in f32: {error:e}");
    }
}

#[test]
fn forms_agree_at_the_edges() {
    for (length, chunk) in [
        (29, 8),
        (32, 8),
        (5, 8),
        (8, 8),
        (9, 8),
        (13, 1),
        (1, 1),
        (1, 4),
    ] {
        check(2, length, chunk, [6, 10], 17);
    }
}

/// As large as a test may be: many chunks, wider than a chunk is long, and the other way round.
#[test]
fn forms_agree_over_many_chunks() {
    check(1, 500, 7, [24, 40], 23);
    check(1, 300, 64, [8, 12], 29);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn forms_agree(
        rows in 1usize..4,
        length in 1usize..48,
        chunk in 1usize..16,
        width in 1usize..7,
        inner in 1usize..9,
        seed in 0u64..1 << 32,
    ) {
        check(rows, length, chunk, [width, inner], seed);
    }
}

/// A wrong prefix must not pass the comparison above.
#[test]
fn the_comparison_sees_an_update_one_chunk_late() {
    let (z, v) = (random([1, 29, 10], 1), random([1, 29, 6], 2));
    let w0 = random([6, 10], 3);
    let right = spec(Packing::whole_rows(1, 29), 8, 0.3);
    // Targets moved one chunk on: chunk i learns what chunk i − 1 should have.
    let late = Tensor::cat(
        vec![
            Tensor::zeros_like(&v).slice([0..1, 0..8]),
            v.clone().slice([0..1, 0..21]),
        ],
        1,
    );
    let a = fast_weight_scan(z.clone(), v, w0.clone(), right.clone()).output;
    let b = fast_weight_scan(z, late, w0, right).output;
    assert!(relative_error(&b, &a) > 0.1);
}
