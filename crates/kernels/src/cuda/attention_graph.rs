//! The graphs that cuDNN recognises as attention: causal, with a left bound, with grouped heads, and
//! for documents of different lengths laid end to end.
//!
//! They are built as its own frontend builds them. Shapes in a graph are `[B, H, N, E]` with the
//! strides of our `[B, N, H, E]`; B counts documents where rows are packed.

use super::cudnn::{DataType, Extents, Graph, Mode, Node, Reduce};
use super::cudnn_plan::Plan;
use crate::work::Work;

const F32: DataType = DataType::CUDNN_DATA_FLOAT;
const BF16: DataType = DataType::CUDNN_DATA_BFLOAT16;
const I32: DataType = DataType::CUDNN_DATA_INT32;
const BOOL: DataType = DataType::CUDNN_DATA_BOOLEAN;

/// What a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Rows, or places for documents.
    pub batch: i64,
    /// Queries of a row, or of the longest document.
    pub queries: i64,
    /// The same of keys.
    pub keys: i64,
    /// H
    pub heads: i64,
    /// G
    pub groups: i64,
    /// E
    pub size: i64,
    /// Elements between neighbouring tokens of q: H·E, or more where they share rows with k and v.
    pub query_row: i64,
    /// The same of dq.
    pub dq_row: i64,
    /// The same of k, v, dk and dv.
    pub key_row: i64,
    /// Keys that a query sees, itself among them; `None`: all earlier ones. Where queries are `behind`,
    /// query i sees keys from i + 1 − window on.
    pub window: Option<i64>,
    /// Queries stand behind all keys, so that none of these comes too late for them.
    pub behind: bool,
    /// Bits of the f32 factor on the scores.
    pub scale: u32,
    /// Whether batch entries are documents with lengths and offsets of their own.
    pub packed: bool,
    /// Which pass.
    pub backward: bool,
}

impl Key {
    /// For a profile. What documents of unknown lengths take is not known.
    fn described(&self) -> (String, Option<Work>) {
        let pass = if self.backward { "backward" } else { "forward" };
        let place = if self.behind { " behind" } else { "" };
        let Self {
            batch,
            queries,
            heads,
            groups,
            size,
            ..
        } = *self;
        let window = match self.window {
            Some(window) if !self.behind => format!(" window {window}"),
            _ => String::new(),
        };
        let rows = if self.packed {
            "documents of at most "
        } else {
            ""
        };
        let name = format!(
            "attention{place} {pass} {batch}x{rows}{queries} {heads}/{groups}x{size}{window}"
        );
        let per_pair = 4.0 * size as f64 * if self.backward { 2.5 } else { 1.0 };
        let flops = self.pairs().map(|pairs| Work::Flops(pairs * per_pair));
        (name, flops)
    }

    /// Pairs of a query and a key that it sees, in all rows and heads; `None` for documents.
    pub fn pairs(&self) -> Option<f64> {
        let n = self.queries as f64;
        let w = self.window.map_or(n, |window| window as f64);
        let seen = match self.behind {
            // All but those that the window hides: none of the first w queries, one more of each next.
            true => n * self.keys as f64 - (n - w).max(0.0) * (n - w + 1.0) / 2.0,
            false => w * n - w * (w - 1.0) / 2.0,
        };
        let known = !self.packed && (self.behind || self.queries == self.keys);
        known.then_some((self.batch * self.heads) as f64 * seen)
    }
}

/// Elements before each document in the tensors of a packed batch, and its length: `[B + 1]`, `[B]`.
#[derive(Clone, Copy)]
struct Documents {
    queries: Node,
    keys: Node,
    outputs: Node,
    statistics: Node,
    length: Node,
}

/// `[B, heads, tokens, E]` of rows `row` elements apart.
fn rows(batch: i64, heads: i64, tokens: i64, size: i64, row: i64) -> ([i64; 4], [i64; 4]) {
    ([batch, heads, tokens, size], [tokens * row, size, row, 1])
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
    documents: Option<Documents>,
}

impl<'a> Scores<'a> {
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

    fn new(graph: Graph<'a>, key: Key) -> Result<Self, String> {
        let mut this = Self {
            graph,
            key,
            documents: None,
        };
        if key.packed {
            let ints = |g: &mut Graph, n| g.tensor(I32, [n, 1, 1, 1], [1; 4]);
            this.documents = Some(Documents {
                queries: ints(&mut this.graph, key.batch + 1)?,
                keys: ints(&mut this.graph, key.batch + 1)?,
                outputs: ints(&mut this.graph, key.batch + 1)?,
                statistics: ints(&mut this.graph, key.batch + 1)?,
                length: ints(&mut this.graph, key.batch)?,
            });
        }
        Ok(this)
    }

