//! Keys that travel: which ones a rank sees of others, how it gets them, and how their gradients return.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};
use ttt_parallel::Receive;

use super::{SharedAttention, gradients, run};
use crate::context::Fault;
use crate::ops::attention::Saved;

/// The form of keys and values, whatever their tokens: `[B, _, G, E]`.
#[derive(Clone, Debug)]
pub struct KeyForm {
    /// B
    pub batch: usize,
    /// G
    pub groups: usize,
    /// E
    pub size: usize,
    /// Of both.
    pub dtype: DType,
    /// Where both lie.
    pub device: Device,
}

impl KeyForm {
    /// That of `k`.
    pub fn of(k: &Tensor<4>) -> Self {
        let [batch, _, groups, size] = k.dims();
        Self {
            batch,
            groups,
            size,
            dtype: k.dtype(),
            device: k.device(),
        }
    }
}

/// What the backward pass of the first queries gives.
#[derive(Debug)]
pub struct EdgeGradients {
    /// dq of the first queries, dk and dv of the first keys, which they see: `[B, first, H or G, E]`.
    pub first: Option<[Tensor<4>; 3]>,
    /// What the ranks behind give to the last keys and values, a pair for each rank.
    pub last: Vec<[Tensor<4>; 2]>,
}

impl SharedAttention {
    /// How many of this rank's queries look at keys of other ranks and are done apart: none on the first
    /// rank, those within the window of the edge where they are few, else all.
    pub fn first_queries(&self) -> usize {
        let tokens = self.packing.length();
        match (self.reach(self.context.rank()), self.spec.window) {
            (0, _) => 0,
            (_, Some(window)) if 2 * (window - 1) <= tokens => window - 1,
            _ => tokens,
        }
    }

    /// Tokens before its part that rank `rank` sees.
    pub(super) fn reach(&self, rank: usize) -> usize {
        let all = rank * self.packing.length();
        self.spec.window.map_or(all, |window| all.min(window - 1))
    }

    /// How many of the last tokens of rank `of` rank `rank` sees.
    fn seen(&self, rank: usize, of: usize) -> usize {
        let tokens = self.packing.length();
        let between = (rank - 1 - of) * tokens;
        self.reach(rank).saturating_sub(between).min(tokens)
    }

    /// The ranks before this one whose keys it sees, ascending, and how many of their last tokens.
    fn left(&self) -> Vec<(usize, usize)> {
        let rank = self.context.rank();
        let seen = (0..rank).map(|of| (of, self.seen(rank, of)));
        seen.filter(|(_, count)| *count > 0).collect()
    }

    /// The ranks behind this one that see its keys, and how many of the last.
    fn right(&self) -> Vec<(usize, usize)> {
        let rank = self.context.rank();
        let ranks = rank + 1..self.context.size();
        let seen = ranks.map(|by| (by, self.seen(by, rank)));
        seen.filter(|(_, count)| *count > 0).collect()
    }

    /// Gives the ranks behind the keys that they see, and does the first queries with those of the ranks
    /// before: their values `[B, first, H, E]`, and what [`Self::first_backward`] needs. `None` where
    /// there are no such queries. `q` and `kv` return a range of this rank's tokens.
    pub fn first(
        &self,
        form: &KeyForm,
        q: impl FnOnce(Range<usize>) -> Tensor<4>,
        kv: impl Fn(Range<usize>) -> [Tensor<4>; 2],
    ) -> Option<(Tensor<4>, Saved)> {
        let tokens = self.packing.length();
        let right = self.right().into_iter();
        let sends = right.map(|(to, count)| (to, kv(tokens - count..tokens)));
        let mut seen = self.trade(sends.collect(), &self.left(), form);
        let first = self.first_queries();
        if first == 0 {
            return None;
        }
        seen.push(kv(0..first));
        let (k, v): (Vec<_>, Vec<_>) = seen.into_iter().map(|[k, v]| (k, v)).unzip();
        let inputs = [q(0..first), Tensor::cat(k, 1), Tensor::cat(v, 1)];
        Some(run(&self.over_keys(first), inputs))
    }

    /// The backward pass of [`Self::first`]: gradients go to the ranks before and come from those behind.
    /// `dy` `[B, first, H, E]` is that of the first queries' values.
    pub fn first_backward(
        &self,
        form: &KeyForm,
        saved: Option<Saved>,
        dy: impl FnOnce(usize) -> Tensor<4>,
    ) -> EdgeGradients {
        let mut sends = vec![];
        let first = saved.map(|saved| {
            let first = self.first_queries();
            let [dq, dk, dv] = gradients(self.over_keys(first), saved, dy(first));
            let mut begin = 0;
            for (to, count) in self.left() {
                let range = begin..begin + count;
                sends.push((to, [&dk, &dv].map(|d| along(d, range.clone()))));
                begin += count;
            }
            let own = begin..begin + first;
            let [dk, dv] = [dk, dv].map(|d| along(&d, own.clone()));
            [dq, dk, dv]
        });
        let mut last = self.trade(sends, &self.right(), form);
        if self.context.planted(Fault::KeyGradientDropped) {
            last.clear();
        }
        EdgeGradients { first, last }
    }

    /// Sends strips of keys and values, each pair flat and end to end, and receives others from ranks,
    /// of so many tokens each: zeros if that fails.
    fn trade(
        &self,
        sends: Vec<(usize, [Tensor<4>; 2])>,
        receives: &[(usize, usize)],
        form: &KeyForm,
    ) -> Vec<[Tensor<4>; 2]> {
        if sends.is_empty() && receives.is_empty() {
            return vec![];
        }
        let KeyForm {
            batch,
            groups,
            size,
            dtype,
            ref device,
        } = *form;
        let len = |count: usize| batch * count * groups * size;
        let sends = sends.into_iter().map(|(to, [k, v])| {
            let both = vec![k.reshape([-1]), v.reshape([-1])];
            (to, Tensor::<1>::cat(both, 0))
        });
        let expected = receives.iter().map(|&(from, count)| Receive {
            from,
            len: 2 * len(count),
            dtype,
            device: device.clone(),
        });
        let (sends, expected) = (sends.collect(), expected.collect());
        let received = self
            .context
            .exchange(|group| group.exchange(sends, expected));
        let parts = receives.iter().enumerate().map(|(i, &(_, count))| {
            let flat = match &received {
                Some(received) => received[i].clone(),
                None => Tensor::zeros([2 * len(count)], (device, dtype)),
            };
            [0, 1].map(|half| {
                let half = flat.clone().narrow(0, half * len(count), len(count));
                half.reshape([batch, count, groups, size])
            })
        });
        parts.collect()
    }
}

/// Tokens `range`: `[B, N, G, E]`.
pub fn along(x: &Tensor<4>, range: Range<usize>) -> Tensor<4> {
    let rows = x.dims()[0];
    x.clone().slice([0..rows, range])
}
