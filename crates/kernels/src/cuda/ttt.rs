//! The TTT scan.
//!
//! Only the running sums are sequential, and they are elementwise. So the pieces of a row are taken in
//! groups: one batched GEMM makes every piece's VᵀZ, one kernel turns them into the weights that the
//! pieces read (the state stays in f32 registers), one batched GEMM applies those. A piece's VᵀZ is
//! rounded to bf16, as V and Z were; the state that sums them is not. The backward pass peels the very
//! same terms off again, so it meets the weights of the forward pass up to f32 rounding.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::gemm::Matrix;
use super::norm::sum_partials;
use super::stream::{Arg, Buffer, Context, on_stream};
use crate::packing::{Piece, Write};

/// Bytes of each slab of piece weights.
const SLAB: usize = 256 << 20;

/// Blocks of a state's sum of squares.
const NORM_BLOCKS: usize = 256;

/// How the rows of one scan are cut.
#[derive(Debug)]
pub struct Shape<'a> {
    /// The pieces of each row.
    pub pieces: &'a [Vec<Piece>],
    /// η
    pub lr: f64,
}

/// Neighbouring pieces of equal length; a bit of a mask for each.
#[derive(Clone, Debug)]
struct Group<'a> {
    pieces: &'a [Piece],
}

impl Group<'_> {
    fn mask(&self, holds: impl Fn(&Piece) -> bool) -> u32 {
        let bits = self.pieces.iter().enumerate();
        bits.map(|(i, piece)| u32::from(holds(piece)) << i).sum()
    }

    fn reads(&self) -> u32 {
        self.mask(|p| p.reads)
    }

    fn adds(&self) -> u32 {
        self.mask(|p| p.write == Write::Add)
    }

    fn replaces(&self) -> u32 {
        self.mask(|p| p.write == Write::Replace)
    }

    fn last(&self) -> &Piece {
        &self.pieces[self.pieces.len() - 1]
    }

    /// Whether a document whose state was read ends with the group.
    fn ends_document(&self) -> bool {
        self.last().reads && self.last().write == Write::Nothing
    }
}

/// The pieces of a row in groups of at most `slots`. A group ends where a read document does, so that
/// its state can be looked at between groups.
fn groups(pieces: &[Piece], slots: usize) -> Vec<Group<'_>> {
    let mut all = vec![];
    let mut rest = pieces;
    while let Some(first) = rest.first() {
        let mut count = 1;
        while count < rest.len().min(slots)
            && rest[count].range.len() == first.range.len()
            && !(rest[count - 1].reads && rest[count - 1].write == Write::Nothing)
        {
            count += 1;
        }
        let (taken, left) = rest.split_at(count);
        all.push(Group { pieces: taken });
        rest = left;
    }
    all
}

/// Extents of one scan.
struct Sizes {
    length: usize,
    d: usize,
    f: usize,
}

impl Sizes {
    /// The group's tokens of row `row` in a `[B, N, width]` buffer, a matrix per piece.
    fn rows(&self, at: u64, row: usize, group: &Group, width: usize) -> Matrix {
        let length = group.pieces[0].range.len();
        let first = group.pieces[0].range.start;
        let first = (row * self.length + first) * width * 2;
        let matrix = Matrix::new(at + first as u64, length, width, DType::BF16);
        matrix.batched(group.pieces.len(), length * width)
    }

    /// The group's slots of a slab.
    fn slots(&self, slab: u64, group: &Group) -> Matrix {
        let matrix = Matrix::new(slab, self.d, self.f, DType::BF16);
        matrix.batched(group.pieces.len(), self.d * self.f)
    }

    /// Pieces that a slab holds: at least one, at most a mask's bits.
    fn most(&self, pieces: &[Vec<Piece>]) -> usize {
        let longest = pieces.iter().map(Vec::len).max().unwrap_or(1);
        (SLAB / (self.d * self.f * 2)).clamp(1, longest.clamp(1, 32))
    }

    fn elements(&self) -> usize {
        self.d * self.f
    }

    /// One thread per eight elements of a state.
    fn grid(&self) -> (u32, u32, u32) {
        (self.elements().div_ceil(8 * 256) as u32, 1, 1)
    }
}

/// What the forward pass returns.
pub struct Forward {
    /// `[B, N, D]` bf16
    pub output: Tensor<3>,
    /// Largest ‖S‖_F where a document ends, 0 where none has a state: `[1]` f32.
    pub norm: Tensor<1>,
    /// The state at the end of each row, if its last document had one.
    pub last: Vec<Option<Tensor<2>>>,
}

struct Inputs {
    z: Buffer,
    v: Buffer,
    w0: Buffer,
    w0_is_f32: Arg,
    sizes: Sizes,
}

