//! Rows that only move memory.

use burn::tensor::{DType, Tensor};

use super::{
    Bench, HEAD_SIZE, HEADS, HIDDEN, INTERMEDIATE, Row, TOKENS, VOCAB, leaf, probe, probe_gradient,
};
use crate::ops::seed::backward_from;
use crate::work::Work;
use crate::{embedding, rms_norm, rope, swiglu};

type Measure = fn(&Bench<'_>) -> Result<Row, String>;

pub(super) const ROWS: [(&str, Measure); 5] = [
    ("swiglu", gate),
    ("rms_norm", norm),
    ("residual_add", add),
    ("rope", rotate),
    ("embedding", look_up),
];

/// `passes` over `elements` numbers of 2 bytes.
fn bytes(elements: usize, passes: f64) -> Work {
    Work::Bytes(2.0 * elements as f64 * passes)
}

fn gate(bench: &Bench<'_>) -> Result<Row, String> {
    let [a, b, dz]: [Tensor<2>; 3] = [(); 3].map(|()| bench.random([TOKENS, INTERMEDIATE], 1.0));
    let mut forward = || probe(swiglu(a.clone(), b.clone()));
    let (ta, tb) = (leaf(&a), leaf(&b));
    let mut both = || {
        let z = swiglu(ta.clone(), tb.clone());
        probe_gradient(&ta, &backward_from(z, dz.clone()))
    };
    // Reads two and writes one; backward reads three and writes two.
    let work = bytes(TOKENS * INTERMEDIATE, 3.0);
    bench.row(work, 5.0 / 3.0, Some(&mut forward), Some(&mut both))
}

fn norm(bench: &Bench<'_>) -> Result<Row, String> {
    let [x, dy]: [Tensor<2>; 2] = [(); 2].map(|()| bench.random([TOKENS, HIDDEN], 1.0));
    let gain: Tensor<1> = bench.random([HIDDEN], 1.0);
    let mut forward = || probe(rms_norm(x.clone(), gain.clone(), 1e-6));
    let (tx, tgain) = (leaf(&x), leaf(&gain));
    let mut both = || {
        let y = rms_norm(tx.clone(), tgain.clone(), 1e-6);
        probe_gradient(&tx, &backward_from(y, dy.clone()))
    };
    // Reads one and writes one; backward reads two and writes one.
    let work = bytes(TOKENS * HIDDEN, 2.0);
    bench.row(work, 1.5, Some(&mut forward), Some(&mut both))
}

/// Burn's own addition, for comparison.
fn add(bench: &Bench<'_>) -> Result<Row, String> {
    let [x, y]: [Tensor<2>; 2] = [(); 2].map(|()| bench.random([TOKENS, HIDDEN], 1.0));
    let mut forward = || probe(x.clone() + y.clone());
    bench.row(bytes(TOKENS * HIDDEN, 3.0), 0.0, Some(&mut forward), None)
}

fn rotate(bench: &Bench<'_>) -> Result<Row, String> {
    let x: Tensor<4> = bench.random([1, TOKENS, HEADS, HEAD_SIZE], 1.0);
    let table = Tensor::<2>::ones([TOKENS, HEAD_SIZE / 2], (bench.device, DType::F32));
    let mut forward = || probe(rope(x.clone(), table.clone(), table.clone()));
    // Reads and writes x, and reads two tables of f32, an eighth of x's bytes each.
    let work = bytes(TOKENS * HIDDEN, 2.25);
    bench.row(work, 0.0, Some(&mut forward), None)
}

fn look_up(bench: &Bench<'_>) -> Result<Row, String> {
    let rows: Tensor<2> = bench.random([VOCAB, HIDDEN], 1.0);
    let ids = bench.ids().reshape([1, TOKENS]);
    let mut forward = || probe(embedding(ids.clone(), rows.clone(), DType::BF16));
    bench.row(bytes(TOKENS * HIDDEN, 2.0), 0.0, Some(&mut forward), None)
}
