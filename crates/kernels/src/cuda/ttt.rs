//! The TTT scan.
//!
//! Only the running sums are sequential, and they are elementwise. So the pieces of a row are taken in
//! groups: one batched GEMM makes every piece's VᵀZ, one kernel turns them into the weights that the
//! pieces read (the state stays in f32 registers), one batched GEMM applies those. A piece's VᵀZ is
//! rounded to bf16, as V and Z were; the state that sums them is not. On Hopper the first two are one kernel
//! where it keeps the GPU busy (`scanned.rs`): VᵀZ is then not rounded at all. The backward pass sums the very
//! same terms again where a group holds its documents whole, and meets the weights of the forward pass to
//! the bit; of a document in several groups it peels them off the last state, up to f32 rounding.

use burn::tensor::{DType, Tensor};

use super::gemm::Matrix;
use super::norm::sum_partials;
use super::stream::{Arg, Buffer, Context};
use crate::packing::{Piece, Write};
use crate::work::Work;

mod ahead;
mod backward;
mod forward;
mod scanned;
mod selection;

use ahead::Ahead;
pub use ahead::spend_ahead;
pub use backward::{Backward, Kept};
pub use forward::Forward;
pub use selection::leave_out_always;
pub(super) use selection::of_one_processor;
use selection::{Run, runs};

/// Bytes of each slab of piece weights.
const SLAB: usize = 256 << 20;

/// How the rows of one scan are cut.
#[derive(Debug)]
pub struct Shape {
    /// The pieces of each row.
    pieces: Vec<Vec<Piece>>,
    /// Tokens of a row.
    length: usize,
    /// η
    lr: f64,
}

impl Shape {
    /// `pieces` of rows of `length` tokens each.
    pub fn new(pieces: Vec<Vec<Piece>>, length: usize, lr: f64) -> Self {
        Self { pieces, length, lr }
    }

    /// All rows as one, if a slab holds every document whole: they then share groups. For rows that no
    /// document enters or leaves.
    pub fn flattened(mut self, d: usize, f: usize) -> Self {
        let most = slots(d, f);
        let whole = |pieces: &Vec<Piece>| groups(pieces, most).iter().all(|group| group.whole);
        if self.pieces.len() > 1 && self.pieces.iter().all(whole) {
            let moved = self.pieces.iter().enumerate().flat_map(|(row, pieces)| {
                let by = row * self.length;
                pieces.iter().map(move |piece| Piece {
                    range: piece.range.start + by..piece.range.end + by,
                    document_start: piece.document_start + by,
                    ..piece.clone()
                })
            });
            let all: Vec<Piece> = moved.collect();
            self.length *= self.pieces.len();
            self.pieces = vec![all];
        }
        self
    }
}

/// Pieces that a slab holds: at least one, at most a mask's bits.
fn slots(d: usize, f: usize) -> usize {
    (SLAB / (d * f * 2)).clamp(1, 32)
}

/// Neighbouring pieces of equal length; a bit of a mask for each.
#[derive(Clone, Debug)]
struct Group<'a> {
    pieces: &'a [Piece],
    /// Whether every document of the group begins and ends in it, so that no state enters or leaves.
    whole: bool,
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

    /// Pieces whose VᵀZ is read.
    fn writes(&self) -> u32 {
        self.adds() | self.replaces()
    }

    fn last(&self) -> &Piece {
        &self.pieces[self.pieces.len() - 1]
    }

    /// Pieces at whose end a document ends that has a state.
    fn ends(&self) -> u32 {
        self.mask(|p| p.reads && p.write == Write::Nothing)
    }

    /// Whether a document whose state was read ends with the group.
    fn ends_document(&self) -> bool {
        self.last().reads && self.last().write == Write::Nothing
    }
}

/// The pieces of a row in groups of at most `slots`: documents that a group holds whole, or a part of one
/// document. Such a part ends where its document does, so that its state can be looked at between groups.
fn groups(pieces: &[Piece], slots: usize) -> Vec<Group<'_>> {
    let mut all = vec![];
    let mut rest = pieces;
    while let Some(first) = rest.first() {
        let alike = rest.iter().take(slots);
        let alike = alike.take_while(|piece| piece.range.len() == first.range.len());
        let alike = &rest[..alike.count()];
        let ended = alike
            .iter()
            .rposition(|piece| piece.write == Write::Nothing);
        let whole = match ended {
            Some(last) if !first.reads && !first.carried => last + 1,
            _ => 0,
        };
        let part = alike
            .iter()
            .position(|piece| piece.reads && piece.write == Write::Nothing);
        let count = match whole {
            0 => part.map_or(alike.len(), |last| last + 1),
            _ => whole,
        };
        let (taken, left) = rest.split_at(count);
        all.push(Group {
            pieces: taken,
            whole: whole > 0,
        });
        rest = left;
    }
    all
}

/// The first group with a piece of the row's last document.
fn open_at(all: &[Group]) -> usize {
    let last = all.last().map(|group| group.last().document_start);
    let begin = last.unwrap_or(0);
    let before = all.iter().take_while(|g| g.last().range.end <= begin);
    before.count()
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

    /// Pieces of the largest group.
    fn most(&self, pieces: &[Vec<Piece>]) -> usize {
        let longest = pieces.iter().map(Vec::len).max().unwrap_or(1);
        slots(self.d, self.f).min(longest.max(1))
    }

    fn elements(&self) -> usize {
        self.d * self.f
    }

    /// What a kernel moves that reads or writes so many matrices of bf16 and of f32.
    fn moves(&self, bf16: u32, f32: u32) -> Work {
        Work::Bytes(self.elements() as f64 * f64::from(2 * bf16 + 4 * f32))
    }

    /// Thread blocks over a state: one thread per eight elements.
    fn blocks(&self) -> usize {
        self.elements().div_ceil(8 * 256)
    }

    fn grid(&self) -> (u32, u32, u32) {
        (self.blocks() as u32, 1, 1)
    }
}

