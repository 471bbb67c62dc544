//! Causal and windowed attention of whole rows or packed documents, through cuDNN's fused kernels.
//!
//! Plans depend on sizes. Packed batches therefore take the next power of two of the number of
//! documents and of the longest one, so that a run meets few plans; what a document lacks is skipped.

use std::collections::HashMap;

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::attention_dq;
use super::attention_graph::{Key, backward_plan, forward_plan};
use super::cudnn::{Graph, Library, bands_are_right};
use super::cudnn_plan::Plan;
use super::scratch;
use super::stream::{Buffer, Context, on_stream};
use crate::deterministic;
use crate::ops::attention::AttentionSpec;
use crate::ops::attention::merge::LogSumExp;
use crate::packing::Packing;

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
            let (at, bytes) = std::mem::take(&mut self.workspace);
            if at != 0 {
                scratch::release(at, bytes, stream)?;
            }
            let at = scratch::allocate(plan.workspace, "cuDNN")?;
            self.workspace = (at, plan.workspace);
        }
        plan.run(library, stream, addresses, self.workspace.0)
    }
}

/// The extents of one attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extents {
    /// B
    pub batch: usize,
    /// N
    pub tokens: usize,
    /// S
    pub keys: usize,
    /// H
    pub heads: usize,
    /// G
    pub groups: usize,
    /// E
    pub size: usize,
    /// Elements between neighbouring tokens of q.
    pub query_row: usize,
    /// The same of dq.
    pub dq_row: usize,
    /// The same of k, v, dk and dv.
    pub key_row: usize,
}

impl Extents {
    /// Of queries whose tokens are `query_row` elements apart, and all else dense.
    fn of(q: &Buffer, query_row: usize, k: &Buffer) -> Self {
        let (q, k) = (q.dims(), k.dims());
        Self {
            batch: q[0],
            tokens: q[1],
            keys: k[1],
            heads: q[2],
            groups: k[2],
            size: q[3],
            query_row,
            dq_row: q[2] * q[3],
            key_row: k[2] * k[3],
        }
    }
}

/// One attention as cuDNN does it: which plan, and the documents of packed rows.
#[derive(Clone, Debug)]
pub(super) struct Call {
    key: Key,
    extents: Extents,
    /// Offsets and lengths, to be among what the work on the stream reads.
    pub documents: Option<Buffer>,
}

impl Call {
    /// `None` if cuDNN has no form for it. `like` says on which device.
    pub fn new(e: &Extents, spec: &AttentionSpec, like: &Buffer, backward: bool) -> Option<Self> {
        let fits = e.size.is_multiple_of(8) && e.size <= 128 && e.tokens > 1;
        let offset = spec.query_offset;
        let behind = offset > 0 && e.tokens <= e.keys && spec.is_behind(e.tokens, e.keys);
        if !fits || offset > 0 && !(behind && bands_are_right()) {
            return None;
        }
        // From which key on, counted from the query's number among the queries.
        let window = match spec.window {
            Some(window) => Some(window.checked_sub(offset).filter(|&w| w > 0)?),
            None if behind => return None,
            None => None,
        };
        let mut key = Key {
            batch: e.batch as i64,
            queries: e.tokens as i64,
            keys: e.keys as i64,
            heads: e.heads as i64,
            groups: e.groups as i64,
            size: e.size as i64,
            query_row: e.query_row as i64,
            dq_row: e.dq_row as i64,
            key_row: e.key_row as i64,
            window: None,
            behind,
            scale: (spec.scale as f32).to_bits(),
            packed: false,
            backward,
        };
        let packing = spec.packing.as_ref().filter(|p| !p.is_whole_rows());
        let documents = match packing {
            None => None,
            Some(packing) => Some(documents(e, like, packing, &mut key)?),
        };
        let window = window.map(|w| w as i64);
        key.window = window.filter(|&w| w < key.queries);
        Some(Self {
            key,
            extents: *e,
            documents,
        })
    }

    /// Extents of the log-sum-exp.
    pub fn statistics(&self) -> [usize; 3] {
        let e = &self.extents;
        match self.key.packed {
            true => [e.batch, e.tokens, e.heads],
            false => [e.batch, e.heads, e.tokens],
        }
    }

    /// [`Call::statistics`], filled.
    pub fn log_sum_exp(&self, sums: Buffer) -> LogSumExp {
        LogSumExp {
            values: sums.tensor(),
            by_token: self.key.packed,
        }
    }

    /// What the backward pass needs beside its results: δ, dq in f32, and, in a packed batch with
    /// grouped heads, dv and dk of each query head before they are summed over the group.
    pub fn scratch(&self, like: &Buffer) -> Vec<Buffer> {
        let e = &self.extents;
        let each = self.key.packed && e.heads != e.groups;
        let mut all = vec![
            like.empty([e.batch, e.heads, e.tokens], DType::F32),
            like.empty([e.batch, e.heads, e.tokens, e.size], DType::F32),
        ];
        for _ in 0..if each { 2 } else { 0 } {
            all.push(like.empty([e.batch, e.tokens, e.heads, e.size], DType::BF16));
        }
        all
    }

