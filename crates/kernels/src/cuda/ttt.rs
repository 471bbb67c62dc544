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
use super::stream::{Arg, Buffer, Context, on_stream};
use crate::packing::{Piece, Write};

mod backward;
mod forward;

pub use backward::{Backward, States};
pub use forward::Forward;

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

impl<'a> Pass<'a> {
    /// `from`: the addresses of z, v and W0.
    fn new(i: &'a Inputs, from: &[u64], lr: f64) -> Self {
        Self {
            s: &i.sizes,
            z: from[0],
            v: from[1],
            w0: from[2],
            w0_is_f32: i.w0_is_f32,
            lr: lr as f32,
        }
    }

    /// VᵀZ of the group's pieces, if any is written, into the slab.
    fn updates(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        slab: u64,
    ) -> Result<(), String> {
        if group.adds() | group.replaces() == 0 {
            return Ok(());
        }
        let v = self.s.rows(self.v, row, group, self.s.d);
        let z = self.s.rows(self.z, row, group, self.s.f);
        cx.gemm(v.t(), z, self.s.slots(slab, group), 1.0, 0.0)
    }

    /// The group's VᵀZ from the slab on into `state`; with `weights`, the slab then holds the weights
    /// that the pieces read.
    fn forward(
        &self,
        cx: &mut Context,
        group: &Group,
        (slab, state): (u64, u64),
        weights: bool,
    ) -> Result<(), String> {
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
            Arg::Size(self.s.elements() as u64),
        ];
        let name = if weights {
            "scan_forward"
        } else {
            "scan_state"
        };
        cx.launch(name, self.s.grid(), 256, &args)
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

/// The same of sums that an exchange brought.
fn arrived(of_rows: &[Option<Tensor<2>>]) -> Vec<Option<Buffer>> {
    matrices(of_rows).expect("sums arrive in f32 where the rows are")
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