struct Inputs {
    z: Buffer,
    v: Buffer,
    w0: Buffer,
    w0_is_f32: Arg,
    sizes: Sizes,
}

fn inputs([z, v]: [&Tensor<3>; 2], w0: &Tensor<2>, shape: &Shape) -> Option<Inputs> {
    let (z, v, w0) = (Buffer::of(z)?, Buffer::of(v)?, Buffer::of(w0)?);
    let f32 = match w0.dtype() {
        DType::BF16 => 0,
        DType::F32 => 1,
        _ => return None,
    };
    let sizes = Sizes {
        length: shape.length,
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

    /// What a kernel moves that reads W0 once, and so many matrices besides.
    fn moves_and_w0(&self, bf16: u32, f32: u32) -> Work {
        match self.w0_is_f32 {
            Arg::Int(0) => self.s.moves(bf16 + 1, f32),
            _ => self.s.moves(bf16, f32 + 1),
        }
    }

    /// VᵀZ of the group's pieces that are `wanted` into the slab; what it holds of others is unknown.
    fn updates(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        slab: u64,
        wanted: u32,
    ) -> Result<(), String> {
        let v = self.s.rows(self.v, row, group, self.s.d).t();
        let z = self.s.rows(self.z, row, group, self.s.f);
        let runs = runs(wanted, [&v, &z], cx.processors()?);
        products(cx, &runs, [v, z, self.s.slots(slab, group)], 0.0)
    }

    /// The group's VᵀZ from the slab on into `state` (0: none before, none kept); the slab then holds the
    /// weights that the pieces read. `squares`: ‖S‖² of each document that ends, by way of `partial`.
    fn forward(
        &self,
        cx: &mut Context,
        group: &Group,
        (slab, state): (u64, u64),
        (squares, partial): (u64, u64),
    ) -> Result<(), String> {
        let ends = group.ends();
        let pieces = group.pieces.len() as i32;
        let args = [
            Arg::Ptr(slab),
            Arg::Ptr(state),
            Arg::Ptr(partial),
            Arg::Ptr(self.w0),
            self.w0_is_f32,
            Arg::Float(self.lr),
            Arg::Int(pieces),
            Arg::Bits(group.reads()),
            Arg::Bits(group.adds()),
            Arg::Bits(group.replaces()),
            Arg::Bits(ends),
            Arg::Size(self.s.elements() as u64),
        ];
        // A state, if there is one, there and back.
        let states = if state == 0 { 0 } else { 2 };
        let slots = group.writes().count_ones() + pieces as u32;
        cx.doing(self.moves_and_w0(slots, states)).launch(
            "scan_forward",
            self.s.grid(),
            256,
            &args,
        )?;
        match ends.count_ones() as usize {
            0 => Ok(()),
            count => sum_partials(cx, squares, partial, self.s.blocks(), count),
        }
    }
}

/// `a` `b` + `beta` `c` into `c` for the pieces of `runs`.
fn products(
    cx: &mut Context,
    runs: &[Run],
    [a, b, c]: [Matrix; 3],
    beta: f32,
) -> Result<(), String> {
    for run in runs {
        cx.gemm(run.of(a), run.of(b), run.of(c), 1.0, beta)?;
    }
    Ok(())
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
                if !group.whole {
                    let inner = &group.pieces[..group.pieces.len() - 1];
                    let end = |p: &Piece| p.reads && p.write == Write::Nothing;
                    assert!(!inner.iter().any(end));
                }
            }
        }
    }
    #[test]
    fn whole_documents_share_a_group_and_longer_ones_do_not() {
        let packing = Packing::new(64, vec![vec![0, 16, 24]]).expect("ascending");
        let pieces = packing.pieces(0, 8);
        let shapes = |slots| -> Vec<(usize, bool)> {
            let all = groups(&pieces, slots);
            all.iter().map(|g| (g.pieces.len(), g.whole)).collect()
        };
        assert_eq!(shapes(8), [(8, true)]);
        assert_eq!(shapes(5), [(3, true), (5, true)]);
        assert_eq!(shapes(4), [(3, true), (4, false), (1, false)]);
    }

    #[test]
    fn rows_share_groups_only_where_no_state_would_have_to_be_kept() {
        let packing = Packing::whole_rows(2, 64);
        let shape = || {
            let pieces = (0..2).map(|row| packing.pieces(row, 8)).collect();
            Shape::new(pieces, 64, 1.0)
        };
        let flat = shape().flattened(1024, 1024);
        let ranges = flat.pieces[0].iter().map(|p| p.range.clone());
        assert!(ranges.eq((0..16).map(|i| 8 * i..8 * i + 8)));
        assert_eq!((flat.pieces.len(), flat.length), (1, 128));
        assert_eq!(flat.pieces[0][8].document_start, 64);
        // A slab of four pieces: a row's document is in two groups.
        let apart = shape().flattened(8192, 4096);
        assert_eq!((apart.pieces.len(), apart.length), (2, 64));
    }
}
