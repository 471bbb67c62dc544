//! The TTT scan and its chunk-local convolution.
//!
//! The scan walks the pieces of each row with the state S in f32. Only the sums are sequential; the
//! products with each piece's weight are independent, so the weights of some pieces are laid side by
//! side and multiplied in one batched GEMM, which fills the GPU where one piece would not.

use std::ops::Range;

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::gemm::Matrix;
use super::norm::sum_partials;
use super::pointwise::vectors;
use super::stream::{Arg, Buffer, Context, on_stream};
use crate::dtype::cast;
use crate::packing::{Packing, Piece, Write};

/// Bytes of piece weights held at a time.
const SLAB: usize = 128 << 20;

/// Blocks of a state's sum of squares.
const NORM_BLOCKS: usize = 256;

/// Sizes of one scan, and how its rows are cut.
#[derive(Debug)]
pub struct Shape<'a> {
    /// The pieces of each row.
    pub pieces: &'a [Vec<Piece>],
    /// η
    pub lr: f64,
}

struct Sizes {
    length: usize,
    d: usize,
    f: usize,
}

impl Sizes {
    /// Rows `range` of row `row` of a `[B, N, width]` buffer.
    fn rows(&self, at: u64, row: usize, range: &Range<usize>, width: usize) -> Matrix {
        let first = (row * self.length + range.start) * width * 2;
        Matrix::new(at + first as u64, range.len(), width, DType::BF16)
    }

    fn state(&self, at: u64) -> Matrix {
        Matrix::new(at, self.d, self.f, DType::F32)
    }

    fn weight(&self, slab: u64, slot: usize) -> Matrix {
        let first = slot * self.d * self.f * 2;
        Matrix::new(slab + first as u64, self.d, self.f, DType::BF16)
    }

    /// Weights that a slab holds; at least one.
    fn slots(&self, pieces: &[Vec<Piece>]) -> usize {
        let most = pieces.iter().map(Vec::len).max().unwrap_or(1);
        (SLAB / (self.d * self.f * 2)).clamp(1, most.max(1))
    }
}

/// out = bf16(base + factor · x) over n elements; base kind 0 none, 1 bf16, 2 f32.
fn scaled_sum(
    cx: &mut Context,
    out: u64,
    (base, kind): (u64, i32),
    x: u64,
    factor: f64,
    n: usize,
) -> Result<(), String> {
    let args = [
        Arg::Ptr(out),
        Arg::Ptr(base),
        Arg::Int(kind),
        Arg::Ptr(x),
        Arg::Float(factor as f32),
        Arg::Size(vectors(n, &[out, base, x])),
        Arg::Size(n as u64),
    ];
    cx.launch_over("scaled_sum", (n as u64).div_ceil(8), &args)
}

/// Neighbouring pieces of equal length whose weights lie in the slab from slot 0 on.
#[derive(Default)]
struct Group {
    range: Option<Range<usize>>,
    count: usize,
}

impl Group {
    /// Whether a piece of `range` can follow (`ahead`) or precede the group.
    fn takes(&self, range: &Range<usize>, slots: usize, ahead: bool) -> bool {
        match &self.range {
            None => true,
            Some(all) => {
                let length = all.len() / self.count;
                let touches = if ahead {
                    all.end == range.start
                } else {
                    all.start == range.end
                };
                self.count < slots && touches && range.len() == length
            }
        }
    }

    fn push(&mut self, range: &Range<usize>) -> usize {
        self.range = Some(match self.range.take() {
            None => range.clone(),
            Some(all) => all.start.min(range.start)..all.end.max(range.end),
        });
        self.count += 1;
        self.count - 1
    }
}

/// What the forward pass returns.
pub struct Forward {
    /// `[B, N, D]` bf16
    pub output: Tensor<3>,
    /// ‖S‖_F where a document ends, with one 0: `[k]` f32.
    pub norms: Tensor<1>,
    /// The state at the end of each row, if its last document had one.
    pub last: Vec<Option<Tensor<2>>>,
}

