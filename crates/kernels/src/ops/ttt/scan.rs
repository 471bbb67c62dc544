//! The running-state scan and its reversible backward (docs/in-place-ttt.md, section 5).

use std::ops::Range;

use burn::tensor::Tensor;

use super::carry::{Carry, From};
use crate::context::{Context, Fault};
use crate::dtype::{cast, widen};
use crate::function::{Forward, Function, Value, apply_with_extra};
use crate::packing::{Packing, Piece, Write};

/// How the fast weight learns.
#[derive(Clone, Debug)]
pub struct ScanSpec {
    /// Inner learning rate η.
    pub lr: f64,
    /// Tokens per chunk.
    pub chunk: usize,
    /// Largest Frobenius norm of one chunk's update, before η (the paper, appendix D.2). Inference only:
    /// the backward pass does not know it.
    pub clip: Option<f64>,
    /// The documents of the rows.
    pub packing: Packing,
    /// The ranks that have the other parts of the rows, if `packing` is a part.
    pub context: Option<Context>,
}

/// What a scan returns.
#[derive(Debug)]
pub struct Scan {
    /// `[B, N, D]`
    pub output: Tensor<3>,
    /// Largest ‖S‖_F at the end of a document, over all rows; 0 if no state was read: `[1]`. Of rows in
    /// parts, the documents that end on this rank.
    pub state_norm: Tensor<1>,
}

/// `O_i = Z_i (W_0 + η Σ_{j<i} V_jᵀ Z_j)ᵀ` per document: z `[B, N, F]`, v `[B, N, D]`,
/// w0 `[D, F]`.
///
/// # Panics
/// If a clip is set while gradients are tracked, or the packing does not fit z.
pub fn fast_weight_scan(z: Tensor<3>, v: Tensor<3>, w0: Tensor<2>, spec: ScanSpec) -> Scan {
    let tracked = [z.is_tracked(), v.is_tracked(), w0.is_tracked()];
    assert!(
        spec.clip.is_none() || !tracked.contains(&true),
        "clipped updates are for inference"
    );
    let [rows, length, _] = z.dims();
    assert_eq!(
        (spec.packing.rows().len(), spec.packing.length()),
        (rows, length),
        "a packing of other rows"
    );
    assert!(
        spec.context.is_some() || spec.packing.length() == spec.packing.whole().length(),
        "a part of rows learns nothing of the other parts"
    );
    let (output, mut extra) =
        apply_with_extra(FastWeightScan { spec }, [z.into(), v.into(), w0.into()]);
    Scan {
        output: output.tensor(),
        state_norm: extra.swap_remove(0).tensor(),
    }
}

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

/// Rows `piece` of row `b`: `[B, N, X]` → `[T, X]`.
fn take(x: &Tensor<3>, b: usize, range: Range<usize>) -> Tensor<2> {
    x.clone().slice([b..b + 1, range]).squeeze_dim(0)
}

#[derive(Debug)]
struct FastWeightScan {
    spec: ScanSpec,
}

#[derive(Clone, Debug)]
struct Saved {
    z: Tensor<3>,
    v: Tensor<3>,
    w0: Tensor<2>,
    /// The state at the end of each row, if its last document had one.
    last: Vec<Option<Tensor<2>>>,
    /// The state that each row began with, where the document it belongs to is not the last.
    first: Vec<Option<Tensor<2>>>,
}

impl FastWeightScan {
    fn pieces(&self, row: usize) -> Vec<Piece> {
        self.spec.packing.pieces(row, self.spec.chunk)
    }

    fn all_pieces(&self) -> Vec<Vec<Piece>> {
        let rows = self.spec.packing.rows().len();
        (0..rows).map(|row| self.pieces(row)).collect()
    }

    /// The state that each row begins with: `[D, F]` f32, `None` where no document comes from the ranks
    /// before.
    fn arriving(&self, z: &Tensor<3>, v: &Tensor<3>, w0: &Tensor<2>) -> Vec<Option<Tensor<2>>> {
        let Some(context) = &self.spec.context else {
            return vec![None; z.dims()[0]];
        };
        // What the document that is open at the end has written here.
        let written = |row: usize| {
            let pieces = self.pieces(row);
            let begin = pieces.last().map_or(0, |piece| piece.document_start);
            let Some(clip) = self.spec.clip else {
                return outer(v, z, row, begin..z.dims()[1]);
            };
            let open = pieces.iter().filter(|piece| piece.range.start >= begin);
            let each = open.map(|piece| {
                let (v, z) = (
                    take(v, row, piece.range.clone()),
                    take(z, row, piece.range.clone()),
                );
                outer_update(v, z, Some(clip))
            });
            each.reduce(|a, b| a + b).expect("a document has pieces")
        };
        Carry::new(context, &self.spec.packing, From::Before, w0.dims(), z).exchange(written)
    }

