//! Causal and windowed attention of whole rows or packed documents, through cuDNN's fused kernels.
//!
//! Plans depend on sizes. Packed batches therefore take the next power of two of the number of
//! documents and of the longest one, so that a run meets few plans; what a document lacks is skipped.

use std::collections::HashMap;

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::attention_graph::{Key, backward_plan, forward_plan};
use super::cudnn::{Graph, Library, Plan};
use super::scratch;
use super::stream::{Buffer, on_stream};
use crate::ops::attention::AttentionSpec;
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

/// The plan's key and, for packed rows, the documents; `None` if cuDNN has no form for the tensors.
fn key(
    q: &Buffer,
    k: &Buffer,
    v: &Buffer,
    spec: &AttentionSpec,
    backward: bool,
) -> Option<(Key, Option<Buffer>)> {
    let (dq, dk) = (q.dims(), k.dims());
    let bf16 = [q, k, v].iter().all(|b| b.dtype() == DType::BF16);
    let size = dq[3];
    if !bf16 || spec.query_offset != 0 || !size.is_multiple_of(8) || size > 128 || dq[1] < 2 {
        return None;
    }
    let mut key = Key {
        batch: dq[0] as i64,
        queries: dq[1] as i64,
        keys: dk[1] as i64,
        heads: dq[2] as i64,
        groups: dk[2] as i64,
        size: size as i64,
        window: None,
        scale: (spec.scale as f32).to_bits(),
        packed: false,
        backward,
    };
    let packing = spec.packing.as_ref().filter(|p| !p.is_whole_rows());
    let documents = match packing {
        None => None,
        Some(packing) => Some(documents(q, k, packing, &mut key)?),
    };
    let window = spec.window.map(|w| w as i64);
    key.window = window.filter(|&w| w < key.queries);
    Some((key, documents))
}

/// Offsets of queries, keys and statistics and the lengths of the documents, one after another with
/// each part padded to 16 bytes; sets the key's sizes.
fn documents(q: &Buffer, k: &Buffer, packing: &Packing, key: &mut Key) -> Option<Buffer> {
    let tokens = q.dims()[1];
    if k.dims()[1] != tokens || packing.length() != tokens {
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
    if total * (key.heads * key.size) as usize > i32::MAX as usize {
        return None;
    }
    starts.resize(places + 1, total);
    lengths.resize(places, 0);
    (key.batch, key.packed) = (places as i64, true);
    (key.queries, key.keys) = (longest as i64, longest as i64);
    let part = section(places);
    let mut all = vec![0i32; 4 * part];
    for (i, &start) in starts.iter().enumerate() {
        all[i] = (start as i64 * key.heads * key.size) as i32;
        all[part + i] = (start as i64 * key.groups * key.size) as i32;
        all[2 * part + i] = (start as i64 * key.heads) as i32;
    }
    for (i, &length) in lengths.iter().enumerate() {
        all[3 * part + i] = length as i32;
    }
    let device = q.clone().tensor::<4>().device();
    let count = all.len();
    let ints = Tensor::<1, Int>::from_data(TensorData::new(all, [count]), (&device, DType::I32));
    Buffer::of_ints(&ints)
}

/// Integers of one part of [`documents`].
fn section(places: usize) -> usize {
    (places + 1).next_multiple_of(4)
}

/// The addresses of the four parts.
fn parts(at: u64, places: i64) -> [u64; 4] {
    let bytes = section(places as usize) as u64 * 4;
    [at, at + bytes, at + 2 * bytes, at + 3 * bytes]
}

/// Output `[B, N, H, E]` and log-sum-exp, f32: `[B, H, N]`, or `[B, N, H]` where rows are packed. The
/// backward pass alone reads it.
pub fn forward(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    spec: &AttentionSpec,
) -> Option<(Tensor<4>, Tensor<3>)> {
    let (q, k, v) = (Buffer::of(q)?, Buffer::of(k)?, Buffer::of(v)?);
    let (key, documents) = key(&q, &k, &v, spec, false)?;
    let d = q.dims();
    let output = q.empty([d[0], d[1], d[2], d[3]], DType::BF16);
    let sums = match key.packed {
        true => q.empty([d[0], d[1], d[2]], DType::F32),
        false => q.empty([d[0], d[2], d[1]], DType::F32),
    };
    let mut reads = vec![&q, &k, &v];
    reads.extend(&documents);
    on_stream(&reads, &[&output, &sums], |cx, from, to| {
        let mut addresses = vec![from[0], from[1], from[2], to[0], to[1]];
        if let Some(&at) = from.get(3) {
            addresses.extend(parts(at, key.batch));
        }
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
    let (key, documents) = key(&q, &k, &v, spec, true)?;
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
    // dv and dk of each query head, before they are summed over the group.
    let each = key.packed && key.heads != key.groups;
    let by_head: Vec<Buffer> = (0..if each { 2 } else { 0 })
        .map(|_| q.empty([d[0], d[1], d[2], d[3]], DType::BF16))
        .collect();
    let mut reads = vec![&q, &k, &v, &output, &sums, &dy];
    reads.extend(&documents);
    let mut writes = vec![&dq, &dk, &dv, &delta, &dq_sum];
    writes.extend(&by_head);
    on_stream(&reads, &writes, |cx, from, to| {
        let mut addresses: Vec<u64> = from[..6].iter().chain(to).copied().collect();
        if let Some(&at) = from.get(6) {
            addresses.extend(parts(at, key.batch));
        }
        cx.attentions.run(key, cx.stream, &addresses)
    });
    Some([dq.tensor(), dk.tensor(), dv.tensor()])
}