fn inputs(z: &Tensor<3>, v: &Tensor<3>, w0: &Tensor<2>) -> Option<([Buffer; 3], i32)> {
    let (z, v, w0) = (Buffer::of(z)?, Buffer::of(v)?, Buffer::of(w0)?);
    let kind = match w0.dtype() {
        DType::BF16 => 1,
        DType::F32 => 2,
        _ => return None,
    };
    let wide = z.dtype() == DType::BF16 && v.dtype() == DType::BF16;
    wide.then_some(([z, v, w0], kind))
}

/// z `[B, N, F]`, v `[B, N, D]`, w0 `[D, F]`.
pub fn forward(z: &Tensor<3>, v: &Tensor<3>, w0: &Tensor<2>, shape: &Shape) -> Option<Forward> {
    let rounded = Buffer::of(&cast(w0.clone(), DType::BF16))?;
    let ([z, v, w0], kind) = inputs(z, v, w0)?;
    let dims = z.dims();
    let s = Sizes {
        length: dims[1],
        d: w0.dims()[0],
        f: dims[2],
    };
    let slots = s.slots(shape.pieces);
    let output = z.empty([dims[0], s.length, s.d], DType::BF16);
    let slab = z.empty([slots, s.d, s.f], DType::BF16);
    let states: Vec<Buffer> = shape
        .pieces
        .iter()
        .map(|_| z.empty([s.d, s.f], DType::F32))
        .collect();
    let ends = shape
        .pieces
        .iter()
        .flatten()
        .filter(|p| p.reads && p.write == Write::Nothing)
        .count();
    let squares = z.empty([ends + 1], DType::F32);
    let partial = z.empty([NORM_BLOCKS], DType::F32);
    let mut writes = vec![&output, &slab, &squares, &partial];
    writes.extend(&states);
    on_stream(&[&z, &v, &w0, &rounded], &writes, |cx, from, to| {
        let (z, v, w0, rounded) = (from[0], from[1], from[2], from[3]);
        let (output, slab, squares, partial) = (to[0], to[1], to[2], to[3]);
        cx.zero(squares, 4 * (ends + 1))?;
        let mut ended = 1;
        for (row, pieces) in shape.pieces.iter().enumerate() {
            let state = to[4 + row];
            let mut group = Group::default();
            for piece in pieces {
                let range = &piece.range;
                if piece.reads {
                    if !group.takes(range, slots, true) {
                        apply_group(cx, &s, row, &mut group, z, slab, output)?;
                    }
                    let slot = s.weight(slab, group.push(range));
                    scaled_sum(cx, slot.at, (w0, kind), state, shape.lr, s.d * s.f)?;
                } else {
                    let weight = Matrix::new(rounded, s.d, s.f, DType::BF16);
                    let (a, c) = (s.rows(z, row, range, s.f), s.rows(output, row, range, s.d));
                    cx.gemm(a, weight.t(), c, 1.0, 0.0)?;
                }
                if piece.reads && piece.write == Write::Nothing {
                    let n = Arg::Size((s.d * s.f) as u64);
                    let args = [Arg::Ptr(partial), Arg::Ptr(state), n];
                    cx.launch("square_sum", (NORM_BLOCKS as u32, 1, 1), 512, &args)?;
                    sum_partials(cx, squares + 4 * ended, partial, NORM_BLOCKS, 1)?;
                    ended += 1;
                }
                if piece.write != Write::Nothing {
                    let (a, b) = (s.rows(v, row, range, s.d), s.rows(z, row, range, s.f));
                    let beta = if piece.write == Write::Add { 1.0 } else { 0.0 };
                    cx.gemm(a.t(), b, s.state(state), 1.0, beta)?;
                }
            }
            apply_group(cx, &s, row, &mut group, z, slab, output)?;
        }
        Ok(())
    });
    let last = shape.pieces.iter().zip(states).map(|(pieces, state)| {
        let reads = pieces.last().is_some_and(|piece| piece.reads);
        reads.then(|| state.tensor::<2>())
    });
    Some(Forward {
        output: output.tensor(),
        norms: squares.tensor::<1>().sqrt(),
        last: last.collect(),
    })
}

