//! The scan piece by piece, on any backend.

use std::ops::Range;

use burn::tensor::Tensor;

use super::{Exchange, Gradients, Outcome, Saved, take};
use crate::dtype::{cast, wide, widen};
use crate::packing::{Piece, Write};

/// Z (W0 + η S)ᵀ: z `[T, F]` → `[T, D]`; without a state, Z W0ᵀ. The weight is rounded to z's
/// precision once, after the sum.
pub fn apply_state(z: Tensor<2>, w0: &Tensor<2>, state: Option<&Tensor<2>>, lr: f64) -> Tensor<2> {
    let weight = effective_weight(w0, state, lr);
    z.clone().matmul(cast(weight, z.dtype()).transpose())
}

/// VᵀZ in f32, scaled down to a norm of at most `clip`: v `[T, D]`, z `[T, F]` → `[D, F]`.
pub fn outer_update(v: Tensor<2>, z: Tensor<2>, clip: Option<f64>) -> Tensor<2> {
    let delta = widen(v).transpose().matmul(widen(z));
    match clip {
        None => delta,
        Some(limit) => {
            // min(1, limit / norm); a zero update stays zero.
            let norm = frobenius(&delta).clamp_min(f64::from(f32::MIN_POSITIVE));
            let factor = norm.recip().mul_scalar(limit).clamp_max(1.0);
            delta * factor.unsqueeze::<2>()
        }
    }
}

/// aᵀ b of the tokens `range` of row `row`, f32: `[B, N, D]`, `[B, N, F]` → `[D, F]`.
fn outer(a: &Tensor<3>, b: &Tensor<3>, row: usize, range: Range<usize>) -> Tensor<2> {
    outer_update(take(a, row, range.clone()), take(b, row, range), None)
}

/// What the document that is open at the end of row `row` has written in these pieces of it.
pub(super) fn written(
    [z, v]: [&Tensor<3>; 2],
    row: usize,
    clip: Option<f64>,
    pieces: &[Piece],
) -> Tensor<2> {
    let begin = pieces.last().map_or(0, |piece| piece.document_start);
    if clip.is_none() {
        return outer(v, z, row, begin..z.dims()[1]);
    }
    let open = pieces.iter().filter(|piece| piece.range.start >= begin);
    let each = open.map(|piece| {
        let tokens = |x| take(x, row, piece.range.clone());
        outer_update(tokens(v), tokens(z), clip)
    });
    each.reduce(|a, b| a + b).expect("a document has pieces")
}

/// Σ dOᵀZ over the pieces of row `row` whose document was open at its beginning: all of them read what
/// arrived.
pub(super) fn read(z: &Tensor<3>, dy: &Tensor<3>, row: usize, pieces: &[Piece]) -> Tensor<2> {
    let carried = pieces.iter().take_while(|piece| piece.carried);
    let end = carried.last().map_or(0, |piece| piece.range.end);
    outer(dy, z, row, 0..end)
}

fn frobenius(matrix: &Tensor<2>) -> Tensor<1> {
    matrix.clone().square().sum().sqrt()
}

/// W0 + η S in f32.
fn effective_weight(w0: &Tensor<2>, state: Option<&Tensor<2>>, lr: f64) -> Tensor<2> {
    match state {
        None => w0.clone(),
        Some(state) => cast(w0.clone(), state.dtype()) + state.clone().mul_scalar(lr),
    }
}

/// The pieces of a row's documents that began before it and those of the others, which need nothing of
/// other ranks.
fn carried(pieces: &[Piece]) -> (&[Piece], &[Piece]) {
    let own = pieces.iter().position(|piece| !piece.carried);
    pieces.split_at(own.unwrap_or(pieces.len()))
}

/// The pieces of a row's last document and, first, those of the documents before it, whose gradients
/// need nothing of other ranks.
fn open(pieces: &[Piece]) -> (&[Piece], &[Piece]) {
    let begin = pieces.last().map_or(0, |piece| piece.document_start);
    let first = pieces.iter().position(|piece| piece.range.end > begin);
    pieces.split_at(first.unwrap_or(0))
}

/// What the pieces of one row read and write.
struct Walk<'a> {
    z: &'a Tensor<3>,
    v: &'a Tensor<3>,
    w0: &'a Tensor<2>,
    row: usize,
    lr: f64,
    clip: Option<f64>,
}