fn inputs(z: &Tensor<3>, v: &Tensor<3>, w0: &Tensor<2>) -> Option<Inputs> {
    let (z, v, w0) = (Buffer::of(z)?, Buffer::of(v)?, Buffer::of(w0)?);
    let f32 = match w0.dtype() {
        DType::BF16 => 0,
        DType::F32 => 1,
        _ => return None,
    };
    let sizes = Sizes {
        length: z.dims()[1],
        d: w0.dims()[0],
        f: z.dims()[2],
    };
    let bf16 = z.dtype() == DType::BF16 && v.dtype() == DType::BF16;
    (bf16 && sizes.elements().is_multiple_of(8)).then_some(Inputs {
        z,
        v,
        w0,
        w0_is_f32: Arg::Int(f32),
        sizes,
    })
}

/// What the kernels of one pass share.
struct Pass<'a> {
    s: &'a Sizes,
    z: u64,
    v: u64,
    w0: u64,
    w0_is_f32: Arg,
    lr: f32,
}

impl Pass<'_> {
    /// The group's VᵀZ into the slab and on into `state`; with `weights`, the slab then holds the
    /// weights that the pieces read.
    fn forward(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        (slab, state): (u64, u64),
        weights: bool,
    ) -> Result<(), String> {
        let s = self.s;
        if group.adds() | group.replaces() != 0 {
            let v = s.rows(self.v, row, group, s.d);
            let z = s.rows(self.z, row, group, s.f);
            cx.gemm(v.t(), z, s.slots(slab, group), 1.0, 0.0)?;
        }
        let args = [
            Arg::Ptr(slab),
            Arg::Ptr(state),
            Arg::Ptr(self.w0),
            self.w0_is_f32,
            Arg::Float(self.lr),
            Arg::Int(group.pieces.len() as i32),
            Arg::Bits(group.reads()),
            Arg::Bits(group.adds()),
            Arg::Bits(group.replaces()),
            Arg::Size(s.elements() as u64),
        ];
        let name = if weights {
            "scan_forward"
        } else {
            "scan_state"
        };
        cx.launch(name, s.grid(), 256, &args)
    }
}

/// aᵀ b of the tokens `range` of row `row`, f32: a `[B, N, D]`, b `[B, N, F]` bf16 → `[D, F]`.
pub fn outer(a: &Tensor<3>, b: &Tensor<3>, row: usize, range: Range<usize>) -> Option<Tensor<2>> {
    let (length, d, f) = (a.dims()[1], a.dims()[2], b.dims()[2]);
    let (a, b) = (Buffer::of(a)?, Buffer::of(b)?);
    if a.dtype() != DType::BF16 || b.dtype() != DType::BF16 || range.is_empty() {
        return None;
    }
    let sum = a.empty([d, f], DType::F32);
    on_stream(&[&a, &b], &[&sum], |cx, from, to| {
        let tokens = |at: u64, width: usize| {
            let first = (row * length + range.start) * width * 2;
            Matrix::new(at + first as u64, range.len(), width, DType::BF16)
        };
        let sum = Matrix::new(to[0], d, f, DType::F32);
        cx.gemm(tokens(from[0], d).t(), tokens(from[1], f), sum, 1.0, 0.0)
    });
    Some(sum.tensor())
}

/// Which of the addresses from `at` on is each row's.
fn addresses(list: &[Option<Buffer>], from: &[u64], at: &mut usize) -> Vec<Option<u64>> {
    let mut next = || {
        *at += 1;
        from[*at - 1]
    };
    list.iter()
        .map(|row| row.as_ref().map(|_| next()))
        .collect()
}

/// The buffers of f32 matrices that not every row has; `None` if one is none of ours.
fn matrices(of_rows: &[Option<Tensor<2>>]) -> Option<Vec<Option<Buffer>>> {
    let one = |matrix: &Tensor<2>| Buffer::of(matrix).filter(|b| b.dtype() == DType::F32);
    let row = |matrix: &Option<Tensor<2>>| match matrix {
        None => Some(None),
        Some(matrix) => one(matrix).map(Some),
    };
    of_rows.iter().map(row).collect()
}

