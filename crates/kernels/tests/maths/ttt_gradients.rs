//! The reversible backward of the scan against finite differences and stored states.

use burn::tensor::Tensor;
use ttt_kernels::testing::relative_error;
use ttt_kernels::ttt::{ScanSpec, chunk_conv, fast_weight_scan, oracle};
use ttt_kernels::{Packing, linear};

use crate::support::{assert_close, check_gradients, flat, random, spec, tape_gradients};

const WIDTH: usize = 3;
const INNER: usize = 4;

/// Flat z, v, w0 of `rows` × `length` tokens.
fn inputs(rows: usize, length: usize, width: usize, inner: usize) -> [Tensor<1>; 3] {
    [
        flat(random([rows, length, inner], 1)),
        flat(random([rows, length, width], 2)),
        flat(random([width, inner], 3)),
    ]
}

fn shaped(x: &[Tensor<1>], spec: &ScanSpec, width: usize) -> (Tensor<3>, Tensor<3>, Tensor<2>) {
    let (rows, length) = (spec.packing.rows().len(), spec.packing.length());
    (
        x[0].clone().reshape([rows as i32, length as i32, -1]),
        x[1].clone().reshape([rows as i32, length as i32, -1]),
        x[2].clone().reshape([width as i32, -1]),
    )
}

fn scan(x: &[Tensor<1>], spec: &ScanSpec, width: usize) -> Tensor<1> {
    let (z, v, w0) = shaped(x, spec, width);
    flat(fast_weight_scan(z, v, w0, spec.clone()).output)
}

#[test]
fn the_scan_differentiates() {
    for (length, chunk) in [(13, 4), (12, 4), (3, 4), (4, 4), (5, 1)] {
        let spec = spec(Packing::whole_rows(2, length), chunk, 0.3);
        let inputs = inputs(2, length, WIDTH, INNER);
        check_gradients("scan", &inputs, |x: &[Tensor<1>]| scan(x, &spec, WIDTH));
    }
}

#[test]
fn the_scan_differentiates_over_documents() {
    let rows = vec![vec![0, 3, 8, 9], vec![0, 12], vec![0, 1, 2, 3, 4]];
    let spec = spec(Packing::new(14, rows).unwrap(), 4, 0.3);
    let inputs = inputs(3, 14, WIDTH, INNER);
    check_gradients("documents", &inputs, |x: &[Tensor<1>]| {
        scan(x, &spec, WIDTH)
    });
}

/// The whole layer: z, x, κ, W_t and W_0 at once.
#[test]
fn the_layer_differentiates() {
    let packing = Packing::new(14, vec![vec![0, 3, 8, 9], vec![0]]).unwrap();
    let inputs = [
        flat(random([2, 14, INNER], 1)),
        flat(random([2, 14, WIDTH], 2)),
        flat(random([WIDTH, 1, 5], 3)),
        flat(random([WIDTH, WIDTH], 4)),
        flat(random([WIDTH, INNER], 5)),
    ];
    check_gradients("layer", &inputs, |x: &[Tensor<1>]| {
        let source = x[1].clone().reshape([2, 14, WIDTH]);
        let mixed = chunk_conv(source, x[2].clone().reshape([WIDTH, 1, 5]), &packing, 4);
        let projection: Tensor<2> = x[3].clone().reshape([WIDTH, WIDTH]);
        let v = linear(mixed, projection.transpose());
        let z = x[0].clone().reshape([2, 14, INNER]);
        let w0 = x[4].clone().reshape([WIDTH, INNER]);
        flat(fast_weight_scan(z, v, w0, spec(packing.clone(), 4, 0.3)).output)
    });
}

/// Peeling states off gives the same gradients as keeping every one of them.
#[test]
fn reversing_equals_storing() {
    let (length, chunk, width, inner) = (160, 8, 12, 20);
    let spec = spec(Packing::whole_rows(2, length), chunk, 0.3);
    let inputs = inputs(2, length, width, inner);
    let stored = |x: &[Tensor<1>]| {
        let (z, v, w0) = shaped(x, &spec, width);
        flat(oracle::stored_states(z, v, w0, &spec))
    };
    let reversed = |x: &[Tensor<1>]| scan(x, &spec, width);
    assert!(relative_error(&reversed(&inputs), &stored(&inputs)) < 1e-12);
    let expected = tape_gradients(&inputs, stored);
    assert_close(
        "stored",
        &tape_gradients(&inputs, reversed),
        &expected,
        1e-12,
    );
}

/// Gradients of only some inputs are the gradients of all.
#[test]
fn constants_take_no_gradient_but_change_none() {
    let spec = spec(Packing::whole_rows(1, 13), 4, 0.3);
    let all = inputs(1, 13, WIDTH, INNER);
    let expected = tape_gradients(&all, |x: &[Tensor<1>]| scan(x, &spec, WIDTH));
    for i in 0..3 {
        let one = tape_gradients(&all[i..i + 1], |x: &[Tensor<1>]| {
            let mut inputs = all.clone();
            inputs[i] = x[0].clone();
            scan(&inputs, &spec, WIDTH)
        });
        assert_eq!(one[0], expected[i], "input {i}");
    }
}