/// What some pieces of a row give.
#[derive(Default)]
struct Walked {
    outputs: Vec<Tensor<2>>,
    /// Of the states where documents end.
    norms: Vec<Tensor<1>>,
    /// At the end.
    state: Option<Tensor<2>>,
}

impl Walk<'_> {
    fn update(&self, piece: &Piece) -> Tensor<2> {
        let (v, z) = (
            take(self.v, self.row, piece.range.clone()),
            take(self.z, self.row, piece.range.clone()),
        );
        outer_update(v, z, self.clip)
    }

    /// From `state` on; `first`: the update of the first piece, if it has been made.
    fn forward(
        &self,
        pieces: &[Piece],
        mut state: Option<Tensor<2>>,
        mut first: Option<Tensor<2>>,
    ) -> Walked {
        let mut walked = Walked::default();
        for piece in pieces {
            let z = take(self.z, self.row, piece.range.clone());
            let read = state.as_ref().filter(|_| piece.reads);
            let output = apply_state(z, self.w0, read, self.lr);
            walked.outputs.push(output);
            if piece.reads && piece.write == Write::Nothing {
                let read = read.expect("a piece that reads follows a write");
                walked.norms.push(frobenius(read));
            }
            let made = first.take();
            if piece.write != Write::Nothing {
                let delta = made.unwrap_or_else(|| self.update(piece));
                state = match (piece.write, state) {
                    (Write::Add, Some(sum)) => Some(sum + delta),
                    _ => Some(delta),
                };
            }
        }
        walked.state = state;
        walked
    }
}

/// The update of the first piece of the documents that began before this rank, and the documents that began
/// here, come first: they need nothing of what arrives.
pub(super) fn forward(
    [z, v]: [&Tensor<3>; 2],
    w0: &Tensor<2>,
    (lr, clip): (f64, Option<f64>),
    pieces: &[Vec<Piece>],
    mut exchange: Exchange,
) -> Outcome {
    let walk = |row| Walk {
        z,
        v,
        w0,
        row,
        lr,
        clip,
    };
    let firsts: Vec<_> = pieces
        .iter()
        .enumerate()
        .map(|(row, pieces)| {
            let first = carried(pieces).0.first();
            let first = first.filter(|piece| piece.write != Write::Nothing);
            first.map(|piece| walk(row).update(piece))
        })
        .collect();
    // Before the documents that began here: of a row's first rank they are all, and the others wait.
    exchange.pass_on();
    let rows = firsts.into_iter().enumerate();
    let own: Vec<_> = rows
        .map(|(row, first)| {
            let others = carried(&pieces[row]).1;
            (first, walk(row).forward(others, None, None))
        })
        .collect();
    let arrived = exchange.finish();
    let zero = Tensor::<1>::zeros([1], (&z.device(), wide(z.dtype())));
    let (mut outputs, mut norms, mut last) = (vec![], vec![zero], vec![]);
    for (row, (first, own)) in own.into_iter().enumerate() {
        let (carried, others) = carried(&pieces[row]);
        let before = walk(row).forward(carried, arrived[row].clone(), first);
        let state = match others.is_empty() {
            true => before.state,
            false => own.state,
        };
        let reads_at_end = pieces[row].last().is_some_and(|piece| piece.reads);
        last.push(state.filter(|_| reads_at_end));
        norms.extend(before.norms.into_iter().chain(own.norms));
        let parts = before.outputs.into_iter().chain(own.outputs);
        outputs.push(Tensor::cat(parts.collect(), 0).unsqueeze::<3>());
    }
    Outcome {
        #[cfg(feature = "cuda")]
        weights: None,
        output: Tensor::cat(outputs, 0),
        norm: Tensor::cat(norms, 0).max(),
        last,
        arrived,
    }
}

