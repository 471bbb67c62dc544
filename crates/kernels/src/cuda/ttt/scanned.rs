//! A group's products and running sums in one kernel, where there is one: what `updates` and `forward`, or
//! `gradients` and the kernel behind it, do in two.

use std::ops::Range;

use burn::tensor::DType;

use super::{Group, Pass};
use crate::cuda::gemm::Matrix;
use crate::cuda::hopper_scan::{Chain, Form, Matrices};
use crate::cuda::norm::sum_partials;
use crate::cuda::stream::{Arg, Context};
use crate::packing::Write;

/// A document's pieces in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Document {
    pieces: Range<usize>,
    /// Whether it began before the group.
    enters: bool,
    /// Whether it goes on behind the group.
    leaves: bool,
}

/// The documents of a group: all whole, or a part of a single one. `None` if there are others.
fn documents(group: &Group) -> Option<Vec<Document>> {
    let mut all: Vec<Document> = vec![];
    for (at, piece) in group.pieces.iter().enumerate() {
        let leaves = piece.write != Write::Nothing;
        match all.last_mut().filter(|document| document.leaves) {
            Some(document) if piece.reads && piece.write != Write::Replace => {
                document.pieces.end = at + 1;
                document.leaves = leaves;
            }
            // A document that the one before is not done with.
            Some(_) => return None,
            None => all.push(Document {
                pieces: at..at + 1,
                enters: piece.reads,
                leaves,
            }),
        }
    }
    let sound = match group.whole {
        true => all.iter().all(|d| !d.enters && !d.leaves),
        false => all.len() == 1,
    };
    sound.then_some(all)
}

/// Chains of the forward pass; pieces that are documents of their own, which read W0 and are not multiplied.
fn forward_chains(group: &Group, documents: &[Document]) -> (Vec<Chain>, Vec<usize>) {
    let (mut chains, mut alone, mut squares) = (vec![], vec![], 0..);
    for document in documents {
        let Range { start, end } = document.pieces;
        let ends = !document.leaves;
        if ends && !document.enters && end - start == 1 {
            alone.push(start);
            continue;
        }
        chains.push(Chain {
            first: start,
            steps: end - start - usize::from(ends),
            end: ends.then_some(end - 1),
            enters: document.enters,
            leaves: !group.whole,
            opens: true,
            square: squares.next().filter(|_| ends),
        });
    }
    (chains, alone)
}

/// The pieces that added, taken off the last state, and whether the first piece reads W0 itself.
fn peel_chain(document: &Document) -> (Chain, bool) {
    let Range { start, end } = document.pieces;
    // The first piece of a document replaces, and the last writes nothing.
    let (begins, ends) = (!document.enters, !document.leaves);
    let low = start + usize::from(begins);
    let high = end - usize::from(ends);
    let chain = Chain {
        first: high.saturating_sub(1),
        steps: high.saturating_sub(low),
        end: Some(low),
        enters: true,
        leaves: true,
        opens: ends,
        square: None,
    };
    (chain, begins)
}

/// Chains of the sums of later pieces. Whole documents leave their totals in the slot of their last piece, which
/// gets no sum; the other's goes on, begun by what is behind the group if its last piece `gets` that.
fn backward_chains(group: &Group, documents: &[Document], gets: u32) -> Vec<Chain> {
    let chain = |document: &Document| {
        let last = document.pieces.end - 1;
        let enters = gets >> last & 1 == 1;
        Chain {
            first: last,
            steps: document.pieces.len(),
            end: group.whole.then_some(last),
            enters,
            leaves: !group.whole,
            opens: enters,
            square: None,
        }
    };
    documents.iter().map(chain).collect()
}

/// Where the sums of a backward pass are.
pub(super) struct Sums {
    /// Slab of the weights that pieces read; `None` where they are known.
    pub weights: Option<u64>,
    /// Slab of the sums of later pieces.
    pub sums: u64,
    /// S and G behind the group, before it afterwards, where it has not whole documents.
    pub state: u64,
    pub later: u64,
    pub dw0: u64,
    /// dW0 holds something yet.
    pub holds: bool,
}

