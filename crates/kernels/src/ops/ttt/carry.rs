//! What a rank's documents bring along from other ranks: the fast weights learned before its part of a
//! row, and the gradients of the fast weights that are read behind it.
//!
//! Both are sums of one D×F matrix per rank and row, whatever the length of a row: of VᵀZ over the ranks
//! before it, of dOᵀZ over the ranks behind it, from where the document begins to where it ends. A rank's
//! own is never among them (docs/in-place-ttt.md, section 11). Which ranks those are is known on the
//! host from the documents of the whole rows.
//!
//! P: ranks. R: rows that some document carries over an edge between ranks. M = ⌈D F / P⌉.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};
use ttt_parallel::{CommError, ProcessGroup, Receive};

use crate::context::{Context, Fault, Payload, StateExchange};
use crate::dtype::{cast, wide};
use crate::packing::Packing;

/// From which ranks sums come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Those before this one: fast weights.
    Before,
    /// Those behind it: their gradients.
    Behind,
}

/// One exchange of sums.
#[derive(Debug)]
pub struct Carry<'a> {
    context: &'a Context,
    packing: &'a Packing,
    from: From,
    /// D and F
    shape: [usize; 2],
    device: Device,
    /// In which sums are taken.
    dtype: DType,
}

impl<'a> Carry<'a> {
    /// Sums of `shape` over values like `like`, of the ranks that share the rows `packing` is a part of.
    ///
    /// # Panics
    /// If the part is not the one that the rank has.
    pub fn new(
        context: &'a Context,
        packing: &'a Packing,
        from: From,
        shape: [usize; 2],
        like: &Tensor<3>,
    ) -> Self {
        let (part, whole) = (packing.length(), packing.whole().length());
        assert!(
            part * context.size() == whole && packing.positions().start == part * context.rank(),
            "rank {} of {} with tokens {:?} of rows of {whole}",
            context.rank(),
            context.size(),
            packing.positions()
        );
        Self {
            context,
            packing,
            from,
            shape,
            device: like.device(),
            dtype: wide(like.dtype()),
        }
    }

    /// What arrives for each row: the sum of the other ranks' `own`, `None` where no document comes from
    /// there. `own(row)` is asked for where another rank needs it.
    pub fn exchange(&self, own: impl Fn(usize) -> Tensor<2>) -> Vec<Option<Tensor<2>>> {
        let (rank, ranks) = (self.context.rank(), self.context.size());
        let all = 0..self.packing.rows().len();
        let mut arrived = vec![None; all.len()];
        let crossing: Vec<usize> = all
            .filter(|&row| (0..ranks).any(|of| !self.sources(row, of).is_empty()))
            .collect();
        if crossing.is_empty() {
            return arrived;
        }
        let own: Vec<Tensor<1>> = crossing
            .iter()
            .map(|&row| {
                let needed = (0..ranks).any(|of| self.sources(row, of).contains(&rank));
                match needed {
                    true => cast(own(row), self.dtype).reshape([-1]),
                    false => self.zeros(self.elements()),
                }
            })
            .collect();
        let sums = self
            .context
            .exchange(|group| match self.context.settings.states {
                StateExchange::AllToAll => self.by_slices(group, &crossing, &own),
                StateExchange::Chain => self.by_chain(group, &crossing, &own),
                StateExchange::AllGather => self.by_gathering(group, &crossing, &own),
            });
        for (i, &row) in crossing.iter().enumerate() {
            if !self.sources(row, rank).is_empty() {
                let sum = sums.as_ref().and_then(|sums| sums[i].clone());
                let sum = sum.unwrap_or_else(|| self.zeros(self.elements()));
                arrived[row] = Some(sum.reshape(self.shape));
            }
        }
        arrived
    }

    /// The ranks whose sums rank `of` needs for `row`: next to it, up to where its document ends.
    fn sources(&self, row: usize, of: usize) -> Range<usize> {
        let part = self.packing.length();
        let (begin, end) = (of * part, (of + 1) * part);
        let whole = self.packing.whole().length();
        match self.from {
            From::Before if begin == 0 => 0..0,
            From::Before => {
                let document = self.document(row, begin);
                (document.start / part).min(of)..of
            }
            From::Behind if end == whole => 0..0,
            From::Behind => {
                let document = self.document(row, end - 1);
                of + 1..document.end.div_ceil(part).max(of + 1)
            }
        }
    }

    fn document(&self, row: usize, at: usize) -> Range<usize> {
        match self.context.planted(Fault::NoReset) {
            true => 0..self.packing.whole().length(),
            false => self.packing.document_around(row, at),
        }
    }