/// z `[B, N, F]`, v `[B, N, D]`, w0 `[D, F]`; for each row the state that it begins with, f32.
pub fn forward(
    z: &Tensor<3>,
    v: &Tensor<3>,
    w0: &Tensor<2>,
    arriving: &[Option<Tensor<2>>],
    shape: &Shape,
) -> Option<Forward> {
    let i = inputs(z, v, w0)?;
    let arriving = matrices(arriving)?;
    let s = &i.sizes;
    let most = s.most(shape.pieces);
    let rows = shape.pieces.len();
    let output = i.z.empty([rows, s.length, s.d], DType::BF16);
    let slab = i.z.empty([most, s.d, s.f], DType::BF16);
    let states: Vec<Buffer> = (0..rows)
        .map(|_| i.z.empty([s.d, s.f], DType::F32))
        .collect();
    let all = shape.pieces.iter().flatten();
    let ends = all.filter(|p| p.reads && p.write == Write::Nothing).count();
    let squares = i.z.empty([ends + 1], DType::F32);
    let partial = i.z.empty([NORM_BLOCKS], DType::F32);
    let norm = i.z.empty([1], DType::F32);
    let mut writes = vec![&output, &slab, &squares, &partial, &norm];
    writes.extend(&states);
    let mut reads = vec![&i.z, &i.v, &i.w0];
    reads.extend(arriving.iter().flatten());
    on_stream(&reads, &writes, |cx, from, to| {
        let (output, slab, squares, partial) = (to[0], to[1], to[2], to[3]);
        let arriving = addresses(&arriving, from, &mut 3);
        let pass = Pass {
            s,
            z: from[0],
            v: from[1],
            w0: from[2],
            w0_is_f32: i.w0_is_f32,
            lr: shape.lr as f32,
        };
        cx.zero(squares, 4 * (ends + 1))?;
        let mut next = squares + 4;
        for (row, pieces) in shape.pieces.iter().enumerate() {
            let state = to[5 + row];
            if let Some(source) = arriving[row] {
                cx.copy(state, source, 4 * s.elements())?;
            }
            for group in groups(pieces, most) {
                pass.forward(cx, row, &group, (slab, state), true)?;
                let z = s.rows(pass.z, row, &group, s.f);
                let out = s.rows(output, row, &group, s.d);
                cx.gemm(z, s.slots(slab, &group).t(), out, 1.0, 0.0)?;
                if group.ends_document() {
                    let n = Arg::Size(s.elements() as u64);
                    let args = [Arg::Ptr(partial), Arg::Ptr(state), n];
                    cx.launch("square_sum", (NORM_BLOCKS as u32, 1, 1), 512, &args)?;
                    sum_partials(cx, next, partial, NORM_BLOCKS, 1)?;
                    next += 4;
                }
            }
        }
        let count = Arg::Int(ends as i32 + 1);
        let args = [Arg::Ptr(to[4]), Arg::Ptr(squares), count];
        cx.launch("largest_root", (1, 1, 1), 32, &args)
    });
    let last = shape.pieces.iter().zip(states).map(|(pieces, state)| {
        let reads = pieces.last().is_some_and(|piece| piece.reads);
        reads.then(|| state.tensor::<2>())
    });
    Some(Forward {
        output: output.tensor(),
        norm: norm.tensor(),
        last: last.collect(),
    })
}

/// What a backward pass has of other ranks, f32 where a row has any.
#[derive(Clone, Copy, Debug)]
pub struct Carried<'a> {
    /// The state that a row began with, where the document it belongs to is not the row's last.
    pub first: &'a [Option<Tensor<2>>],
    /// Σ dOᵀZ of what reads the row's last document on the ranks behind.
    pub behind: &'a [Option<Tensor<2>>],
}

