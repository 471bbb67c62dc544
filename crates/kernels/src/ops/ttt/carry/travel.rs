//! Sums on their way: begun early, passed on in between, waited for late.
//!
//! A rank's own sums are known before anything is computed with those that arrive, so they travel while
//! it does what does not need them. Two of the three ways have two legs, and a rank must pass on what
//! arrives by the first: [`Exchange::pass_on`] is to be called once some of that work is under way.

use burn::tensor::Tensor;
use ttt_parallel::{CommError, Pending, ProcessGroup, Receive};

use super::Carry;
use crate::context::{STATES, StateExchange};

/// One exchange of sums, under way.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// Rows of the batch.
    rows: usize,
    /// `None` where no document lies on two ranks.
    travel: Option<Travel<'a>>,
}

#[derive(Debug)]
struct Travel<'a> {
    carry: Carry<'a>,
    /// R rows.
    crossing: Vec<usize>,
    /// This rank's sum of each: D F elements.
    own: Vec<Tensor<1>>,
    stage: Stage,
}

/// Sums of the crossing rows, `None` where this rank needs none.
type Sums = Vec<Option<Tensor<1>>>;

#[derive(Debug)]
enum Stage {
    /// Slices of all sums come here, to be added up for all ranks.
    Slices(Pending),
    /// The slices of this rank's sums come back.
    Returning(Pending),
    /// All sums of all ranks come here.
    Gathering(Pending),
    /// The neighbour's sum comes here.
    Receiving(Pending<Vec<Tensor<1>>>),
    /// All is here; this rank's own may still be on its way to the next.
    Here(Sums, Option<Pending<Vec<Tensor<1>>>>),
    /// A rank is lost.
    Lost,
}

impl<'a> Exchange<'a> {
    /// Of rows that no other rank has a part of.
    pub fn none(rows: usize) -> Self {
        Self { rows, travel: None }
    }

    pub(super) fn start(carry: Carry<'a>, crossing: Vec<usize>, own: Vec<Tensor<1>>) -> Self {
        let rows = carry.packing.rows().len();
        if crossing.is_empty() {
            return Self::none(rows);
        }
        let mut travel = Travel {
            carry,
            crossing,
            own,
            stage: Stage::Lost,
        };
        travel.step(Travel::begin);
        if !matches!(travel.stage, Stage::Receiving(_)) {
            travel.own.clear(); // only a chain adds to what it receives
        }
        let travel = Some(travel);
        Self { rows, travel }
    }

    /// Whether anything is exchanged.
    pub fn travels(&self) -> bool {
        self.travel.is_some()
    }

    /// Whether a sum will arrive for `row`.
    pub fn arrives(&self, row: usize) -> bool {
        let travel = self.travel.as_ref();
        travel.is_some_and(|travel| travel.carry.arrives(row))
    }

    /// Passes on what other ranks wait for, once: waits for the first leg, if there is a second.
    pub fn pass_on(&mut self) {
        if let Some(travel) = &mut self.travel
            && travel.has_another_leg()
        {
            travel.step(Travel::next);
        }
    }

    /// What arrived for each row, D×F: the sum of the other ranks' own, `None` where no document comes
    /// from there; zeros if a rank is lost.
    pub fn finish(mut self) -> Vec<Option<Tensor<2>>> {
        let mut arrived = vec![None; self.rows];
        self.pass_on();
        let Some(mut travel) = self.travel else {
            return arrived;
        };
        travel.step(Travel::end);
        let Travel {
            carry,
            crossing,
            stage,
            ..
        } = travel;
        let sums = match stage {
            Stage::Here(sums, _) => sums,
            _ => vec![None; crossing.len()],
        };
        for (row, sum) in crossing.into_iter().zip(sums) {
            if carry.arrives(row) {
                let sum = sum.unwrap_or_else(|| carry.zeros(carry.elements()));
                arrived[row] = Some(sum.reshape(carry.shape));
            }
        }
        arrived
    }
}