    /// `bound`, then the documents' offsets and lengths.
    fn plan(self, bound: &[Node]) -> Result<Plan, String> {
        let mut all = bound.to_vec();
        if let Some(d) = self.documents {
            all.extend([d.queries, d.keys, d.outputs, d.statistics, d.length]);
        }
        let (name, work) = self.key.described();
        Ok(self.graph.plan(&all)?.named(name, work))
    }

    fn tensor(
        &mut self,
        dtype: DataType,
        (d, s): ([i64; 4], [i64; 4]),
        offsets: fn(Documents) -> Node,
    ) -> Result<Node, String> {
        match self.documents {
            None => self.graph.tensor(dtype, d, s),
            Some(documents) => self.graph.ragged(dtype, d, s, offsets(documents)),
        }
    }

    /// One number per query: dense `[B, H, N]`, or `[tokens, H]` in a packed batch.
    fn per_query(&mut self) -> Result<Node, String> {
        let k = self.key;
        let (d, mut s) = dense([k.batch, k.heads, k.queries, 1]);
        if k.packed {
            s = [k.queries * k.heads, 1, k.heads, 1];
        }
        self.tensor(F32, (d, s), |d| d.statistics)
    }

    /// Lengths of rows, columns and inner dimension, where they are the tokens of a document.
    fn extents(&self, m: bool, n: bool, k: bool) -> Extents {
        let length = self.documents.map(|d| d.length);
        Extents {
            m: length.filter(|_| m),
            n: length.filter(|_| n),
            k: length.filter(|_| k),
        }
    }

    /// Hides what lies past the document's end.
    fn pad(&mut self, x: Node) -> Result<Node, String> {
        let Some(documents) = self.documents else {
            return Ok(x);
        };
        let less = Mode::CUDNN_POINTWISE_CMP_LT;
        let (row, column) = (self.integer_index(x, 2)?, self.integer_index(x, 3)?);
        let row = self.compare(less, row, documents.length)?;
        let column = self.compare(less, column, documents.length)?;
        let both = self.compare(Mode::CUDNN_POINTWISE_LOGICAL_AND, row, column)?;
        self.keep(x, both)
    }

    /// Room for k seen as `[B, G, S, E]`.
    fn reshaped_keys(&mut self, d: [i64; 4], s: [i64; 4]) -> Result<Node, String> {
        match self.documents {
            None => self.graph.between(F32, d, s),
            Some(documents) => self.graph.between_ragged(F32, d, s, documents.keys),
        }
    }