/// Gradients of z, v (bf16) and w0 (f32), given that of the output. `last` is used up.
pub fn backward(
    z: &Tensor<3>,
    v: &Tensor<3>,
    w0: &Tensor<2>,
    last: &mut [Option<Tensor<2>>],
    carried: Carried,
    dy: &Tensor<3>,
    shape: &Shape,
) -> Option<(Tensor<3>, Tensor<3>, Tensor<2>)> {
    let i = inputs(z, v, w0)?;
    let (first, behind) = (matrices(carried.first)?, matrices(carried.behind)?);
    let dy = Buffer::of(dy).filter(|b| b.dtype() == DType::BF16)?;
    let s = &i.sizes;
    let most = s.most(shape.pieces);
    let rows = shape.pieces.len();
    let dz = i.z.empty([rows, s.length, s.f], DType::BF16);
    let dv = i.z.empty([rows, s.length, s.d], DType::BF16);
    let [dw0, later, state] = [(); 3].map(|()| i.z.empty([s.d, s.f], DType::F32));
    let [weights, sums] = [(); 2].map(|()| i.z.empty([most, s.d, s.f], DType::BF16));
    // Copied before it is peeled: the tape may still hold the kept state.
    let kept: Vec<Option<Buffer>> = last
        .iter_mut()
        .map(|kept| kept.take().and_then(|t| Buffer::of(&t)))
        .collect();
    // Three lists of matrices follow, each without its gaps.
    let lists = [&kept, &first, &behind];
    let mut reads = vec![&i.z, &i.v, &i.w0, &dy];
    reads.extend(lists.iter().flat_map(|list| list.iter().flatten()));
    let writes = [&dz, &dv, &dw0, &later, &state, &weights, &sums];
    on_stream(&reads, &writes, |cx, from, to| {
        let dy = from[3];
        let (dz, dv, dw0, later, state) = (to[0], to[1], to[2], to[3], to[4]);
        let (weights, sums) = (to[5], to[6]);
        let pass = Pass {
            s,
            z: from[0],
            v: from[1],
            w0: from[2],
            w0_is_f32: i.w0_is_f32,
            lr: shape.lr as f32,
        };
        cx.zero(dw0, 4 * s.elements())?;
        let mut at = 4;
        let [kept, first, behind] = lists.map(|list| addresses(list, from, &mut at));
        for (row, pieces) in shape.pieces.iter().enumerate() {
            let mut has_state = kept[row].is_some();
            if let Some(source) = kept[row] {
                cx.copy(state, source, 4 * s.elements())?;
            }
            let mut has_later = behind[row].is_some();
            if let Some(source) = behind[row] {
                cx.copy(later, source, 4 * s.elements())?;
            }
            let all = groups(pieces, most);
            for (at, group) in all.iter().enumerate().rev() {
                if group.ends_document() && !has_state {
                    // An earlier document of the row: its state was not kept, so sum it again.
                    let start = group.last().document_start;
                    if let (true, Some(source)) = (group.last().carried, first[row]) {
                        cx.copy(state, source, 4 * s.elements())?;
                    }
                    let of_document = |g: &&Group| g.last().range.end > start;
                    for earlier in all[..=at].iter().filter(of_document) {
                        pass.forward(cx, row, earlier, (weights, state), false)?;
                    }
                    has_state = true;
                }
                let (mut gets, mut keeps) = (0u32, 0u32);
                for (bit, piece) in group.pieces.iter().enumerate().rev() {
                    let writes = u32::from(piece.write != Write::Nothing && has_later);
                    let adds = u32::from(piece.write == Write::Add && has_later);
                    gets |= writes << bit;
                    keeps |= adds << bit;
                    has_later = piece.reads;
                    has_state &= piece.reads;
                }
                let z = s.rows(pass.z, row, group, s.f);
                let v = s.rows(pass.v, row, group, s.d);
                let dy = s.rows(dy, row, group, s.d);
                if group.adds() != 0 {
                    cx.gemm(v.t(), z, s.slots(weights, group), 1.0, 0.0)?;
                }
                cx.gemm(dy.t(), z, s.slots(sums, group), 1.0, 0.0)?;
                let args = [
                    Arg::Ptr(weights),
                    Arg::Ptr(sums),
                    Arg::Ptr(state),
                    Arg::Ptr(later),
                    Arg::Ptr(dw0),
                    Arg::Ptr(pass.w0),
                    pass.w0_is_f32,
                    Arg::Float(pass.lr),
                    Arg::Int(group.pieces.len() as i32),
                    Arg::Bits(group.reads()),
                    Arg::Bits(group.adds()),
                    Arg::Bits(gets),
                    Arg::Bits(keeps),
                    Arg::Size(s.elements() as u64),
                ];
                cx.launch("scan_backward", s.grid(), 256, &args)?;
                let (weights, sums) = (s.slots(weights, group), s.slots(sums, group));
                let (dz, dv) = (s.rows(dz, row, group, s.f), s.rows(dv, row, group, s.d));
                cx.gemm(dy, weights, dz, 1.0, 0.0)?;
                if gets == 0 {
                    let bytes = dv.rows * dv.columns * group.pieces.len() * 2;
                    cx.zero(dv.at, bytes)?;
                } else {
                    cx.gemm(v, sums, dz, 1.0, 1.0)?;
                    cx.gemm(z, sums.t(), dv, 1.0, 0.0)?;
                }
            }
        }
        Ok(())
    });
    Some((dz.tensor(), dv.tensor(), dw0.tensor()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packing::Packing;

    #[test]
    fn groups_cover_the_row_and_end_with_read_documents() {
        let packing = Packing::new(100, vec![vec![0, 41, 44, 90]]).expect("ascending");
        for slots in [1, 3, 32] {
            let pieces = packing.pieces(0, 8);
            let all = groups(&pieces, slots);
            let ranges = all.iter().flat_map(|g| g.pieces).map(|p| p.range.clone());
            assert!(ranges.eq(pieces.iter().map(|p| p.range.clone())));
            for group in &all {
                assert!(group.pieces.len() <= slots);
                let inner = &group.pieces[..group.pieces.len() - 1];
                assert!(
                    inner
                        .iter()
                        .all(|p| !(p.reads && p.write == Write::Nothing))
                );
            }
        }
    }
}