    /// Runs the plan on `addresses`, the tensors that the graph binds; `documents`: the address of
    /// [`Call::documents`].
    pub fn run(
        &self,
        cx: &mut Context,
        mut addresses: Vec<u64>,
        documents: Option<u64>,
    ) -> Result<(), String> {
        let parts = documents.map(|at| parts(at, self.key.batch));
        addresses.extend(parts.iter().flatten());
        cx.attentions.run(self.key, cx.stream, &addresses)?;
        if !self.key.backward || !deterministic::is_on() {
            return Ok(());
        }
        let &[q, k, v, _, lse, dy, dq, _, _, delta, ..] = addresses.as_slice() else {
            return Err("attention: too few addresses for a backward pass".into());
        };
        let inputs = attention_dq::Inputs {
            q,
            k,
            v,
            dy,
            lse,
            delta,
            documents: parts.map(|parts| (parts[3], self.key.batch)),
        };
        attention_dq::launch(cx, dq, &inputs, &self.extents, &self.key)
    }
}

/// Offsets of queries, keys, outputs and statistics and the lengths of the documents, one after
/// another with each part padded to 16 bytes; sets the key's sizes.
fn documents(e: &Extents, like: &Buffer, packing: &Packing, key: &mut Key) -> Option<Buffer> {
    let tokens = e.tokens;
    if e.keys != tokens || packing.length() != tokens {
        return None;
    }
    let mut starts = vec![];
    for (row, firsts) in packing.rows().iter().enumerate() {
        starts.extend(firsts.iter().map(|first| row * tokens + first));
    }
    let total = packing.rows().len() * tokens;
    let places = starts.len().next_power_of_two();
    let ends = starts.iter().skip(1).chain([&total]);
    let mut lengths: Vec<usize> = ends.zip(&starts).map(|(end, start)| end - start).collect();
    let longest = lengths
        .iter()
        .max()?
        .next_power_of_two()
        .clamp(128, tokens.max(128));
    // Offsets are counted in elements, in 32 bits.
    if total * e.query_row.max(e.key_row) > i32::MAX as usize {
        return None;
    }
    starts.resize(places + 1, total);
    lengths.resize(places, 0);
    (key.batch, key.packed) = (places as i64, true);
    (key.queries, key.keys) = (longest as i64, longest as i64);
    let part = section(places);
    let mut all = vec![0i32; PARTS * part];
    let per_token = [e.query_row, e.key_row, e.heads * e.size, e.heads];
    for (section, elements) in all.chunks_mut(part).zip(per_token) {
        for (offset, start) in section.iter_mut().zip(&starts) {
            *offset = (start * elements) as i32;
        }
    }
    for (place, &length) in all[(PARTS - 1) * part..].iter_mut().zip(&lengths) {
        *place = length as i32;
    }
    let device = like.device();
    let count = all.len();
    let ints = Tensor::<1, Int>::from_data(TensorData::new(all, [count]), (&device, DType::I32));
    Buffer::of_ints(&ints)
}

/// Parts of [`documents`].
const PARTS: usize = 5;

/// Integers of one part of [`documents`].
fn section(places: usize) -> usize {
    (places + 1).next_multiple_of(4)
}

/// The addresses of the parts.
fn parts(at: u64, places: i64) -> [u64; PARTS] {
    let bytes = section(places as usize) as u64 * 4;
    std::array::from_fn(|i| at + i as u64 * bytes)
}

/// Whether queries on a GPU that stand behind all keys need another form than cuDNN's: the one that is loaded
/// is wrong there, or refuses.
pub fn lacks_bands(q: &Tensor<4>) -> bool {
    Buffer::strided(q).is_some() && !bands_are_right()
}

/// Queries that stand behind the first key, as if there were one for each key: the first
/// `query_offset` of them are zeros, whose results are dropped and whose gradients are zero, so that
/// they give nothing to keys and values. `None` where that would be most of the work, and for the few
/// queries of a decoding step, each of whose lengths would need a plan of its own.
fn padded(q: &Tensor<4>, k: &Tensor<4>, spec: &AttentionSpec) -> Option<AttentionSpec> {
    let (queries, keys) = (q.dims()[1], k.dims()[1]);
    let fits = spec.query_offset + queries == keys;
    (fits && queries >= LEAST_QUERIES && keys <= MOST_PADDING * queries).then(|| AttentionSpec {
        query_offset: 0,
        ..spec.clone()
    })
}

/// Queries that are worth a plan of their own.
const LEAST_QUERIES: usize = 64;

