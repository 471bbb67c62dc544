//! The products of one group in the backward pass, and the kernel between them.

use burn::tensor::DType;

use crate::cuda::gemm::Matrix;
use crate::cuda::stream::{Arg, Context};
use crate::cuda::sublayer::through_swiglu;
use crate::cuda::ttt::scanned::Sums;
use crate::cuda::ttt::selection::{Run, covered, runs};
use crate::cuda::ttt::{Group, Pass, products};
use crate::work::Work;

/// Thread blocks that clear one piece.
const CLEARING: u32 = 64;

/// What is multiplied for a group before its weights and sums are known, and with them.
pub(super) struct Products<'a> {
    pub pass: &'a Pass<'a>,
    /// `[B, N, D]`
    pub dy: u64,
    /// Of updates and of gradients.
    pub slabs: (u64, u64),
}

impl Products<'_> {
    /// VᵀZ of the pieces that were written, by the very products of the forward pass; where none was added,
    /// only to sum them again.
    pub fn updates(&self, cx: &mut Context, row: usize, group: &Group) -> Result<(), String> {
        let wanted = match group.adds() {
            0 if !group.whole => 0,
            _ => group.writes(),
        };
        self.pass.updates(cx, row, group, self.slabs.0, wanted)
    }

    /// The pieces that are multiplied by ηG: those that get one, and others, whose G is then zero, where
    /// that is faster.
    pub fn taken(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        gets: u32,
    ) -> Result<Vec<Run>, String> {
        let [z, sums] = self.of_targets(row, group);
        Ok(runs(gets, [&z, &sums], cx.processors()?))
    }

    /// dOᵀZ of all.
    pub fn gradients(&self, cx: &mut Context, row: usize, group: &Group) -> Result<(), String> {
        let s = self.pass.s;
        let dy = s.rows(self.dy, row, group, s.d);
        let z = s.rows(self.pass.z, row, group, s.f);
        cx.gemm(dy.t(), z, s.slots(self.slabs.1, group), 1.0, 0.0)
    }

    /// The weights that the group's pieces read and the sums of later pieces, in one kernel with their products
    /// where there is one; `there`: whether the slabs hold the products of updates, and of gradients, already.
    pub fn summed(
        &self,
        cx: &mut Context,
        (row, group): (usize, &Group),
        there: (bool, bool),
        to: &Sums,
        masks: [u32; 3],
    ) -> Result<(), String> {
        let [gets, _, taken] = masks;
        if there == (false, false)
            && self
                .pass
                .scanned_backward(cx, row, group, self.dy, to, (gets, taken))?
        {
            return Ok(());
        }
        if !there.0 && to.weights.is_some() {
            self.updates(cx, row, group)?;
        }
        if !there.1 {
            self.gradients(cx, row, group)?;
        }
        let slabs = (to.weights.unwrap_or(0), to.sums);
        let states = ([to.state, to.later], (to.dw0, to.holds));
        self.pass.gradients(cx, group, slabs, states, masks)
    }

    /// dZ = dO Wᵢ + V ηGᵢ into `dz`, that of the group.
    pub fn inner(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        dz: Matrix,
        taken: &[Run],
    ) -> Result<(), String> {
        let s = self.pass.s;
        let (weights, sums) = (s.slots(self.slabs.0, group), s.slots(self.slabs.1, group));
        cx.gemm(s.rows(self.dy, row, group, s.d), weights, dz, 1.0, 0.0)?;
        let v = s.rows(self.pass.v, row, group, s.d);
        products(cx, taken, [v, sums, dz], 1.0)
    }

    /// The same, and on through SwiGLU: `pair` is where gate and up, and their gradients, lie for all rows;
    /// `dz` is scratch for where that is no single kernel.
    pub fn through(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        ((pair, dpair), dz): ((u64, u64), Option<u64>),
        (gets, taken): (u32, &[Run]),
    ) -> Result<(), String> {
        let s = self.pass.s;
        let (count, piece) = (group.pieces.len(), group.pieces[0].range.len());
        let tokens = count * piece;
        let [pair, dpair] = [pair, dpair].map(|at| s.rows(at, row, group, 2 * s.f).at);
        let rows = [self.dy, self.pass.v].map(|at| {
            let first = s.rows(at, row, group, s.d).at;
            Matrix::new(first, tokens, s.d, DType::BF16)
        });
        let (weights, sums) = self.slabs;
        let matrices = [weights, sums].map(|at| Matrix::new(at, count * s.d, s.f, DType::BF16));
        if cx.learned_product_backward(rows, matrices, (piece, gets), (dpair, pair))? {
            return Ok(());
        }
        let dz = dz.ok_or("a product through SwiGLU was taken before and is not there now")?;
        let of_pieces = Matrix::new(dz, piece, s.f, DType::BF16).batched(count, piece * s.f);
        self.inner(cx, row, group, of_pieces, taken)?;
        through_swiglu(cx, (dpair, 0), (pair, dz), (tokens, s.f))
    }

    /// Z and ηGᵀ of the group's pieces.
    fn of_targets(&self, row: usize, group: &Group) -> [Matrix; 2] {
        let s = self.pass.s;
        let sums = s.slots(self.slabs.1, group);
        [s.rows(self.pass.z, row, group, s.f), sums.t()]
    }

    /// dV = Z ηGᵢᵀ, zero for pieces that get no G.
    pub fn targets(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        dv: u64,
        taken: &[Run],
    ) -> Result<(), String> {
        let [z, sums] = self.of_targets(row, group);
        let dv = self.pass.s.rows(dv, row, group, self.pass.s.d);
        let left_out = group.mask(|_| true) & !covered(taken);
        if left_out != 0 {
            let elements = dv.batch.1;
            let count = left_out.count_ones();
            let args = [
                Arg::Ptr(dv.at),
                Arg::Bits(left_out),
                Arg::Size(elements as u64),
            ];
            cx.doing(Work::Bytes(2.0 * f64::from(count) * elements as f64))
                .launch("clear_pieces", (CLEARING, count, 1), 256, &args)?;
        }
        products(cx, taken, [z, sums, dv], 0.0)
    }
}

