//! Causal and windowed attention of whole rows, through cuDNN's fused attention.
//!
//! cuDNN recognises attention in a graph of products, masks and reductions; these are the graphs of
//! its own frontend for a causal mask with a left bound ("sliding window"). Shapes in a graph are
//! `[B, H, N, E]` with the strides of our `[B, N, H, E]`.

use std::collections::HashMap;

use burn::tensor::{DType, Tensor};

use super::cudnn::{DataType, Graph, Library, Mode, Node, Plan, Reduce};
use super::stream::{Buffer, on_stream};
use crate::ops::attention::AttentionSpec;

const F32: DataType = DataType::CUDNN_DATA_FLOAT;
const BF16: DataType = DataType::CUDNN_DATA_BFLOAT16;
const I32: DataType = DataType::CUDNN_DATA_INT32;
const BOOL: DataType = DataType::CUDNN_DATA_BOOLEAN;

/// What a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    batch: i64,
    queries: i64,
    keys: i64,
    heads: i64,
    groups: i64,
    size: i64,
    window: Option<i64>,
    scale: u32,
    backward: bool,
}

/// cuDNN and its plans, on the device thread.
#[derive(Default)]
pub struct Attentions {
    library: Option<Library>,
    plans: HashMap<Key, Plan>,
    /// One scratch memory for all plans: address and bytes.
    workspace: (u64, usize),
}

impl Attentions {
    fn run(
        &mut self,
        key: Key,
        stream: cudarc::driver::sys::CUstream,
        addresses: &[u64],
    ) -> Result<(), String> {
        let library = match &mut self.library {
            Some(library) => library,
            none => none.insert(Library::open()?),
        };
        let plan = match self.plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => {
                let graph = Graph::new(library);
                free.insert(match key.backward {
                    false => forward_plan(graph, &key)?,
                    true => backward_plan(graph, &key)?,
                })
            }
        };
        if plan.workspace > self.workspace.1 {
            // SAFETY: the old memory may still be in use by queued work: wait, then free it once.
            unsafe {
                if self.workspace.0 != 0 {
                    cudarc::driver::result::stream::synchronize(stream)
                        .map_err(|e| format!("cuDNN workspace: {e}"))?;
                    cudarc::driver::result::free_sync(self.workspace.0)
                        .map_err(|e| format!("cuDNN workspace: {e}"))?;
                    self.workspace = (0, 0);
                }
                let at = cudarc::driver::result::malloc_sync(plan.workspace)
                    .map_err(|e| format!("cuDNN workspace of {} bytes: {e}", plan.workspace))?;
                self.workspace = (at, plan.workspace);
            }
        }
        plan.run(library, stream, addresses, self.workspace.0)
    }
}

/// `[B, heads, tokens, E]` with the strides of `[B, tokens, heads, E]`.
fn rows(batch: i64, heads: i64, tokens: i64, size: i64) -> ([i64; 4], [i64; 4]) {
    (
        [batch, heads, tokens, size],
        [tokens * heads * size, size, heads * size, 1],
    )
}

fn transposed((d, s): ([i64; 4], [i64; 4])) -> ([i64; 4], [i64; 4]) {
    ([d[0], d[1], d[3], d[2]], [s[0], s[1], s[3], s[2]])
}

fn dense(d: [i64; 4]) -> ([i64; 4], [i64; 4]) {
    (d, [d[1] * d[2] * d[3], d[2] * d[3], d[3], 1])
}

/// Building blocks over the scores `[B, H, N, S]`.
struct Scores<'a> {
    graph: Graph<'a>,
    key: Key,
}