    fn elements(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    fn zeros(&self, len: usize) -> Tensor<1> {
        Tensor::zeros([len], (&self.device, self.dtype))
    }

    /// Ranks in the order in which a sum grows.
    fn order(&self) -> Vec<usize> {
        let ranks = 0..self.context.size();
        match self.from {
            From::Before => ranks.collect(),
            From::Behind => ranks.rev().collect(),
        }
    }

    /// What rank `of` needs of `row`, given what the rank next to it needs and has.
    fn grown(
        &self,
        row: usize,
        of: usize,
        before: Option<Tensor<1>>,
        neighbour: Option<Tensor<1>>,
    ) -> Option<Tensor<1>> {
        let sum = match self.sources(row, of).len() {
            0 => return None,
            1 => None,
            _ => before,
        };
        match (sum, neighbour) {
            (Some(sum), Some(own)) => Some(sum + own),
            (sum, own) => sum.or(own),
        }
    }

    /// For each rank, what it needs of `row`, given what each has.
    fn scan(&self, row: usize, all: &[Tensor<1>]) -> Vec<Option<Tensor<1>>> {
        let mut sums = vec![None; all.len()];
        let mut before = None;
        let mut neighbour = None;
        for of in self.order() {
            let sum = self.grown(row, of, before, neighbour.take());
            neighbour = Some(all[of].clone());
            sums[of] = match (self.context.planted(Fault::InclusiveScan), &sum) {
                (true, Some(sum)) => Some(sum.clone() + all[of].clone()),
                _ => sum.clone(),
            };
            before = sum;
        }
        sums
    }

    /// As it travels.
    fn packed(&self, sums: Tensor<1>) -> Tensor<1> {
        match self.context.settings.payload {
            Payload::F32 => sums,
            Payload::Bf16 => cast(sums, DType::BF16),
        }
    }

    fn unpacked(&self, sums: Tensor<1>) -> Tensor<1> {
        cast(sums, self.dtype)
    }

    /// Every rank adds up one slice for all ranks.
    fn by_slices(
        &self,
        group: &dyn ProcessGroup,
        rows: &[usize],
        own: &[Tensor<1>],
    ) -> Result<Vec<Option<Tensor<1>>>, CommError> {
        let ranks = group.size();
        let slice = self.elements().div_ceil(ranks); // M
        let padding = slice * ranks - self.elements();
        // own: [R, P, M] → [P, R, M], part by part for the ranks
        let own = own.iter().map(|sum| match padding {
            0 => sum.clone(),
            _ => Tensor::cat(vec![sum.clone(), self.zeros(padding)], 0),
        });
        let turned = |flat: Tensor<1>, [a, b]: [usize; 2]| {
            let t: Tensor<3> = flat.reshape([a, b, slice]);
            t.swap_dims(0, 1).reshape([-1])
        };
        let own = turned(Tensor::cat(own.collect(), 0), [rows.len(), ranks]);
        let slices = self.unpacked(group.all_to_all(self.packed(own))?);
        // slices: [P, R, M], from rank j what it has of this rank's slice
        let at = |rank: usize, row: usize| {
            let begin = (rank * rows.len() + row) * slice;
            slices.clone().narrow(0, begin, slice)
        };
        let sums: Vec<_> = rows
            .iter()
            .enumerate()
            .map(|(i, &row)| {
                let all: Vec<Tensor<1>> = (0..ranks).map(|rank| at(rank, i)).collect();
                self.scan(row, &all)
            })
            .collect();
        let parts = (0..ranks).flat_map(|rank| {
            let of_rank = sums.iter().map(move |of_row| of_row[rank].clone());
            of_rank.map(|sum| sum.unwrap_or_else(|| self.zeros(slice)))
        });
        let sums = self.packed(Tensor::cat(parts.collect(), 0));
        let sums = self.unpacked(group.all_to_all(sums)?);
        // [P, R, M] → [R, P, M], the slices of each row's sum
        let sums = turned(sums, [ranks, rows.len()]);
        let each = slice * ranks;
        let row = |i: usize| sums.clone().narrow(0, i * each, self.elements());
        Ok((0..rows.len()).map(|i| Some(row(i))).collect())
    }

    /// Every rank adds up what it needs itself.
    fn by_gathering(
        &self,
        group: &dyn ProcessGroup,
        rows: &[usize],
        own: &[Tensor<1>],
    ) -> Result<Vec<Option<Tensor<1>>>, CommError> {
        let own = self.packed(Tensor::cat(own.to_vec(), 0));
        let all = self.unpacked(group.all_gather(own)?);
        let each = self.elements();
        let sums = rows.iter().enumerate().map(|(i, &row)| {
            let of_rank = |rank: usize| {
                let begin = (rank * rows.len() + i) * each;
                all.clone().narrow(0, begin, each)
            };
            let all: Vec<Tensor<1>> = (0..group.size()).map(of_rank).collect();
            self.scan(row, &all).swap_remove(group.rank())
        });
        Ok(sums.collect())
    }

    /// Every rank waits for its neighbour's sum, adds its own and sends it on.
    fn by_chain(
        &self,
        group: &dyn ProcessGroup,
        rows: &[usize],
        own: &[Tensor<1>],
    ) -> Result<Vec<Option<Tensor<1>>>, CommError> {
        let order = self.order();
        let at = order.iter().position(|&rank| rank == group.rank());
        let at = at.unwrap_or_default();
        let given = |of: usize| -> Vec<bool> {
            let given = rows.iter().map(|&row| !self.sources(row, of).is_empty());
            given.collect()
        };
        let mut sums = vec![None; rows.len()];
        let needed = given(group.rank());
        let count = needed.iter().filter(|&&needed| needed).count();
        if count > 0 {
            let receive = Receive {
                from: order[at - 1],
                len: count * self.elements(),
                dtype: self.packed(self.zeros(1)).dtype(),
                device: self.device.clone(),
            };
            let mut received = group.exchange(vec![], vec![receive])?;
            let received = self.unpacked(received.swap_remove(0));
            let mut begin = 0;
            for (sum, _) in sums.iter_mut().zip(needed).filter(|(_, needed)| *needed) {
                *sum = Some(received.clone().narrow(0, begin, self.elements()));
                begin += self.elements();
            }
        }
        if let Some(&next) = order.get(at + 1) {
            let next_needs = given(next);
            let grown = rows.iter().enumerate().filter(|(i, _)| next_needs[*i]);
            let grown = grown.filter_map(|(i, &row)| {
                self.grown(row, next, sums[i].clone(), Some(own[i].clone()))
            });
            let grown: Vec<Tensor<1>> = grown.collect();
            if !grown.is_empty() {
                let sends = vec![(next, self.packed(Tensor::cat(grown, 0)))];
                group.exchange(sends, vec![])?;
            }
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests;