impl Pass<'_> {
    /// From a group's products to the weights that its pieces read (unless they are at 0) and the sums of
    /// later pieces, of those in `taken`. S and G behind the group, before it afterwards, where it has not
    /// whole documents; dW0 gathers, where it holds something yet.
    pub fn gradients(
        &self,
        cx: &mut Context,
        group: &Group,
        (weights, sums): (u64, u64),
        ([state, later], (dw0, holds)): ([u64; 2], (u64, bool)),
        [gets, keeps, taken]: [u32; 3],
    ) -> Result<(), String> {
        let pieces = group.pieces.len() as u32;
        let [state, later] = [state, later].map(|at| if group.whole { 0 } else { at });
        let args = [
            Arg::Ptr(weights),
            Arg::Ptr(sums),
            Arg::Ptr(state),
            Arg::Ptr(later),
            Arg::Ptr(dw0),
            Arg::Int(i32::from(holds)),
            Arg::Ptr(self.w0),
            self.w0_is_f32,
            Arg::Float(self.lr),
            Arg::Int(pieces as i32),
            Arg::Bits(group.reads()),
            Arg::Bits(group.adds()),
            Arg::Bits(group.replaces()),
            Arg::Bits(gets),
            Arg::Bits(keeps),
            Arg::Bits(taken),
            Arg::Size(self.s.elements() as u64),
        ];
        let slots = pieces + taken.count_ones();
        let sums = 1 + u32::from(holds) + if group.whole { 0 } else { 4 };
        let work = match (weights, group.whole) {
            (0, _) => self.s.moves(slots, sums),
            (_, true) => self.moves_and_w0(slots + pieces + group.writes().count_ones(), sums),
            (_, false) => self.moves_and_w0(slots + pieces + group.adds().count_ones(), sums),
        };
        cx.doing(work)
            .launch("scan_backward", self.s.grid(), 256, &args)
    }
}