impl Scores<'_> {
    fn score(&mut self, dtype: DataType) -> Result<Node, String> {
        let k = &self.key;
        let (d, s) = dense([k.batch, k.heads, k.queries, k.keys]);
        self.graph.between(dtype, d, s)
    }

    fn statistic(&mut self) -> Result<Node, String> {
        let k = &self.key;
        let (d, s) = dense([k.batch, k.heads, k.queries, 1]);
        self.graph.between(F32, d, s)
    }

    fn tensor(&mut self, dtype: DataType, (d, s): ([i64; 4], [i64; 4])) -> Result<Node, String> {
        self.graph.tensor(dtype, d, s)
    }

    /// mode(x, b) in f32, of x's form.
    fn apply(&mut self, mode: Mode, x: Node, b: Option<Node>) -> Result<Node, String> {
        let y = self.graph.between(F32, x.dims, x.strides)?;
        self.graph.pointwise(mode, F32, None, x, b, None, y)?;
        Ok(y)
    }

    fn index(&mut self, x: Node, axis: i64, dtype: DataType) -> Result<Node, String> {
        let y = self.score(dtype)?;
        let mode = Mode::CUDNN_POINTWISE_GEN_INDEX;
        self.graph
            .pointwise(mode, F32, Some(axis), x, None, None, y)?;
        Ok(y)
    }

    fn compare(&mut self, mode: Mode, a: Node, b: Node) -> Result<Node, String> {
        let y = self.score(BOOL)?;
        self.graph
            .pointwise(mode, BOOL, None, a, Some(b), None, y)?;
        Ok(y)
    }

    /// x where `mask`, −∞ elsewhere.
    fn keep(&mut self, x: Node, mask: Node) -> Result<Node, String> {
        let hidden = self.graph.scalar(f32::NEG_INFINITY)?;
        let y = self.score(F32)?;
        let mode = Mode::CUDNN_POINTWISE_BINARY_SELECT;
        self.graph
            .pointwise(mode, F32, None, x, Some(hidden), Some(mask), y)?;
        Ok(y)
    }

    /// Hides keys after the query and, with a window w, those at or before query − w.
    fn mask(&mut self, x: Node) -> Result<Node, String> {
        let (row, column) = (self.index(x, 2, I32)?, self.index(x, 3, I32)?);
        let causal = self.compare(Mode::CUDNN_POINTWISE_CMP_GE, row, column)?;
        let x = self.keep(x, causal)?;
        let Some(window) = self.key.window else {
            return Ok(x);
        };
        let (row, column) = (self.index(x, 2, F32)?, self.index(x, 3, F32)?);
        let length = self.graph.scalar(window as f32)?;
        let reach = self.score(F32)?;
        let mode = Mode::CUDNN_POINTWISE_ADD;
        self.graph
            .pointwise(mode, F32, Some(3), column, Some(length), None, reach)?;
        let near = self.compare(Mode::CUDNN_POINTWISE_CMP_GT, reach, row)?;
        self.keep(x, near)
    }

    /// scale · q kᵀ.
    fn scaled(&mut self, q: Node, k: Node, scale: Node) -> Result<Node, String> {
        let product = self.score(F32)?;
        self.graph.matmul(q, k, product)?;
        self.apply(Mode::CUDNN_POINTWISE_MUL, product, Some(scale))
    }
}

/// Bound: q, k, v, output, log-sum-exp.
fn forward_plan(graph: Graph, key: &Key) -> Result<Plan, String> {
    let k = *key;
    let mut g = Scores { graph, key: k };
    let q = g.tensor(BF16, rows(k.batch, k.heads, k.queries, k.size))?;
    let kt = g.tensor(BF16, transposed(rows(k.batch, k.groups, k.keys, k.size)))?;
    let v = g.tensor(BF16, rows(k.batch, k.groups, k.keys, k.size))?;
    let output = g.tensor(BF16, rows(k.batch, k.heads, k.queries, k.size))?;
    let sums = g.tensor(F32, dense([k.batch, k.heads, k.queries, 1]))?;
    let scale = g.graph.scalar(f32::from_bits(k.scale))?;
    let scores = g.scaled(q, kt, scale)?;
    let scores = g.mask(scores)?;
    let top = g.statistic()?;
    g.graph
        .reduce(Reduce::CUDNN_REDUCE_TENSOR_MAX, scores, top)?;
    let shifted = g.apply(Mode::CUDNN_POINTWISE_SUB, scores, Some(top))?;
    let weights = g.apply(Mode::CUDNN_POINTWISE_EXP, shifted, None)?;
    let total = g.statistic()?;
    g.graph
        .reduce(Reduce::CUDNN_REDUCE_TENSOR_ADD, weights, total)?;
    let log = g.apply(Mode::CUDNN_POINTWISE_LOG, total, None)?;
    let add = Mode::CUDNN_POINTWISE_ADD;
    g.graph
        .pointwise(add, F32, None, top, Some(log), None, sums)?;
    let share = g.score(BF16)?;
    let divide = Mode::CUDNN_POINTWISE_DIV;
    g.graph
        .pointwise(divide, F32, None, weights, Some(total), None, share)?;
    g.graph.matmul(share, v, output)?;
    g.graph.plan(&[q, kt, v, output, sums])
}