    /// Σ dOᵀZ of what reads a row's fast weights on the ranks behind: `[D, F]` f32, `None` where no
    /// document goes on there.
    fn returning(&self, z: &Tensor<3>, dy: &Tensor<3>, w0: &Tensor<2>) -> Vec<Option<Tensor<2>>> {
        let Some(context) = &self.spec.context else {
            return vec![None; z.dims()[0]];
        };
        // Of the document that was open at the beginning: all of its pieces read what arrived.
        let read = |row: usize| {
            let pieces = self.pieces(row);
            let carried = pieces.iter().take_while(|piece| piece.carried);
            let end = carried.last().map_or(0, |piece| piece.range.end);
            outer(dy, z, row, 0..end)
        };
        Carry::new(context, &self.spec.packing, From::Behind, w0.dims(), z).exchange(read)
    }

    /// What of `arriving` the backward pass has to know: it peels the state of a row's last document,
    /// and sums up that of an earlier one again.
    fn kept(&self, arriving: Vec<Option<Tensor<2>>>) -> Vec<Option<Tensor<2>>> {
        let rows = arriving.into_iter().enumerate();
        let ends = |row| self.pieces(row).last().is_some_and(|piece| !piece.carried);
        rows.map(|(row, state)| state.filter(|_| ends(row)))
            .collect()
    }
}

/// aᵀ b of the tokens `range` of row `row`, f32: `[B, N, D]`, `[B, N, F]` → `[D, F]`.
fn outer(a: &Tensor<3>, b: &Tensor<3>, row: usize, range: Range<usize>) -> Tensor<2> {
    #[cfg(feature = "cuda")]
    if let Some(sum) = crate::cuda::ttt::outer(a, b, row, range.clone()) {
        return sum;
    }
    outer_update(take(a, row, range.clone()), take(b, row, range), None)
}

impl Function<3> for FastWeightScan {
    type Saved = Saved;

    fn forward(&self, [z, v, w0]: [Value; 3]) -> Forward<Saved> {
        let (z, v, w0) = (z.tensor::<3>(), v.tensor::<3>(), w0.tensor::<2>());
        let spec = &self.spec;
        let arriving = self.arriving(&z, &v, &w0);
        let all_pieces = self.all_pieces();
        #[cfg(feature = "cuda")]
        if spec.clip.is_none() {
            let shape = crate::cuda::ttt::Shape {
                pieces: &all_pieces,
                lr: spec.lr,
            };
            if let Some(done) = crate::cuda::ttt::forward(&z, &v, &w0, &arriving, &shape) {
                return Forward {
                    output: done.output.into(),
                    extra: vec![done.norm.into()],
                    saved: Saved {
                        z,
                        v,
                        w0,
                        last: done.last,
                        first: self.kept(arriving),
                    },
                };
            }
        }
        let mut outputs = vec![];
        let mut last = vec![];
        let mut norms = vec![Tensor::<1>::zeros(
            [1],
            (&z.device(), crate::dtype::wide(z.dtype())),
        )];
        for (row, pieces) in all_pieces.into_iter().enumerate() {
            let mut state = arriving[row].clone();
            let mut row_output = vec![];
            let reads_at_end = pieces.last().is_some_and(|piece| piece.reads);
            for piece in pieces {
                let tz = take(&z, row, piece.range.clone());
                let read = state.as_ref().filter(|_| piece.reads);
                row_output.push(apply_state(tz.clone(), &w0, read, spec.lr));
                if piece.reads && piece.write == Write::Nothing {
                    norms.push(frobenius(read.expect("a piece that reads follows a write")));
                }
                if piece.write != Write::Nothing {
                    let delta = outer_update(take(&v, row, piece.range), tz, spec.clip);
                    state = match (piece.write, state) {
                        (Write::Add, Some(sum)) => Some(sum + delta),
                        _ => Some(delta),
                    };
                }
            }
            last.push(state.filter(|_| reads_at_end));
            outputs.push(Tensor::cat(row_output, 0).unsqueeze::<3>());
        }
        Forward {
            output: Tensor::cat(outputs, 0).into(),
            extra: vec![Tensor::cat(norms, 0).max().into()],
            saved: Saved {
                z,
                v,
                w0,
                last,
                first: self.kept(arriving),
            },
        }
    }

