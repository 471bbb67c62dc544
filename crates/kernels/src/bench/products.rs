//! Rows that multiply: a plain product, attention, the loss, the MLPs.

use burn::tensor::Tensor;

use super::{
    Bench, CHUNK, HEAD_SIZE, HEADS, HIDDEN, INTERMEDIATE, Row, TOKENS, VOCAB, WINDOW, leaf, probe,
    probe_gradient,
};
use crate::ops::seed::backward_from;
use crate::ttt::{ScanSpec, chunk_conv, fast_weight_scan};
use crate::work::Work;
use crate::{AttentionSpec, Packing, attention, linear, linear_cross_entropy, swiglu};

type Measure = fn(&Bench<'_>) -> Result<Row, String>;

pub(super) const ROWS: [(&str, Measure); 6] = [
    ("matmul_bf16_8192", matmul),
    ("attn_full", |bench| attend(bench, None)),
    ("attn_swa", |bench| attend(bench, Some(WINDOW))),
    ("linear_ce", cross_entropy),
    ("mlp_plain", |bench| mlp(bench, false)),
    ("mlp_ttt", |bench| mlp(bench, true)),
];

fn matmul(bench: &Bench<'_>) -> Result<Row, String> {
    let [x, y]: [Tensor<2>; 2] = [(); 2].map(|()| bench.random([8192, 8192], 1.0));
    let work = Work::Flops(2.0 * 8192f64.powi(3));
    let mut run = || probe(linear(x.clone(), y.clone()));
    bench.row(work, 0.0, Some(&mut run), None)
}

fn attend(bench: &Bench<'_>, window: Option<usize>) -> Result<Row, String> {
    let shape = [1, TOKENS, HEADS, HEAD_SIZE];
    let [q, k, v, dy]: [Tensor<4>; 4] = [(); 4].map(|()| bench.random(shape, 1.0));
    let n = TOKENS as f64;
    let visible = window.map_or((n + 1.0) / 2.0, |w| {
        let w = w as f64;
        w - w * (w - 1.0) / (2.0 * n)
    });
    let work = Work::Flops(4.0 * n * (HEADS * HEAD_SIZE) as f64 * visible);
    let spec = || AttentionSpec {
        window,
        scale: (HEAD_SIZE as f64).powf(-0.5),
        query_offset: 0,
        packing: None,
        context: None,
    };
    let mut forward = || probe(attention(q.clone(), k.clone(), v.clone(), spec()));
    let [tq, tk, tv] = [&q, &k, &v].map(leaf);
    let mut both = || {
        let y = attention(tq.clone(), tk.clone(), tv.clone(), spec());
        probe_gradient(&tq, &backward_from(y, dy.clone()))
    };
    // FlashAttention's convention: five products backward, two forward.
    bench.row(work, 2.5, Some(&mut forward), Some(&mut both))
}

fn cross_entropy(bench: &Bench<'_>) -> Result<Row, String> {
    let h: Tensor<2> = leaf(&bench.random([TOKENS, HIDDEN], 1.0));
    let weight: Tensor<2> = leaf(&bench.random([VOCAB, HIDDEN], 0.02));
    let labels = bench.ids();
    let work = Work::Flops(2.0 * (TOKENS * HIDDEN * VOCAB) as f64);
    let mut both = || {
        let scale = 1.0 / TOKENS as f64;
        let loss = linear_cross_entropy(h.clone(), weight.clone(), labels.clone(), scale);
        probe_gradient(&h, &loss.backward())
    };
    bench.row(work, 2.0, None, Some(&mut both))
}

fn mlp(bench: &Bench<'_>, ttt: bool) -> Result<Row, String> {
    let x: Tensor<3> = bench.random([1, TOKENS, HIDDEN], 1.0);
    let target: Tensor<3> = bench.random([1, TOKENS, HIDDEN], 0.05);
    let [gate, up]: [Tensor<2>; 2] = [(); 2].map(|()| bench.random([INTERMEDIATE, HIDDEN], 0.02));
    let down: Tensor<2> = bench.random([HIDDEN, INTERMEDIATE], 0.02);
    let project: Tensor<2> = bench.random([HIDDEN, HIDDEN], 0.02);
    let taps: Tensor<3> = bench.random([HIDDEN, 1, 5], 0.5);
    let dy: Tensor<3> = bench.random([1, TOKENS, HIDDEN], 1.0);
    let packing = Packing::whole_rows(1, TOKENS);
    let (n, d, f) = (TOKENS as f64, HIDDEN as f64, INTERMEDIATE as f64);
    let update = 2.0 * d * f * (1.0 - CHUNK as f64 / n) + 2.0 * d * d + 10.0 * d;
    let work = Work::Flops(n * (6.0 * d * f + if ttt { update } else { 0.0 }));
    let layer = |[x, target]: [&Tensor<3>; 2],
                 [gate, up, down, project]: [&Tensor<2>; 4],
                 taps: &Tensor<3>| {
        let z = swiglu(
            linear(x.clone(), gate.clone()),
            linear(x.clone(), up.clone()),
        );
        if !ttt {
            return linear(z, down.clone());
        }
        let u = chunk_conv(target.clone(), taps.clone(), &packing, CHUNK);
        let spec = ScanSpec {
            lr: 1e-3,
            chunk: CHUNK,
            clip: None,
            packing: packing.clone(),
            context: None,
        };
        fast_weight_scan(z, linear(u, project.clone()), down.clone(), spec).output
    };
    let matrices = [&gate, &up, &down, &project];
    let mut forward = || probe(layer([&x, &target], matrices, &taps));
    let inputs = [&x, &target].map(leaf);
    let (leaves, tracked_taps) = (matrices.map(leaf), leaf(&taps));
    let mut both = || {
        let y = layer(inputs.each_ref(), leaves.each_ref(), &tracked_taps);
        probe_gradient(&inputs[0], &backward_from(y, dy.clone()))
    };
    bench.row(work, 2.0, Some(&mut forward), Some(&mut both))
}
