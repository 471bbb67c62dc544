//! Attention against a dense composition that Burn's tape differentiates, and by finite
//! differences: windows, grouped heads, documents, cache offsets and tiles of queries.

use burn::tensor::{DType, Device, Tensor, TensorData, activation::softmax};
use ttt_kernels::testing::{relative_error, values};
use ttt_kernels::{AttentionSpec, Packing, attention};

use crate::support::{assert_close, check_gradients, flat, random, tape_gradients};

#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    groups: usize,
    size: usize,
}

impl Sizes {
    fn inputs(&self, seed: u64) -> [Tensor<1>; 3] {
        [
            flat(random(
                [self.rows, self.queries, self.heads, self.size],
                seed,
            )),
            flat(random(
                [self.rows, self.keys, self.groups, self.size],
                seed + 1,
            )),
            flat(random(
                [self.rows, self.keys, self.groups, self.size],
                seed + 2,
            )),
        ]
    }

    fn shaped(&self, x: &[Tensor<1>]) -> [Tensor<4>; 3] {
        [
            x[0].clone()
                .reshape([self.rows, self.queries, self.heads, self.size]),
            x[1].clone()
                .reshape([self.rows, self.keys, self.groups, self.size]),
            x[2].clone()
                .reshape([self.rows, self.keys, self.groups, self.size]),
        ]
    }
}

fn spec(window: Option<usize>, query_offset: usize, packing: Option<Packing>) -> AttentionSpec {
    AttentionSpec {
        window,
        scale: 0.7,
        query_offset,
        packing,
        context: None,
    }
}

/// The definition: every score, one mask built token by token, one softmax.
fn dense([q, k, v]: [Tensor<4>; 3], spec: &AttentionSpec) -> Tensor<4> {
    let ([rows, queries, heads, _], [_, keys, groups, _]) = (q.dims(), k.dims());
    let mut mask = vec![0f64; rows * queries * keys];
    for (i, mask) in mask.iter_mut().enumerate() {
        let (row, query, key) = (i / (queries * keys), i / keys % queries, i % keys);
        let position = query + spec.query_offset;
        let documents = spec.packing.as_ref().map(|p| p.document_start(row));
        let together = documents.is_none_or(|d| d[position] == d[key]);
        let near = spec.window.is_none_or(|w| position < key + w);
        if !(key <= position && near && together) {
            *mask = -1e30;
        }
    }
    let mask = Tensor::<4>::from_data(
        TensorData::new(mask, [rows, 1, queries, keys]),
        (&q.device(), q.dtype()),
    );
    // Query head a uses group ⌊a G / H⌋.
    let by_head = |t: Tensor<4>| -> Tensor<4> {
        let size = t.dims()[3];
        let t: Tensor<5> = t.swap_dims(1, 2).unsqueeze_dim(2);
        t.repeat_dim(2, heads / groups)
            .reshape([rows, heads, keys, size])
    };
    let scores = q.swap_dims(1, 2).matmul(by_head(k).swap_dims(2, 3));
    let weights = softmax(scores.mul_scalar(spec.scale) + mask, 3);
    weights.matmul(by_head(v)).swap_dims(1, 2)
}

fn compare(name: &str, sizes: Sizes, spec: AttentionSpec) {
    let inputs = sizes.inputs(11);
    let fast = |x: &[Tensor<1>]| {
        let [q, k, v] = sizes.shaped(x);
        flat(attention(q, k, v, spec.clone()))
    };
    let plain = |x: &[Tensor<1>]| flat(dense(sizes.shaped(x), &spec));
    let error = relative_error(&fast(&inputs), &plain(&inputs));
    assert!(error < 1e-13, "{name}: output is off by {error:e}");
    let expected = tape_gradients(&inputs, plain);
    assert_close(name, &tape_gradients(&inputs, fast), &expected, 1e-12);
}

const SMALL: Sizes = Sizes {
    rows: 2,
    queries: 7,
    keys: 7,
    heads: 4,
    groups: 2,
    size: 4,
};

fn documents() -> Packing {
    Packing::new(7, vec![vec![0, 3, 4], vec![0, 5]]).unwrap()
}

#[test]
fn attention_differentiates() {
    for (window, packing) in [
        (None, None),
        (Some(3), None),
        (None, Some(documents())),
        (Some(2), Some(documents())),
    ] {
        let spec = spec(window, 0, packing);
        check_gradients("attention", &SMALL.inputs(3), |x: &[Tensor<1>]| {
            let [q, k, v] = SMALL.shaped(x);
            flat(attention(q, k, v, spec.clone()))
        });
    }
}