/// Walking back over the chunks of a document, with W the weight a chunk read and G the sum of
/// dOᵀZ over the later chunks: dZ = dO W + η V G, dV = η Z Gᵀ, and S −= VᵀZ before a chunk
/// that was added is differentiated. G begins with what returns from the ranks behind; dW0 is dOᵀZ of
/// this rank's tokens alone, since theirs have been counted there. It and the documents that end on this
/// rank come first: they need nothing of what returns.
pub(super) fn backward(
    saved: Saved,
    dy: Tensor<3>,
    lr: f64,
    pieces: &[Vec<Piece>],
    mut exchange: Exchange,
) -> Gradients {
    let Saved {
        z,
        v,
        w0,
        mut last,
        first,
        #[cfg(feature = "cuda")]
            weights: _,
    } = saved;
    let back = |row: usize| Back {
        z: &z,
        v: &v,
        dy: &dy,
        w0: &w0,
        first: first[row].as_ref(),
        row,
        lr,
    };
    let dw0 = || {
        let flat = |t: &Tensor<3>| -> Tensor<2> {
            let [rows, tokens, width] = t.dims();
            t.clone().reshape([rows * tokens, width])
        };
        cast(outer_update(flat(&dy), flat(&z), None), w0.dtype())
    };
    // Without an exchange, later: one matrix less is held meanwhile.
    let early = exchange.travels().then(&dw0);
    exchange.pass_on();
    let split = |row: usize| match exchange.arrives(row) {
        true => open(&pieces[row]),
        false => pieces[row].split_at(pieces[row].len()),
    };
    let rows = 0..pieces.len();
    let parts: Vec<_> = rows.clone().map(split).collect();
    let mut done: Vec<Vec<[Tensor<2>; 2]>> = vec![];
    for (row, (before, open)) in parts.iter().enumerate() {
        let state = match open.is_empty() {
            true => last[row].take(),
            false => None,
        };
        done.push(back(row).walk(before, state, None));
    }
    let returned = exchange.finish();
    let (mut dzs, mut dvs) = (vec![], vec![]);
    for ((row, of_before), (_, open)) in rows.zip(done).zip(parts) {
        let state = last[row].take();
        let of_open = back(row).walk(open, state, returned[row].clone());
        let parts = of_before.into_iter().chain(of_open);
        let (dz, dv): (Vec<_>, Vec<_>) = parts.map(|[dz, dv]| (dz, dv)).unzip();
        dzs.push(Tensor::cat(dz, 0).unsqueeze::<3>());
        dvs.push(Tensor::cat(dv, 0).unsqueeze::<3>());
    }
    Gradients {
        z: Tensor::cat(dzs, 0),
        v: Tensor::cat(dvs, 0),
        w0: early.unwrap_or_else(dw0),
        returned,
    }
}

/// What the pieces of one row are differentiated with.
struct Back<'a> {
    z: &'a Tensor<3>,
    v: &'a Tensor<3>,
    dy: &'a Tensor<3>,
    w0: &'a Tensor<2>,
    /// The state that the row began with, where it was kept.
    first: Option<&'a Tensor<2>>,
    row: usize,
    lr: f64,
}

impl Back<'_> {
    /// dZ and dV of each piece. `state` is S at the end, `later` is G there.
    fn walk(
        &self,
        pieces: &[Piece],
        mut state: Option<Tensor<2>>,
        mut later: Option<Tensor<2>>,
    ) -> Vec<[Tensor<2>; 2]> {
        let dtype = self.z.dtype();
        let mut gradients = vec![];
        for piece in pieces.iter().rev() {
            let at = |x: &Tensor<3>| take(x, self.row, piece.range.clone());
            let (tz, tv, tdy) = (at(self.z), at(self.v), at(self.dy));
            if piece.write == Write::Add {
                let delta = outer_update(tv.clone(), tz.clone(), None);
                state = state.map(|sum| sum - delta);
            }
            if piece.reads && state.is_none() {
                // An earlier document of the row: its state was not kept, so sum it again.
                let written = piece.document_start..piece.range.start;
                let arrived = self.first.cloned().filter(|_| piece.carried);
                state = match (arrived, written.is_empty()) {
                    (arrived, true) => arrived,
                    (None, false) => Some(outer(self.v, self.z, self.row, written)),
                    (Some(sum), false) => Some(sum + outer(self.v, self.z, self.row, written)),
                };
            }
            let read = state.as_ref().filter(|_| piece.reads);
            let weight = cast(effective_weight(self.w0, read, self.lr), dtype);
            let mut dz = tdy.clone().matmul(weight);
            let mut dv = tv.zeros_like();
            if let (true, Some(g)) = (piece.write != Write::Nothing, &later) {
                let g = cast(g.clone(), dtype);
                dz = dz + tv.matmul(g.clone()).mul_scalar(self.lr);
                dv = tz.clone().matmul(g.transpose()).mul_scalar(self.lr);
            }
            gradients.push([dz, dv]);
            let continues = piece.write == Write::Add;
            later = piece.reads.then(|| {
                let own = outer_update(tdy, tz, None);
                match later.take().filter(|_| continues) {
                    Some(sum) => sum + own,
                    None => own,
                }
            });
            if !piece.reads {
                state = None;
            }
        }
        gradients.reverse();
        gradients
    }
}