/// O = Z Wᵀ for the group's pieces, in one batched product; empties the group.
fn apply_group(
    cx: &mut Context,
    s: &Sizes,
    row: usize,
    group: &mut Group,
    z: u64,
    slab: u64,
    output: u64,
) -> Result<(), String> {
    let Some(all) = group.range.take() else {
        return Ok(());
    };
    let count = std::mem::take(&mut group.count);
    let length = all.len() / count;
    let first = all.start..all.start + length;
    let a = s.rows(z, row, &first, s.f).batched(count, length * s.f);
    let b = s.weight(slab, 0).t().batched(count, s.d * s.f);
    let c = s
        .rows(output, row, &first, s.d)
        .batched(count, length * s.d);
    cx.gemm(a, b, c, 1.0, 0.0)
}

/// Gradients of z, v (bf16) and w0 (f32), given that of the output.
pub fn backward(
    z: &Tensor<3>,
    v: &Tensor<3>,
    w0: &Tensor<2>,
    last: &mut [Option<Tensor<2>>],
    dy: &Tensor<3>,
    shape: &Shape,
) -> Option<(Tensor<3>, Tensor<3>, Tensor<2>)> {
    let ([z, v, w0], kind) = inputs(z, v, w0)?;
    let dy = Buffer::of(dy).filter(|b| b.dtype() == DType::BF16)?;
    let dims = z.dims();
    let s = Sizes {
        length: dims[1],
        d: w0.dims()[0],
        f: dims[2],
    };
    let slots = s.slots(shape.pieces);
    let dz = z.empty([dims[0], s.length, s.f], DType::BF16);
    let dv = z.empty([dims[0], s.length, s.d], DType::BF16);
    let dw0 = z.empty([s.d, s.f], DType::F32);
    let later = z.empty([s.d, s.f], DType::F32);
    let weights = z.empty([slots, s.d, s.f], DType::BF16);
    let sums = z.empty([slots, s.d, s.f], DType::BF16);
    let scratch = z.empty([s.d, s.f], DType::F32);
    // The kept state is peeled in place where nobody else holds it.
    let kept: Vec<Option<Buffer>> = last
        .iter_mut()
        .map(|state| state.take().and_then(|t| Buffer::of(&t)))
        .collect();
    let states: Vec<(Buffer, bool)> = kept
        .iter()
        .map(|state| match state {
            Some(buffer) if buffer.is_ours() => (buffer.clone(), true),
            _ => (scratch.empty([s.d, s.f], DType::F32), false),
        })
        .collect();
    let mut reads = vec![&z, &v, &w0, &dy];
    reads.extend(kept.iter().flatten());
    let mut writes = vec![&dz, &dv, &dw0, &later, &weights, &sums];
    writes.extend(states.iter().map(|(buffer, _)| buffer));
    let in_place: Vec<bool> = states.iter().map(|(_, same)| *same).collect();
    let was_kept: Vec<bool> = kept.iter().map(Option::is_some).collect();
    on_stream(&reads, &writes, |cx, from, to| {
        let (z, v, w0, dy) = (from[0], from[1], from[2], from[3]);
        let (dz, dv, dw0, later) = (to[0], to[1], to[2], to[3]);
        let slabs = (to[4], to[5], slots);
        let mut kept = from[4..].iter();
        let bytes = s.d * s.f * 4;
        for (row, pieces) in shape.pieces.iter().enumerate() {
            let state = to[6 + row];
            let mut has_state = false;
            if was_kept[row] {
                let source = *kept.next().ok_or("a kept state without an address")?;
                if !in_place[row] {
                    cx.copy(state, source, bytes)?;
                }
                has_state = true;
            }
            let mut has_later = false;
            let mut group = Group::default();
            for piece in pieces.iter().rev() {
                let range = &piece.range;
                let tz = s.rows(z, row, range, s.f);
                let tv = s.rows(v, row, range, s.d);
                let tdy = s.rows(dy, row, range, s.d);
                if piece.write == Write::Add && has_state {
                    cx.gemm(tv.t(), tz, s.state(state), -1.0, 1.0)?;
                }
                if piece.reads && !has_state {
                    // An earlier document of the row: its state was not kept, so sum it again.
                    let written = piece.document_start..range.start;
                    let (a, b) = (s.rows(v, row, &written, s.d), s.rows(z, row, &written, s.f));
                    cx.gemm(a.t(), b, s.state(state), 1.0, 0.0)?;
                    has_state = true;
                }
                let gets_later = piece.write != Write::Nothing && has_later;
                if !gets_later || !group.takes(range, slots, false) {
                    gradients_of_group(cx, &s, row, &mut group, [z, v, dy, dz, dv], slabs)?;
                }
                let slot = slots - 1 - group.push(range);
                let weight = s.weight(slabs.0, slot);
                let n = s.d * s.f;
                match piece.reads {
                    true => scaled_sum(cx, weight.at, (w0, kind), state, shape.lr, n)?,
                    // bf16(W0): the state does not count.
                    false if kind == 1 => cx.copy(weight.at, w0, 2 * n)?,
                    false => scaled_sum(cx, weight.at, (0, 0), w0, 1.0, n)?,
                }
                if gets_later {
                    let sum = s.weight(slabs.1, slot).at;
                    scaled_sum(cx, sum, (0, 0), later, shape.lr, n)?;
                } else {
                    group = Group::default();
                    cx.gemm(tdy, weight, s.rows(dz, row, range, s.f), 1.0, 0.0)?;
                    cx.zero(s.rows(dv, row, range, s.d).at, range.len() * s.d * 2)?;
                }
                if piece.reads {
                    let continues = piece.write == Write::Add && has_later;
                    let beta = if continues { 1.0 } else { 0.0 };
                    cx.gemm(tdy.t(), tz, s.state(later), 1.0, beta)?;
                    has_later = true;
                } else {
                    has_later = false;
                    has_state = false;
                }
            }
            gradients_of_group(cx, &s, row, &mut group, [z, v, dy, dz, dv], slabs)?;
        }
        let tokens = shape.pieces.len() * s.length;
        let all_dy = Matrix::new(dy, tokens, s.d, DType::BF16);
        let all_z = Matrix::new(z, tokens, s.f, DType::BF16);
        cx.gemm(all_dy.t(), all_z, s.state(dw0), 1.0, 0.0)
    });
    Some((dz.tensor(), dv.tensor(), dw0.tensor()))
}