impl Travel<'_> {
    /// From one stage to the next, unless a rank is lost.
    fn step(
        &mut self,
        to: impl FnOnce(&Self, &dyn ProcessGroup, Stage) -> Result<Stage, CommError>,
    ) {
        let stage = std::mem::replace(&mut self.stage, Stage::Lost);
        let context = self.carry.context;
        let next = context.exchange(STATES, |group| to(self, group, stage));
        self.stage = next.unwrap_or(Stage::Lost);
    }

    fn has_another_leg(&self) -> bool {
        match self.stage {
            Stage::Slices(_) => true,
            Stage::Receiving(_) => self.behind().is_some(),
            _ => false,
        }
    }

    fn begin(&self, group: &dyn ProcessGroup, _: Stage) -> Result<Stage, CommError> {
        let carry = &self.carry;
        let states = carry.context.settings.states;
        Ok(match states.among(group.size()) {
            StateExchange::AllToAll | StateExchange::Auto => {
                let slices = carry.packed(self.slices(group.size()));
                Stage::Slices(group.start_all_to_all(slices)?)
            }
            StateExchange::AllGather => {
                let own = carry.packed(Tensor::cat(self.own.clone(), 0));
                Stage::Gathering(group.start_all_gather(own)?)
            }
            StateExchange::Chain => match self.due() {
                Some(due) => Stage::Receiving(group.start_exchange(vec![], vec![due])?),
                None => self.handed_on(group, vec![None; self.crossing.len()])?,
            },
        })
    }

    /// Takes what the first leg brought and begins the second.
    fn next(&self, group: &dyn ProcessGroup, stage: Stage) -> Result<Stage, CommError> {
        Ok(match stage {
            Stage::Slices(coming) => {
                let slices = self.carry.unpacked(coming.wait()?);
                let sums = self.carry.packed(self.sums_of(slices, group.size()));
                Stage::Returning(group.start_all_to_all(sums)?)
            }
            Stage::Receiving(coming) => {
                let sums = self.received(coming.wait()?);
                self.handed_on(group, sums)?
            }
            other => other,
        })
    }

    fn end(&self, group: &dyn ProcessGroup, stage: Stage) -> Result<Stage, CommError> {
        let sums = match stage {
            Stage::Returning(coming) => {
                self.rows_of(self.carry.unpacked(coming.wait()?), group.size())
            }
            Stage::Gathering(coming) => {
                self.scanned(self.carry.unpacked(coming.wait()?), group.size())
            }
            Stage::Receiving(coming) => self.received(coming.wait()?),
            Stage::Here(sums, sending) => {
                sending.map_or(Ok(vec![]), Pending::wait)?;
                sums
            }
            Stage::Slices(_) | Stage::Lost => return Ok(Stage::Lost),
        };
        Ok(Stage::Here(sums, None))
    }

    /// M = ⌈D F / P⌉
    fn slice(&self, ranks: usize) -> usize {
        self.carry.elements().div_ceil(ranks)
    }

    /// `[A, B, M]` → `[B, A, M]`
    fn turned(&self, flat: Tensor<1>, [a, b]: [usize; 2]) -> Tensor<1> {
        let t: Tensor<3> = flat.reshape([a as i32, b as i32, -1]);
        t.swap_dims(0, 1).reshape([-1])
    }

    /// The own sums, part by part for the ranks: `[P, R, M]`.
    fn slices(&self, ranks: usize) -> Tensor<1> {
        let padding = self.slice(ranks) * ranks - self.carry.elements();
        let own = self.own.iter().map(|sum| match padding {
            0 => sum.clone(),
            _ => Tensor::cat(vec![sum.clone(), self.carry.zeros(padding)], 0),
        });
        let own = Tensor::cat(own.collect(), 0);
        self.turned(own, [self.crossing.len(), ranks])
    }

    /// This rank's slice of what each rank needs, given the same slice of what each has: `[P, R, M]`.
    fn sums_of(&self, slices: Tensor<1>, ranks: usize) -> Tensor<1> {
        let (rows, slice) = (self.crossing.len(), self.slice(ranks));
        let at = |rank: usize, row: usize| {
            let begin = (rank * rows + row) * slice;
            slices.clone().narrow(0, begin, slice)
        };
        let sums: Vec<_> = self
            .crossing
            .iter()
            .enumerate()
            .map(|(i, &row)| {
                let all: Vec<Tensor<1>> = (0..ranks).map(|rank| at(rank, i)).collect();
                self.carry.scan(row, &all)
            })
            .collect();
        let parts = (0..ranks).flat_map(|rank| {
            let of_rank = sums.iter().map(move |of_row| of_row[rank].clone());
            of_rank.map(|sum| sum.unwrap_or_else(|| self.carry.zeros(slice)))
        });
        Tensor::cat(parts.collect(), 0)
    }

    /// Each row's sum, of the slices that came back: `[P, R, M]`.
    fn rows_of(&self, sums: Tensor<1>, ranks: usize) -> Sums {
        let sums = self.turned(sums, [ranks, self.crossing.len()]);
        let each = self.slice(ranks) * ranks;
        let row = |i: usize| sums.clone().narrow(0, i * each, self.carry.elements());
        (0..self.crossing.len()).map(|i| Some(row(i))).collect()
    }

    /// Each row's sum, given those of all ranks: `[P, R, D F]`.
    fn scanned(&self, all: Tensor<1>, ranks: usize) -> Sums {
        let (rows, each) = (self.crossing.len(), self.carry.elements());
        let sums = self.crossing.iter().enumerate().map(|(i, &row)| {
            let of_rank = |rank: usize| {
                let begin = (rank * rows + i) * each;
                all.clone().narrow(0, begin, each)
            };
            let all: Vec<Tensor<1>> = (0..ranks).map(of_rank).collect();
            let rank = self.carry.context.rank();
            self.carry.scan(row, &all).swap_remove(rank)
        });
        sums.collect()
    }

    /// Of a chain, the rank before this one and the one behind it.
    fn neighbours(&self) -> [Option<usize>; 2] {
        let order = self.carry.order();
        let rank = self.carry.context.rank();
        let at = order.iter().position(|&of| of == rank);
        let beside = |by: isize| at.and_then(|at| order.get(at.checked_add_signed(by)?).copied());
        [beside(-1), beside(1)]
    }

    /// The rank that sums are handed on to, if it needs any.
    fn behind(&self) -> Option<usize> {
        let [_, behind] = self.neighbours();
        behind.filter(|&of| self.needed_by(of).contains(&true))
    }

    fn needed_by(&self, of: usize) -> Vec<bool> {
        let rows = self.crossing.iter();
        rows.map(|&row| !self.carry.sources(row, of).is_empty())
            .collect()
    }

    /// What comes from the rank before, if this one needs any.
    fn due(&self) -> Option<Receive> {
        let needed = self.needed_by(self.carry.context.rank());
        let count = needed.into_iter().filter(|&needed| needed).count();
        let [before, _] = self.neighbours();
        before.filter(|_| count > 0).map(|from| Receive {
            from,
            len: count * self.carry.elements(),
            dtype: self.carry.packed(self.carry.zeros(1)).dtype(),
            device: self.carry.device.clone(),
        })
    }

    /// Each row's sum, of those that the rank before has sent.
    fn received(&self, mut received: Vec<Tensor<1>>) -> Sums {
        let received = self.carry.unpacked(received.swap_remove(0));
        let each = self.carry.elements();
        let mut begin = 0;
        let needed = self.needed_by(self.carry.context.rank()).into_iter();
        let sums = needed.map(|needed| {
            needed.then(|| {
                begin += each;
                received.clone().narrow(0, begin - each, each)
            })
        });
        sums.collect()
    }

    /// Adds the own sums to those of the ranks before and sends them to the one behind.
    fn handed_on(&self, group: &dyn ProcessGroup, sums: Sums) -> Result<Stage, CommError> {
        let Some(behind) = self.behind() else {
            return Ok(Stage::Here(sums, None));
        };
        let needed = self.needed_by(behind).into_iter().zip(&self.crossing);
        let rows = needed.enumerate().filter(|(_, (needed, _))| *needed);
        let grown = rows.filter_map(|(i, (_, &row))| {
            let own = Some(self.own[i].clone());
            self.carry.grown(row, behind, sums[i].clone(), own)
        });
        let grown = self.carry.packed(Tensor::cat(grown.collect(), 0));
        let sending = group.start_exchange(vec![(behind, grown)], vec![])?;
        Ok(Stage::Here(sums, Some(sending)))
    }
}
