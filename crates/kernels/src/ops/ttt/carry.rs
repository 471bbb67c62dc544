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

use crate::context::{Context, Fault, Payload};
use crate::dtype::{cast, wide};
use crate::packing::Packing;

mod travel;

pub use travel::Exchange;

/// From which ranks sums come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Those before this one: fast weights.
    Before,
    /// Those behind it: their gradients.
    Behind,
}

/// Which sums go where.
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

    /// Begins to exchange the ranks' `own` sums. `own(row)` is asked for where another rank needs it.
    pub fn start(self, mut own: impl FnMut(usize) -> Tensor<2>) -> Exchange<'a> {
        let (rank, ranks) = (self.context.rank(), self.context.size());
        let all = 0..self.packing.rows().len();
        let crossing: Vec<usize> = all
            .filter(|&row| (0..ranks).any(|of| !self.sources(row, of).is_empty()))
            .collect();
        let own = crossing.iter().map(|&row| {
            let needed = (0..ranks).any(|of| self.sources(row, of).contains(&rank));
            match needed {
                true => cast(own(row), self.dtype).reshape([-1]),
                false => self.zeros(self.elements()),
            }
        });
        let own = own.collect();
        Exchange::start(self, crossing, own)
    }

    /// Whether something arrives for `row`.
    fn arrives(&self, row: usize) -> bool {
        !self.sources(row, self.context.rank()).is_empty()
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
}

#[cfg(test)]
mod order;
#[cfg(test)]
mod tests;