    fn integer_index(&mut self, x: Node, axis: i64) -> Result<Node, String> {
        let y = self.score(I32)?;
        let mode = Mode::CUDNN_POINTWISE_GEN_INDEX;
        self.graph
            .pointwise(mode, I32, Some(axis), x, None, None, y)?;
        Ok(y)
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

    /// Hides keys after the query, unless it stands behind all, and, with a window w, those at or before
    /// query − w.
    fn mask(&mut self, mut x: Node) -> Result<Node, String> {
        if !self.key.behind {
            let (row, column) = (self.index(x, 2, I32)?, self.index(x, 3, I32)?);
            let causal = self.compare(Mode::CUDNN_POINTWISE_CMP_GE, row, column)?;
            x = self.keep(x, causal)?;
        }
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
        let extents = self.extents(true, true, false);
        self.graph.matmul(q, k, product, extents)?;
        self.apply(Mode::CUDNN_POINTWISE_MUL, product, Some(scale))
    }
}

/// Bound: q, k, v, output, log-sum-exp, and the documents' offsets of queries, keys, outputs,
/// statistics, and their lengths.
pub fn forward_plan(graph: Graph, key: &Key) -> Result<Plan, String> {
    let k = *key;
    let mut g = Scores::new(graph, k)?;
    let (of_queries, of_keys) = (|d: Documents| d.queries, |d: Documents| d.keys);
    let of_outputs = |d: Documents| d.outputs;
    let by_query = rows(k.batch, k.heads, k.queries, k.size, k.query_row);
    let by_key = rows(k.batch, k.groups, k.keys, k.size, k.key_row);
    let by_output = rows(k.batch, k.heads, k.queries, k.size, k.heads * k.size);
    let q = g.tensor(BF16, by_query, of_queries)?;
    let kt = g.tensor(BF16, transposed(by_key), of_keys)?;
    let v = g.tensor(BF16, by_key, of_keys)?;
    let output = g.tensor(BF16, by_output, of_outputs)?;
    let sums = g.per_query()?;
    let scale = g.graph.scalar(f32::from_bits(k.scale))?;
    let scores = g.scaled(q, kt, scale)?;
    let scores = g.pad(scores)?;
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
    let extents = g.extents(true, false, true);
    g.graph.matmul(share, v, output, extents)?;
    g.plan(&[q, kt, v, output, sums])
}

/// Bound: q, k, v, output, log-sum-exp, dy, dq, dk, dv, δ (like the log-sum-exp), dq in f32, then, in a
/// packed batch with grouped heads, dv and dk of each query head, then the documents as above.
pub fn backward_plan(graph: Graph, key: &Key) -> Result<Plan, String> {
    let k = *key;
    let mut g = Scores::new(graph, k)?;
    let by_query = rows(k.batch, k.heads, k.queries, k.size, k.query_row);
    let by_key = rows(k.batch, k.groups, k.keys, k.size, k.key_row);
    let by_output = rows(k.batch, k.heads, k.queries, k.size, k.heads * k.size);
    let (of_queries, of_keys) = (|d: Documents| d.queries, |d: Documents| d.keys);
    let of_outputs = |d: Documents| d.outputs;
    let by_dq = rows(k.batch, k.heads, k.queries, k.size, k.dq_row);
    let [q, dq] = [by_query, by_dq].map(|by_token| g.tensor(BF16, by_token, of_queries));
    let [y, dy] = [(); 2].map(|()| g.tensor(BF16, by_output, of_outputs));
    let (q, y, dy, dq) = (q?, y?, dy?, dq?);
    let [kt, vt] = [(); 2].map(|()| g.tensor(BF16, transposed(by_key), of_keys));
    let (kt, vt) = (kt?, vt?);
    let [dk, dv] = [(); 2].map(|()| g.tensor(BF16, by_key, of_keys));
    let (dk, dv) = (dk?, dv?);
    let sums = g.per_query()?;
    let delta = g.per_query()?;
    let sum_form = match k.packed {
        true => by_output,
        false => dense([k.batch, k.heads, k.queries, k.size]),
    };
    let dq_sum = g.tensor(F32, sum_form, of_outputs)?;
    let scale = g.graph.scalar(f32::from_bits(k.scale))?;
    let one = g.graph.scalar(1.0)?;
    let mul = Mode::CUDNN_POINTWISE_MUL;

    // δ = Σ_e dy y
    let d = by_output.0;
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
    let scores = g.pad(scores)?;
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
    let mut parts = vec![];
    let mut into_groups = |g: &mut Scores, a: Node, b: Node, out: Node| -> Result<(), String> {
        let extents = g.extents(true, false, true);
        if k.heads == k.groups {
            return g.graph.matmul(a, b, out, extents);
        }
        let each = if k.packed {
            let each = rows(k.batch, k.heads, k.keys, k.size, k.heads * k.size);
            let node = g.tensor(BF16, each, of_outputs)?;
            parts.push(node);
            node
        } else {
            let (d, s) = dense([k.batch, k.heads, k.keys, k.size]);
            g.graph.between(BF16, d, s)?
        };
        g.graph.matmul(a, b, each, extents)?;
        g.graph.reduce(Reduce::CUDNN_REDUCE_TENSOR_ADD, each, out)
    };
    let pt = turned(&mut g, weights)?;
    into_groups(&mut g, pt, dy, dv)?;

    // dS = scale P ∘ (dy vᵀ − δ)
    let dp = g.score(F32)?;
    let extents = g.extents(true, true, false);
    g.graph.matmul(dy, vt, dp, extents)?;
    let ds = g.apply(Mode::CUDNN_POINTWISE_SUB, dp, Some(delta))?;
    let ds = g.apply(mul, ds, Some(weights))?;
    let ds = g.apply(mul, ds, Some(scale))?;

    // dk = dSᵀ q, dq = dS k
    let dst = turned(&mut g, ds)?;
    into_groups(&mut g, dst, q, dk)?;
    let (d, s) = by_key;
    // cuDNN follows the offsets of k through the reshape.
    let keys = g.reshaped_keys(d, s)?;
    g.graph.reshape(kt, keys)?;
    let extents = g.extents(true, false, true);
    g.graph.matmul(ds, keys, dq_sum, extents)?;
    let identity = Mode::CUDNN_POINTWISE_IDENTITY;
    g.graph
        .pointwise(identity, F32, None, dq_sum, None, None, dq)?;
    let mut bound = vec![q, kt, vt, y, sums, dy, dq, dk, dv, delta, dq_sum];
    // In the order in which they were made: dv's, then dk's.
    bound.extend(parts);
    g.plan(&bound)
}