/// dZ = dO W + V (ηG), dV = Z (ηG)ᵀ for the group's pieces, in batched products; empties the group.
/// The walk is backward, so slots are filled from the slab's end and ascend with the tokens.
fn gradients_of_group(
    cx: &mut Context,
    s: &Sizes,
    row: usize,
    group: &mut Group,
    [z, v, dy, dz, dv]: [u64; 5],
    (weights, sums, slots): (u64, u64, usize),
) -> Result<(), String> {
    let Some(all) = group.range.take() else {
        return Ok(());
    };
    let count = std::mem::take(&mut group.count);
    let length = all.len() / count;
    let first = all.start..all.start + length;
    let rows = |at, width| {
        let matrix = s.rows(at, row, &first, width);
        matrix.batched(count, length * width)
    };
    let slot = slots - count;
    let each = s.d * s.f;
    let w = s.weight(weights, slot).batched(count, each);
    let g = s.weight(sums, slot).batched(count, each);
    cx.gemm(rows(dy, s.d), w, rows(dz, s.f), 1.0, 0.0)?;
    cx.gemm(rows(v, s.d), g, rows(dz, s.f), 1.0, 1.0)?;
    cx.gemm(rows(z, s.f), g.t(), rows(dv, s.d), 1.0, 0.0)?;
    Ok(())
}

/// Tokens of one thread block of the weight gradient.
const RUN: usize = 64;

