//! Attention by tiles of queries, in plain tensor operations.
//!
//! S: keys. Tn, Sn: queries and keys of one tile. R = H / G: query heads of a key-value head.

use std::ops::Range;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use super::AttentionSpec;
use crate::dtype::{cast, widen};

/// Queries handled at once; bounds the scores held to B·H·TILE·(TILE + window).
const TILE: usize = 256;

/// One tile of queries and the keys that any of them can see.
struct Tile {
    queries: Range<usize>,
    keys: Range<usize>,
}

fn tiles(queries: usize, keys: usize, spec: &AttentionSpec) -> Vec<Tile> {
    (0..queries)
        .step_by(TILE)
        .map(|begin| {
            let end = (begin + TILE).min(queries);
            let first = spec.query_offset + begin;
            let oldest = spec.window.map_or(0, |w| (first + 1).saturating_sub(w));
            Tile {
                queries: begin..end,
                keys: oldest..keys.min(spec.query_offset + end),
            }
        })
        .collect()
}

/// True where a key is hidden from a query: `[B or 1, 1, 1, Tn, Sn]`.
fn hidden(spec: &AttentionSpec, tile: &Tile, device: &Device) -> Tensor<5, Bool> {
    let (tn, sn) = (tile.queries.len(), tile.keys.len());
    let starts: Vec<Vec<i32>> = match &spec.packing {
        Some(packing) if !packing.is_whole_rows() => (0..packing.rows().len())
            .map(|row| packing.document_start(row))
            .collect(),
        _ => vec![],
    };
    let rows = starts.len().max(1);
    // First visible key of each query; the last one is its own position.
    let mut first = Vec::with_capacity(rows * tn);
    for row in 0..rows {
        for query in tile.queries.clone() {
            let position = (spec.query_offset + query) as i32;
            let by_window = spec.window.map_or(0, |w| position + 1 - w as i32);
            let by_document = starts.get(row).map_or(0, |s| s[position as usize]);
            first.push(by_window.max(by_document));
        }
    }
    let own: Vec<i32> = tile
        .queries
        .clone()
        .map(|query| (spec.query_offset + query) as i32)
        .collect();
    let int = |data: Vec<i32>, shape: [usize; 5]| {
        Tensor::<5, Int>::from_data(TensorData::new(data, shape), device)
    };
    let key = int(
        tile.keys.clone().map(|k| k as i32).collect(),
        [1, 1, 1, 1, sn],
    )
    .expand([rows, 1, 1, tn, sn]);
    let first = int(first, [rows, 1, 1, tn, 1]).expand([rows, 1, 1, tn, sn]);
    let own = int(own, [1, 1, 1, tn, 1]).expand([rows, 1, 1, tn, sn]);
    key.clone().lower(first).bool_or(key.greater(own))
}

/// Rows `range` of `[B, N, H, E]` as `[B, G, R, Tn, E]` in f32.
fn by_group(x: &Tensor<4>, range: &Range<usize>, groups: usize) -> Tensor<5> {
    let [batch, _, heads, size] = x.dims();
    let x = widen(x.clone().slice([0..batch, range.clone()]));
    x.reshape([batch, range.len(), groups, heads / groups, size])
        .permute([0, 2, 3, 1, 4])
}

/// Back from `[B, G, R, Tn, E]` to `[B, Tn, H, E]`.
fn by_token(x: Tensor<5>) -> Tensor<4> {
    let [batch, groups, repeat, tokens, size] = x.dims();
    x.permute([0, 3, 1, 2, 4])
        .reshape([batch, tokens, groups * repeat, size])
}

/// The output and each query's log-sum-exp `[B, H, N]` f32.
pub fn forward(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    spec: &AttentionSpec,
) -> (Tensor<4>, Tensor<3>) {
    let dtype = q.dtype();
    let [batch, queries, heads, _] = q.dims();
    let [_, keys, groups, _] = k.dims();
    let (mut outputs, mut sums) = (vec![], vec![]);
    for tile in tiles(queries, keys, spec) {
        let tq = by_group(&q, &tile.queries, groups).mul_scalar(spec.scale);
        let (tk, tv) = (
            by_group(&k, &tile.keys, groups),
            by_group(&v, &tile.keys, groups),
        );
        let scores = scores(tq, tk, spec, &tile);
        let max = scores.clone().max_dim(4);
        let weights = (scores - max.clone()).exp();
        let total = weights.clone().sum_dim(4);
        outputs.push(by_token(grouped_matmul(weights, tv) / total.clone()));
        sums.push((total.log() + max).reshape([batch, heads, tile.queries.len()]));
    }
    (cast(Tensor::cat(outputs, 1), dtype), Tensor::cat(sums, 2))
}