/// Bound: q, k, v, output, log-sum-exp, dy, dq, dk, dv, δ `[B, H, N]` f32, dq in f32 `[B, H, N, E]`.
fn backward_plan(graph: Graph, key: &Key) -> Result<Plan, String> {
    let k = *key;
    let mut g = Scores { graph, key: k };
    let by_query = rows(k.batch, k.heads, k.queries, k.size);
    let by_key = rows(k.batch, k.groups, k.keys, k.size);
    let [q, y, dy, dq] = [(); 4].map(|()| g.tensor(BF16, by_query));
    let (q, y, dy, dq) = (q?, y?, dy?, dq?);
    let (kt, vt) = (
        g.tensor(BF16, transposed(by_key))?,
        g.tensor(BF16, transposed(by_key))?,
    );
    let (dk, dv) = (g.tensor(BF16, by_key)?, g.tensor(BF16, by_key)?);
    let sums = g.tensor(F32, dense([k.batch, k.heads, k.queries, 1]))?;
    let delta = g.tensor(F32, dense([k.batch, k.heads, k.queries, 1]))?;
    let dq_sum = g.tensor(F32, dense([k.batch, k.heads, k.queries, k.size]))?;
    let scale = g.graph.scalar(f32::from_bits(k.scale))?;
    let one = g.graph.scalar(1.0)?;
    let mul = Mode::CUDNN_POINTWISE_MUL;

    // δ = Σ_e dy y
    let d = by_query.0;
    let along = [d[1] * d[2] * d[3], d[2] * d[3], d[1] * d[3], 1];
    let product = g.graph.between(F32, d, along)?;
    g.graph
        .pointwise(mul, F32, None, dy, Some(y), None, product)?;
    let sum = g.statistic()?;
    g.graph
        .reduce(Reduce::CUDNN_REDUCE_TENSOR_ADD, product, sum)?;
    g.graph
        .pointwise(mul, F32, None, sum, Some(one), None, delta)?;

    // P = exp(scale q kᵀ − lse), masked
    let scores = g.scaled(q, kt, scale)?;
    let scores = g.apply(Mode::CUDNN_POINTWISE_SUB, scores, Some(sums))?;
    let scores = g.mask(scores)?;
    let weights = g.apply(Mode::CUDNN_POINTWISE_EXP, scores, None)?;

    // dv = Pᵀ dy
    let turned = |g: &mut Scores, x: Node| -> Result<Node, String> {
        let (n, s) = (k.queries, k.keys);
        let strides = [k.heads * n * s, n * s, 1, s];
        let t = g.graph.between(BF16, [k.batch, k.heads, s, n], strides)?;
        g.graph.reshape(x, t)?;
        Ok(t)
    };
    // Where query heads share a key-value head, their parts are summed in a second step.
    let into_groups = |g: &mut Scores, a: Node, b: Node, out: Node| -> Result<(), String> {
        if k.heads == k.groups {
            return g.graph.matmul(a, b, out);
        }
        let (d, s) = dense([k.batch, k.heads, k.keys, k.size]);
        let parts = g.graph.between(BF16, d, s)?;
        g.graph.matmul(a, b, parts)?;
        g.graph.reduce(Reduce::CUDNN_REDUCE_TENSOR_ADD, parts, out)
    };
    let pt = turned(&mut g, weights)?;
    into_groups(&mut g, pt, dy, dv)?;

    // dS = scale P ∘ (dy vᵀ − δ)
    let dp = g.score(F32)?;
    g.graph.matmul(dy, vt, dp)?;
    let ds = g.apply(Mode::CUDNN_POINTWISE_SUB, dp, Some(delta))?;
    let ds = g.apply(mul, ds, Some(weights))?;
    let ds = g.apply(mul, ds, Some(scale))?;

    // dk = dSᵀ q, dq = dS k
    let dst = turned(&mut g, ds)?;
    into_groups(&mut g, dst, q, dk)?;
    let (d, s) = by_key;
    let keys = g.graph.between(F32, d, s)?;
    g.graph.reshape(kt, keys)?;
    g.graph.matmul(ds, keys, dq_sum)?;
    let identity = Mode::CUDNN_POINTWISE_IDENTITY;
    g.graph
        .pointwise(identity, F32, None, dq_sum, None, None, dq)?;
    g.graph
        .plan(&[q, kt, vt, y, sums, dy, dq, dk, dv, delta, dq_sum])
}