#[test]
fn every_small_window_agrees_with_the_dense_form() {
    for window in 2..=9 {
        compare("window", SMALL, spec(Some(window), 0, None));
        compare(
            "window, documents",
            SMALL,
            spec(Some(window), 0, Some(documents())),
        );
    }
    compare(
        "one document per row",
        SMALL,
        spec(None, 0, Some(Packing::whole_rows(2, 7))),
    );
}

#[test]
fn every_grouping_of_heads_agrees_with_the_dense_form() {
    for groups in [1, 2, 3, 6] {
        let sizes = Sizes {
            heads: 6,
            groups,
            ..SMALL
        };
        compare("groups", sizes, spec(None, 0, None));
    }
}

/// Tiles of 256 queries: full, windows shorter and longer than a tile, documents across tile edges.
#[test]
fn tiles_of_queries_agree_with_the_dense_form() {
    let sizes = Sizes {
        rows: 2,
        queries: 530,
        keys: 530,
        heads: 2,
        groups: 1,
        size: 4,
    };
    let packing = Packing::new(530, vec![vec![0, 200, 256, 500], vec![0, 257]]).unwrap();
    compare("tiles", sizes, spec(None, 0, None));
    compare("tiles, window 5", sizes, spec(Some(5), 0, None));
    compare("tiles, window 300", sizes, spec(Some(300), 0, None));
    compare(
        "tiles, documents",
        sizes,
        spec(None, 0, Some(packing.clone())),
    );
    compare(
        "tiles, window, documents",
        sizes,
        spec(Some(100), 0, Some(packing)),
    );
}

/// Decoding: fewer queries than keys.
#[test]
fn queries_behind_a_cache_agree_with_the_dense_form() {
    for (queries, window) in [
        (1, None),
        (3, None),
        (1, Some(2)),
        (3, Some(2)),
        (3, Some(100)),
    ] {
        let sizes = Sizes { queries, ..SMALL };
        compare("cache", sizes, spec(window, 7 - queries, None));
    }
}

/// Keys that end where the queries begin, or before: as many as queries, more, and tiles of both.
#[test]
fn queries_behind_all_keys_agree_with_the_dense_form() {
    for (queries, offset, window) in [
        (7, 7, Some(8)),
        (4, 7, Some(8)),
        (7, 7, Some(10)),
        (3, 9, Some(8)),
        (7, 7, None),
    ] {
        let sizes = Sizes { queries, ..SMALL };
        compare("behind", sizes, spec(window, offset, None));
    }
    let sizes = Sizes {
        rows: 1,
        queries: 300,
        keys: 300,
        ..SMALL
    };
    compare("behind, tiles", sizes, spec(Some(301), 300, None));
}

/// The last of these queries would see nothing.
#[test]
#[should_panic(expected = "do not fit")]
fn queries_that_see_no_key_are_refused() {
    compare("behind", SMALL, spec(Some(7), 7, None));
}

/// Neither all of these queries have keys of their own, nor none.
#[test]
#[should_panic(expected = "do not fit")]
fn queries_that_reach_past_the_keys_are_refused() {
    compare("past", SMALL, spec(Some(8), 3, None));
}

/// A token that sees only itself returns its own value, whatever its score.
#[test]
fn window_one_returns_the_values() {
    let sizes = Sizes { groups: 4, ..SMALL };
    let inputs = sizes.inputs(5);
    let run = |x: &[Tensor<1>]| {
        let [q, k, v] = sizes.shaped(x);
        flat(attention(q.mul_scalar(1e3), k, v, spec(Some(1), 0, None)))
    };
    assert_eq!(values(&run(&inputs)), values(&inputs[2]));
    let [dq, dk, dv]: [Vec<f64>; 3] = tape_gradients(&inputs, run).try_into().unwrap();
    let largest = |of: &[f64]| of.iter().fold(0.0, |m: f64, g| m.max(g.abs()));
    assert!(largest(&dq) < 1e-12 * largest(&dv), "dq {:e}", largest(&dq));
    assert!(largest(&dk) < 1e-12 * largest(&dv), "dk {:e}", largest(&dk));
}

/// Large scores neither overflow nor lose the largest.
#[test]
fn large_scores_stay_finite() {
    let [q, k, v] = SMALL.shaped(&SMALL.inputs(5));
    let f32 = |t: Tensor<4>, by: f64| t.mul_scalar(by).cast(DType::F32);
    let y = attention(f32(q, 1e4), f32(k, 1e4), f32(v, 1.0), spec(None, 0, None));
    assert!(values(&y).iter().all(|v| v.is_finite()));
    assert_eq!(y.device(), Device::flex());
}