/// Masked scores `[B, G, R, Tn, Sn]` of scaled queries.
fn scores(q: Tensor<5>, k: Tensor<5>, spec: &AttentionSpec, tile: &Tile) -> Tensor<5> {
    let device = q.device();
    let scores = grouped_matmul(q, k.swap_dims(3, 4));
    let hidden = hidden(spec, tile, &device).expand(scores.dims());
    scores.mask_fill(hidden, f32::NEG_INFINITY)
}

/// `[B, G, R, m, x] · [B, G, 1, x, n]` without repeating the second operand per query head.
fn grouped_matmul(a: Tensor<5>, b: Tensor<5>) -> Tensor<5> {
    let [batch, groups, repeat, m, inner] = a.dims();
    let n = b.dims()[4];
    let a: Tensor<4> = a.reshape([batch, groups, repeat * m, inner]);
    let b: Tensor<4> = b.squeeze_dim(2);
    a.matmul(b).reshape([batch, groups, repeat, m, n])
}

/// Σ over the query heads of a group of aᵀ b: `[B, G, R, Tn, x]`, `[B, G, R, Tn, y]` → `[B, G, 1, x, y]`.
fn grouped_outer(a: Tensor<5>, b: Tensor<5>) -> Tensor<5> {
    let flat = |t: Tensor<5>| -> Tensor<4> {
        let [batch, groups, repeat, tokens, width] = t.dims();
        t.reshape([batch, groups, repeat * tokens, width])
    };
    flat(a).transpose().matmul(flat(b)).unsqueeze_dim(2)
}

/// dq, dk, dv. With P the attention weights and δ = Σ_e dy y:
/// dS = P ∘ (dy vᵀ − δ), dq = scale dS k, dk = scale dSᵀ q, dv = Pᵀ dy.
pub fn backward(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    output: Tensor<4>,
    log_sum_exp: Tensor<3>,
    dy: Tensor<4>,
    spec: &AttentionSpec,
) -> [Tensor<4>; 3] {
    let dtype = q.dtype();
    let [_, keys, groups, _] = k.dims();
    let [batch, queries, heads, _] = q.dims();
    let mut dqs = vec![];
    let mut dk = widen(k.zeros_like());
    let mut dv = widen(v.zeros_like());
    for tile in tiles(queries, keys, spec) {
        let tn = tile.queries.len();
        let tq = by_group(&q, &tile.queries, groups).mul_scalar(spec.scale);
        let (tk, tv) = (
            by_group(&k, &tile.keys, groups),
            by_group(&v, &tile.keys, groups),
        );
        let ty = by_group(&output, &tile.queries, groups);
        let tdy = by_group(&dy, &tile.queries, groups);
        let sums = log_sum_exp
            .clone()
            .slice([0..batch, 0..heads, tile.queries.clone()])
            .reshape([batch, groups, heads / groups, tn, 1]);
        let weights = (scores(tq.clone(), tk.clone(), spec, &tile) - sums).exp();
        let delta = (tdy.clone() * ty).sum_dim(4);
        let dscores = (grouped_matmul(tdy.clone(), tv.swap_dims(3, 4)) - delta) * weights.clone();
        dqs.push(by_token(
            grouped_matmul(dscores.clone(), tk).mul_scalar(spec.scale),
        ));
        let range = [0..batch, tile.keys.clone()];
        let add = |sum: Tensor<4>, part: Tensor<5>| {
            let old = sum.clone().slice(range.clone());
            sum.slice_assign(range.clone(), old + by_token(part))
        };
        dk = add(dk, grouped_outer(dscores, tq));
        dv = add(dv, grouped_outer(weights, tdy));
    }
    [Tensor::cat(dqs, 1), dk, dv].map(|g| cast(g, dtype))
}