/// The plan's key, if cuDNN has a form for these tensors.
fn key(q: &Buffer, k: &Buffer, v: &Buffer, spec: &AttentionSpec, backward: bool) -> Option<Key> {
    let (dq, dk) = (q.dims(), k.dims());
    let bf16 = [q, k, v].iter().all(|b| b.dtype() == DType::BF16);
    let whole = spec.packing.as_ref().is_none_or(|p| p.is_whole_rows());
    let size = dq[3];
    if !bf16
        || !whole
        || spec.query_offset != 0
        || !size.is_multiple_of(8)
        || size > 128
        || dq[1] < 2
    {
        return None;
    }
    let window = spec.window.filter(|&w| w < dq[1]);
    Some(Key {
        batch: dq[0] as i64,
        queries: dq[1] as i64,
        keys: dk[1] as i64,
        heads: dq[2] as i64,
        groups: dk[2] as i64,
        size: size as i64,
        window: window.map(|w| w as i64),
        scale: (spec.scale as f32).to_bits(),
        backward,
    })
}

/// Output `[B, N, H, E]` and log-sum-exp `[B, H, N]` f32.
pub fn forward(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    spec: &AttentionSpec,
) -> Option<(Tensor<4>, Tensor<3>)> {
    let (q, k, v) = (Buffer::of(q)?, Buffer::of(k)?, Buffer::of(v)?);
    let key = key(&q, &k, &v, spec, false)?;
    let d = q.dims();
    let output = q.empty([d[0], d[1], d[2], d[3]], DType::BF16);
    let sums = q.empty([d[0], d[2], d[1]], DType::F32);
    on_stream(&[&q, &k, &v], &[&output, &sums], |cx, from, to| {
        let addresses = [from[0], from[1], from[2], to[0], to[1]];
        cx.attentions.run(key, cx.stream, &addresses)
    });
    Some((output.tensor(), sums.tensor()))
}

/// dq, dk, dv.
pub fn backward(
    [q, k, v]: [&Tensor<4>; 3],
    output: &Tensor<4>,
    log_sum_exp: &Tensor<3>,
    dy: &Tensor<4>,
    spec: &AttentionSpec,
) -> Option<[Tensor<4>; 3]> {
    let (q, k, v) = (Buffer::of(q)?, Buffer::of(k)?, Buffer::of(v)?);
    let key = key(&q, &k, &v, spec, true)?;
    let (output, sums, dy) = (
        Buffer::of(output)?,
        Buffer::of(log_sum_exp)?,
        Buffer::of(dy)?,
    );
    if dy.dtype() != DType::BF16 || sums.dtype() != DType::F32 {
        return None;
    }
    let (d, s) = (q.dims(), k.dims());
    let dq = q.empty([d[0], d[1], d[2], d[3]], DType::BF16);
    let [dk, dv] = [(); 2].map(|()| q.empty([s[0], s[1], s[2], s[3]], DType::BF16));
    let delta = q.empty([d[0], d[2], d[1]], DType::F32);
    let dq_sum = q.empty([d[0], d[2], d[1], d[3]], DType::F32);
    let reads = [&q, &k, &v, &output, &sums, &dy];
    on_stream(&reads, &[&dq, &dk, &dv, &delta, &dq_sum], |cx, from, to| {
        let addresses: Vec<u64> = from.iter().chain(to).copied().collect();
        cx.attentions.run(key, cx.stream, &addresses)
    });
    Some([dq.tensor(), dk.tensor(), dv.tensor()])
}