impl Pass<'_> {
    /// The group's rows of a `[B, N, width]` buffer as one matrix.
    fn tokens(&self, at: u64, row: usize, group: &Group, width: usize) -> Matrix {
        let pieces = self.s.rows(at, row, group, width);
        Matrix::new(
            pieces.at,
            pieces.rows * group.pieces.len(),
            width,
            DType::BF16,
        )
    }

    fn has_w0_in_f32(&self) -> bool {
        matches!(self.w0_is_f32, Arg::Int(1))
    }

    /// W0 into the slots of `pieces`.
    fn round_w0(&self, cx: &mut Context, slab: u64, pieces: &[usize]) -> Result<(), String> {
        for piece in pieces {
            // A group of one piece that reads no state and writes none.
            let args = [
                Arg::Ptr(slab + (2 * piece * self.s.elements()) as u64),
                Arg::Ptr(0),
                Arg::Ptr(0),
                Arg::Ptr(self.w0),
                self.w0_is_f32,
                Arg::Float(self.lr),
                Arg::Int(1),
                Arg::Bits(0),
                Arg::Bits(0),
                Arg::Bits(0),
                Arg::Bits(0),
                Arg::Size(self.s.elements() as u64),
            ];
            cx.doing(self.moves_and_w0(1, 0))
                .launch("scan_forward", self.s.grid(), 256, &args)?;
        }
        Ok(())
    }

    /// [`Pass::updates`] and [`Pass::forward`] in one; squared norms only if `squares` is not 0. Returns whether
    /// there is a kernel for the group; else nothing was done.
    pub(super) fn scanned_forward(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        (slab, state): (u64, u64),
        (squares, partial): (u64, u64),
    ) -> Result<bool, String> {
        let Some(documents) = documents(group).filter(|_| self.has_w0_in_f32()) else {
            return Ok(false);
        };
        let (mut chains, alone) = forward_chains(group, &documents);
        let norms = match squares {
            0 => 0,
            _ => group.ends().count_ones() as usize,
        };
        if norms == 0 {
            chains.iter_mut().for_each(|chain| chain.square = None);
        }
        let to = Matrices {
            slots: slab,
            w0: self.w0,
            enter: state,
            leave: state,
            squares: partial,
        };
        let from = [
            self.tokens(self.v, row, group, self.s.d),
            self.tokens(self.z, row, group, self.s.f),
        ];
        let tokens = group.pieces[0].range.len();
        let parts =
            cx.scanned_product(Form::Forward, &chains, from, tokens, (to, norms), self.lr)?;
        let Some(parts) = parts else {
            return Ok(false);
        };
        self.round_w0(cx, slab, &alone)?;
        if norms > 0 {
            sum_partials(cx, squares, partial, parts, norms)?;
        }
        Ok(true)
    }

    /// dOᵀZ of `dy`, unless they are known the weights that the pieces read, and [`Pass::gradients`] in two
    /// kernels and a sum for dW0. `gets`, `taken` as there. Returns whether there are kernels for the group; else
    /// nothing was done.
    pub(super) fn scanned_backward(
        &self,
        cx: &mut Context,
        row: usize,
        group: &Group,
        dy: u64,
        to: &Sums,
        (gets, taken): (u32, u32),
    ) -> Result<bool, String> {
        let Some(documents) = documents(group).filter(|_| self.has_w0_in_f32()) else {
            return Ok(false);
        };
        let lasts = documents
            .iter()
            .fold(0, |mask, d| mask | 1 << (d.pieces.end - 1));
        // All but the last of a document get a sum, and that too if its document goes on.
        let rest = group.mask(|_| true) & !lasts;
        if gets & !lasts != rest || (group.whole && gets != rest) {
            return Ok(false);
        }
        let chains = backward_chains(group, &documents, gets);
        let tokens = group.pieces[0].range.len();
        let z = self.tokens(self.z, row, group, self.s.f);
        let [dy, v] = [dy, self.v].map(|at| self.tokens(at, row, group, self.s.d));
        // Both halves or none: a state is gone once it is peeled.
        let (weights, form, first) = match group.whole {
            true => (forward_chains(group, &documents), Form::Forward, false),
            false => {
                let (chain, begins) = peel_chain(&documents[0]);
                ((vec![chain], vec![]), Form::Peel, begins)
            }
        };
        let (mut weights, mut alone) = weights;
        weights.iter_mut().for_each(|chain| chain.square = None);
        alone.extend(first.then_some(0));
        let fits = cx.scanned_fits(Form::Backward, &chains, [&dy, &z], tokens)?
            && (to.weights.is_none() || cx.scanned_fits(form, &weights, [&v, &z], tokens)?);
        if !fits {
            return Ok(false);
        }
        let refused = || "a product with running sums was taken and is not there now".to_string();
        if let Some(slab) = to.weights {
            let of = Matrices {
                slots: slab,
                w0: self.w0,
                enter: to.state,
                leave: to.state,
                squares: 0,
            };
            cx.scanned_product(form, &weights, [v, z], tokens, (of, 0), self.lr)?
                .ok_or_else(refused)?;
            self.round_w0(cx, slab, &alone)?;
        }
        let mut holds = to.holds;
        let enters = chains.iter().any(|chain| chain.enters);
        if enters {
            // The pieces behind the group have given theirs.
            self.totals(cx, to, holds, (0, 0), (to.later, 0))?;
            holds = true;
        }
        let of = Matrices {
            slots: to.sums,
            enter: to.later,
            leave: to.later,
            ..Matrices::default()
        };
        cx.scanned_product(Form::Backward, &chains, [dy, z], tokens, (of, 0), self.lr)?
            .ok_or_else(refused)?;
        let clears = taken & !gets;
        match group.whole {
            true => self.totals(cx, to, holds, (lasts, clears), (0, 0))?,
            false => self.totals(cx, to, holds, (0, clears), (0, to.later))?,
        }
        Ok(true)
    }

    /// dW0 gathers the slots in `totals`, and `before` less `behind`; then those in `clears` are zero.
    fn totals(
        &self,
        cx: &mut Context,
        to: &Sums,
        holds: bool,
        (totals, clears): (u32, u32),
        (behind, before): (u64, u64),
    ) -> Result<(), String> {
        let args = [
            Arg::Ptr(to.sums),
            Arg::Bits(totals),
            Arg::Bits(clears),
            Arg::Ptr(behind),
            Arg::Ptr(before),
            Arg::Ptr(to.dw0),
            Arg::Int(i32::from(holds)),
            Arg::Size(self.s.elements() as u64),
        ];
        let states = [behind, before].iter().filter(|&&at| at != 0).count() as u32;
        let slots = totals.count_ones() + clears.count_ones();
        cx.doing(self.s.moves(slots, 1 + states + u32::from(holds)))
            .launch("scan_totals", self.s.grid(), 256, &args)
    }
}