/// Keys per query up to which zeros stand for the missing queries.
const MOST_PADDING: usize = 8;

/// x behind `count` tokens of zeros: `[B, N, H, E]`.
fn behind_zeros(x: &Tensor<4>, count: usize) -> Tensor<4> {
    let [batch, _, heads, size] = x.dims();
    let zeros = Tensor::zeros([batch, count, heads, size], (&x.device(), x.dtype()));
    Tensor::cat(vec![zeros, x.clone()], 1)
}

/// x without its first `count` tokens: `[B, N, H, E]`.
fn without(x: Tensor<4>, count: usize) -> Tensor<4> {
    let [batch, tokens, _, _] = x.dims();
    x.slice([0..batch, count..tokens])
}

/// Output `[B, N, H, E]` and log-sum-exp, f32: by token where rows are packed, with the queries that were
/// filled in.
pub fn forward(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    spec: &AttentionSpec,
) -> Option<(Tensor<4>, LogSumExp)> {
    let offset = spec.query_offset;
    if offset > 0 && offset < k.dims()[1] {
        let spec = padded(q, k, spec)?;
        let (output, sums) = forward(&behind_zeros(q, offset), k, v, &spec)?;
        return Some((without(output, offset), sums));
    }
    let ((q, k, v), e) = bf16(q, k, v)?;
    let call = Call::new(&e, spec, &q, false)?;
    let output = q.empty([e.batch, e.tokens, e.heads, e.size], DType::BF16);
    let sums = q.empty(call.statistics(), DType::F32);
    let mut reads = vec![&q, &k, &v];
    reads.extend(&call.documents);
    on_stream(&reads, &[&output, &sums], |cx, from, to| {
        let addresses = vec![from[0], from[1], from[2], to[0], to[1]];
        call.run(cx, addresses, from.get(3).copied())
    });
    Some((output.tensor(), call.log_sum_exp(sums)))
}

/// Queries as they lie if their tokens are as far apart as they may be, keys and values with rows in order.
fn bf16(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
) -> Option<((Buffer, Buffer, Buffer), Extents)> {
    let (q, row) = by_token(q)?;
    let (k, v) = (Buffer::of(k)?, Buffer::of(v)?);
    let fits = [&q, &k, &v].iter().all(|b| b.dtype() == DType::BF16);
    let e = Extents::of(&q, row, &k);
    fits.then_some(((q, k, v), e))
}

/// `x` `[B, N, H, E]` and the elements between its tokens; copied unless it lies as one part of longer tokens.
fn by_token(x: &Tensor<4>) -> Option<(Buffer, usize)> {
    let [batch, tokens, heads, size] = x.dims();
    let lies = Buffer::strided(x)?;
    let strides = lies.strides();
    let [each, row] = [strides[0], strides[1]];
    let even = batch == 1 || each == tokens * row;
    let apart = row >= heads * size && row.is_multiple_of(8);
    match even && apart && strides[2..] == [size, 1] {
        true => Some((lies, row)),
        false => Some((Buffer::of(x)?, heads * size)),
    }
}

/// dq, dk, dv.
pub fn backward(
    [q, k, v]: [&Tensor<4>; 3],
    output: &Tensor<4>,
    log_sum_exp: &Tensor<3>,
    dy: &Tensor<4>,
    spec: &AttentionSpec,
) -> Option<[Tensor<4>; 3]> {
    let offset = spec.query_offset;
    if offset > 0 && offset < k.dims()[1] {
        let spec = padded(q, k, spec)?;
        let [q, output, dy] = [q, output, dy].map(|x| behind_zeros(x, offset));
        let [dq, dk, dv] = backward([&q, k, v], &output, log_sum_exp, &dy, &spec)?;
        return Some([without(dq, offset), dk, dv]);
    }
    let ((q, k, v), e) = bf16(q, k, v)?;
    let call = Call::new(&e, spec, &q, true)?;
    let (output, sums, dy) = (
        Buffer::of(output)?,
        Buffer::of(log_sum_exp)?,
        Buffer::of(dy)?,
    );
    if dy.dtype() != DType::BF16 || sums.dtype() != DType::F32 {
        return None;
    }
    let dq = q.empty([e.batch, e.tokens, e.heads, e.size], DType::BF16);
    let [dk, dv] = [(); 2].map(|()| q.empty([e.batch, e.keys, e.groups, e.size], DType::BF16));
    let scratch = call.scratch(&q);
    let mut reads = vec![&q, &k, &v, &output, &sums, &dy];
    reads.extend(&call.documents);
    let mut writes = vec![&dq, &dk, &dv];
    writes.extend(&scratch);
    on_stream(&reads, &writes, |cx, from, to| {
        let addresses = from[..6].iter().chain(to).copied().collect();
        call.run(cx, addresses, from.get(6).copied())
    });
    Some([dq.tensor(), dk.tensor(), dv.tensor()])
}