/// Tokens of a thread of the convolution; `RUN` in the source.
const CONV_RUN: usize = 32;

struct Conv {
    batch: usize,
    tokens: usize,
    d: usize,
    /// Where each token's document begins: `[B, N]`; `None` where rows are one document.
    document: Option<Buffer>,
}

fn conv(x: &Buffer, weight: &Buffer, packing: &Packing) -> Option<Conv> {
    let (dims, w) = (x.dims(), weight.dims());
    let types = x.dtype() == DType::BF16 && matches!(weight.dtype(), DType::BF16 | DType::F32);
    if !types || w[2] != 5 || !dims[2].is_multiple_of(8) {
        return None;
    }
    let document = match packing.is_whole_rows() {
        true => None,
        false => {
            let device = x.clone().tensor::<3>().device();
            let all: Vec<i32> = (0..dims[0])
                .flat_map(|row| packing.document_start(row))
                .collect();
            let data = TensorData::new(all, [dims[0], dims[1]]);
            let starts = Tensor::<2, Int>::from_data(data, (&device, DType::I32));
            Some(Buffer::of_ints(&starts)?)
        }
    };
    Some(Conv {
        batch: dims[0],
        tokens: dims[1],
        d: dims[2],
        document,
    })
}

/// The convolution (`sign` 1) or its transpose (−1): x `[B, N, D]` bf16, weight `[D, 1, 5]`.
pub fn conv_apply(
    x: &Tensor<3>,
    weight: &Tensor<3>,
    packing: &Packing,
    chunk: usize,
    sign: i32,
) -> Option<Tensor<3>> {
    let (x, weight) = (Buffer::of(x)?, Buffer::of(weight)?);
    let c = conv(&x, &weight, packing)?;
    let y = x.empty([c.batch, c.tokens, c.d], DType::BF16);
    let mut reads = vec![&x, &weight];
    reads.extend(&c.document);
    on_stream(&reads, &[&y], |cx, from, to| {
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            Arg::Int(i32::from(weight.dtype() == DType::F32)),
            Arg::Ptr(from.get(2).copied().unwrap_or(0)),
            Arg::Int(c.tokens as i32),
            Arg::Int(chunk as i32),
            Arg::Int(c.d as i32),
            Arg::Int(sign),
        ];
        let runs = c.tokens.div_ceil(CONV_RUN);
        let grid = (c.d.div_ceil(1024) as u32, runs as u32, c.batch as u32);
        cx.launch("conv_apply", grid, 128, &args)
    });
    Some(y.tensor())
}

/// The gradient of the weight, `[D, 1, 5]` f32.
pub fn conv_weight_gradient(
    x: &Tensor<3>,
    weight: &Tensor<3>,
    du: &Tensor<3>,
    packing: &Packing,
    chunk: usize,
) -> Option<Tensor<3>> {
    let (x, weight, du) = (Buffer::of(x)?, Buffer::of(weight)?, Buffer::of(du)?);
    let c = conv(&x, &weight, packing)?;
    if du.dtype() != DType::BF16 {
        return None;
    }
    let runs = c.tokens.div_ceil(RUN);
    let groups = runs * c.batch;
    let partial = x.empty([groups, c.d, 1, 5], DType::F32);
    let dw = x.empty([c.d, 1, 5], DType::F32);
    let mut reads = vec![&x, &du];
    reads.extend(&c.document);
    on_stream(&reads, &[&dw, &partial], |cx, from, to| {
        let args = [
            Arg::Ptr(to[1]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            Arg::Ptr(from.get(2).copied().unwrap_or(0)),
            Arg::Int(c.tokens as i32),
            Arg::Int(chunk as i32),
            Arg::Int(c.d as i32),
            Arg::Int(RUN as i32),
        ];
        let grid = (c.d.div_ceil(1024) as u32, runs as u32, c.batch as u32);
        cx.launch("conv_weight_grad", grid, 128, &args)?;
        sum_partials(cx, to[0], to[1], groups, c.d * 5)
    });
    Some(dw.tensor())
}
