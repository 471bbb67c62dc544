//! The gradient of attention's queries in a fixed order, for the deterministic mode.
//!
//! cuDNN has such a mode too, but holds all scores in memory for it: 16 GiB for 8 heads of 32k tokens,
//! and with a window it runs at a sixth of its speed. Its gradients of keys and values have a fixed
//! order in either mode, so they stay, and its δ with them.

use super::attention::Extents;
use super::attention_graph::Key;
use super::stream::{Arg, Context};
use crate::work::Work;

/// Queries of a block, as in `attention_dq.cu`.
const ROWS: usize = 64;

/// Device addresses of what the kernel reads.
pub(super) struct Inputs {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub dy: u64,
    /// Log-sum-exp and δ: `[B, H, N]`, or `[B, N, H]` where rows are packed.
    pub lse: u64,
    pub delta: u64,
    /// Where rows are packed: H times the first token of each document, and how many there are.
    pub documents: Option<(u64, i64)>,
}

/// Writes the gradient to `dq`.
pub(super) fn launch(
    cx: &mut Context,
    dq: u64,
    from: &Inputs,
    e: &Extents,
    key: &Key,
) -> Result<(), String> {
    let name = match e.size {
        0..=64 => "attention_dq_64",
        _ => "attention_dq_128",
    };
    let int = |x: usize| Arg::Int(x as i32);
    let (starts, documents) = from.documents.unwrap_or((0, 0));
    let args = [
        Arg::Ptr(dq),
        Arg::Ptr(from.q),
        Arg::Ptr(from.k),
        Arg::Ptr(from.v),
        Arg::Ptr(from.dy),
        Arg::Ptr(from.lse),
        Arg::Ptr(from.delta),
        Arg::Ptr(starts),
        Arg::Int(documents as i32),
        int(e.tokens),
        int(e.keys),
        int(e.heads),
        int(e.groups),
        int(e.size),
        int(e.query_row),
        int(e.dq_row),
        int(e.key_row),
        Arg::Int(key.window.map_or(i32::MAX, |w| w as i32)),
        int(if key.behind { e.keys } else { 0 }),
        Arg::Float(f32::from_bits(key.scale)),
    ];
    let grid = (e.tokens.div_ceil(ROWS), e.heads, e.batch);
    let grid = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
    // Three products over the pairs that see each other; in documents there are fewer.
    if let Some(pairs) = key.pairs() {
        cx.doing(Work::Flops(6.0 * e.size as f64 * pairs));
    }
    cx.launch(name, grid, 128, &args)
}