#[cfg(test)]
mod tests {
    use super::super::groups;
    use super::*;
    use crate::packing::Packing;

    #[test]
    fn documents_of_a_group_are_found_whole_or_one_in_part() {
        let packing = Packing::new(64, vec![vec![0, 16, 24]]).expect("ascending");
        let pieces = packing.pieces(0, 8);
        let of = |slots| -> Vec<Vec<(Range<usize>, bool, bool)>> {
            let all = groups(&pieces, slots);
            let list = |group: &Group| {
                let all = documents(group).expect("documents");
                all.into_iter()
                    .map(|d| (d.pieces, d.enters, d.leaves))
                    .collect()
            };
            all.iter().map(list).collect()
        };
        let whole = |range| (range, false, false);
        assert_eq!(of(8), [vec![whole(0..2), whole(2..3), whole(3..8)]]);
        let first = vec![whole(0..2), whole(2..3)];
        assert_eq!(
            of(4),
            [first, vec![(0..4, false, true)], vec![(0..1, true, false)]]
        );
    }

    #[test]
    fn every_piece_gets_its_slot_once_forward_and_on_the_way_back() {
        let packing = Packing::new(64, vec![vec![0, 16, 24]]).expect("ascending");
        let pieces = packing.pieces(0, 8);
        for slots in [2, 3, 4, 8] {
            for group in groups(&pieces, slots) {
                let documents = documents(&group).expect("documents");
                let n = group.pieces.len();
                // Slots that the kernel writes, as its source says.
                let (chains, mut written) = forward_chains(&group, &documents);
                for chain in &chains {
                    written.push(chain.first);
                    written.extend((1..chain.steps).map(|i| chain.first + i));
                    written.extend(chain.end.filter(|_| chain.steps > 0));
                    let squares = chain.square.map(|k| k as u32);
                    assert!(squares.is_none_or(|k| k < group.ends().count_ones()));
                }
                written.sort();
                assert_eq!(written, (0..n).collect::<Vec<_>>(), "{slots} {group:?}");
                if group.whole || group.adds() == 0 {
                    continue;
                }
                let (chain, begins) = peel_chain(&documents[0]);
                let mut written: Vec<usize> = (0..chain.steps).map(|i| chain.first - i).collect();
                assert_eq!(chain.end, written.last().copied());
                written.extend(chain.opens.then_some(chain.first + 1));
                written.extend(begins.then_some(0));
                written.sort();
                assert_eq!(written, (0..n).collect::<Vec<_>>(), "{slots} {group:?}");
            }
        }
    }
}