    /// Walking back over the chunks of a document, with W the weight a chunk read and G the sum of
    /// dOᵀZ over the later chunks: dZ = dO W + η V G, dV = η Z Gᵀ, and S −= VᵀZ before a chunk
    /// that was added is differentiated. G begins with what returns from the ranks behind; dW0 is dOᵀZ of
    /// this rank's tokens alone, since theirs have been counted there.
    fn backward(self, saved: Saved, grad: Value, _: [bool; 3]) -> [Option<Value>; 3] {
        let Saved {
            z,
            v,
            w0,
            last,
            first,
        } = saved;
        #[cfg(feature = "cuda")]
        let mut last = last;
        let dy = grad.tensor::<3>();
        let (lr, dtype) = (self.spec.lr, z.dtype());
        let returning = self.returning(&z, &dy, &w0);
        #[cfg(feature = "cuda")]
        {
            let pieces = self.all_pieces();
            let shape = crate::cuda::ttt::Shape {
                pieces: &pieces,
                lr,
            };
            let carried = crate::cuda::ttt::Carried {
                first: &first,
                behind: &returning,
            };
            let done = crate::cuda::ttt::backward(&z, &v, &w0, &mut last, carried, &dy, &shape);
            if let Some((dz, dv, dw0)) = done {
                return [Some(dz.into()), Some(dv.into()), Some(dw0.into())];
            }
        }
        let (mut dzs, mut dvs) = (vec![], vec![]);
        for (row, mut state) in last.into_iter().enumerate() {
            let mut later = returning[row].clone(); // G
            let (mut row_dz, mut row_dv) = (vec![], vec![]);
            for piece in self.pieces(row).into_iter().rev() {
                let tz = take(&z, row, piece.range.clone());
                let tv = take(&v, row, piece.range.clone());
                let tdy = take(&dy, row, piece.range.clone());
                if piece.write == Write::Add {
                    let delta = outer_update(tv.clone(), tz.clone(), None);
                    state = state.map(|sum| sum - delta);
                }
                if piece.reads && state.is_none() {
                    // An earlier document of the row: its state was not kept, so sum it again.
                    let written = piece.document_start..piece.range.start;
                    let arrived = first[row].clone().filter(|_| piece.carried);
                    state = match (arrived, written.is_empty()) {
                        (arrived, true) => arrived,
                        (None, false) => Some(outer(&v, &z, row, written)),
                        (Some(sum), false) => Some(sum + outer(&v, &z, row, written)),
                    };
                }
                let read = state.as_ref().filter(|_| piece.reads);
                let weight = cast(effective_weight(&w0, read, lr), dtype);
                let mut dz = tdy.clone().matmul(weight);
                let mut dv = tv.zeros_like();
                if let (true, Some(g)) = (piece.write != Write::Nothing, &later) {
                    let g = cast(g.clone(), dtype);
                    dz = dz + tv.matmul(g.clone()).mul_scalar(lr);
                    dv = tz.clone().matmul(g.transpose()).mul_scalar(lr);
                }
                row_dz.push(dz);
                row_dv.push(dv);
                let continues = piece.write == Write::Add;
                later = piece.reads.then(|| {
                    let own = outer_update(tdy, tz, None);
                    match later.filter(|_| continues) {
                        Some(sum) => sum + own,
                        None => own,
                    }
                });
                if !piece.reads {
                    state = None;
                }
            }
            let join = |mut parts: Vec<Tensor<2>>| {
                parts.reverse();
                Tensor::cat(parts, 0).unsqueeze::<3>()
            };
            dzs.push(join(row_dz));
            dvs.push(join(row_dv));
        }
        let flat = |t: Tensor<3>| -> Tensor<2> {
            let [rows, tokens, width] = t.dims();
            t.reshape([rows * tokens, width])
        };
        let mut dw0 = cast(outer_update(flat(dy), flat(z), None), w0.dtype());
        if let Some(context) = &self.spec.context
            && context.planted(Fault::SuffixInWeightGradient)
        {
            dw0 = returning.into_iter().flatten().fold(dw0, |a, b| a + b);
        }
        [
            Some(Tensor::cat(dzs, 0).into()),
            Some(Tensor::cat(dvs, 0).into()),
            Some(dw0.into()),
        ]
    }
}
