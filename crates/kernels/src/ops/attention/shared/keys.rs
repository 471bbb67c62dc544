//! Keys that travel: which ones a rank sees of others, how it gets them, and how their gradients return.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};
use ttt_parallel::{Pending, Receive};

use super::square::{Merged, Square};
use super::{SharedAttention, gradients, run};
use crate::context::{ATTENTION, Fault};
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

    /// Elements of `tokens` tokens of one of the two.
    fn elements(&self, tokens: usize) -> usize {
        self.batch * tokens * self.groups * self.size
    }
}

/// Strips of keys and values, or of their gradients, on their way between ranks. What needs none of them
/// is done before they are waited for.
#[derive(Debug)]
pub struct Strips {
    form: KeyForm,
    /// Ranks from which some come, and of how many tokens.
    receives: Vec<(usize, usize)>,
    /// `None` if nothing travels, or a rank is lost.
    coming: Option<Pending<Vec<Tensor<1>>>>,
}

/// What the first queries give before it is put into what this rank's tokens give among themselves
/// ([`SharedAttention::joined`]).
#[derive(Debug)]
pub enum OfFirst {
    /// Done with all the keys that they see.
    Apart {
        /// Their values: `[B, first, H, E]`.
        output: Box<Tensor<4>>,
        /// For the backward pass.
        saved: Box<Saved>,
    },
    /// Done with the keys of the strip alone.
    Square(Box<Square>),
}

/// What is kept of the first queries for the backward pass.
#[derive(Clone, Debug)]
pub enum First {
    /// They were done with all the keys that they see.
    Apart(Box<Saved>),
    /// Keys and values of the strip; the rest is with all queries.
    Square(Box<[Tensor<4>; 2]>),
}

/// What the backward pass of the first queries gives.
#[derive(Debug)]
pub struct EdgeGradients {
    /// To this rank's tokens.
    pub first: Option<AtFirst>,
    /// What the ranks behind give to the last keys and values ([`SharedAttention::returned`]).
    pub last: Strips,
}

/// What the backward pass of the first queries gives to this rank's tokens.
#[derive(Debug)]
pub enum AtFirst {
    /// dq of the first queries, dk and dv of the first keys, which they see: `[B, first, H or G, E]`. The
    /// first queries take no part in the backward pass of the tokens among themselves.
    Apart(Box<[Tensor<4>; 3]>),
    /// What belongs to dq of the first queries beside that of the tokens among themselves.
    Square(Box<Tensor<4>>),
}

impl SharedAttention {
    /// How many of this rank's queries look at keys of other ranks, or are done as if they did: none on
    /// the first rank, those within the window of the edge where they are few, else all.
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

    /// Begins to give the ranks behind the keys that they see, and to fetch those that the first queries
    /// see. `kv` returns a range of this rank's tokens.
    pub fn begin(&self, form: KeyForm, kv: impl Fn(Range<usize>) -> [Tensor<4>; 2]) -> Strips {
        let tokens = self.packing.length();
        let right = self.right().into_iter();
        let sends = right.map(|(to, count)| (to, kv(tokens - count..tokens)));
        self.trade(sends.collect(), self.left(), form)
    }

    /// Does the first queries with the keys that were fetched. `None` where there are no such queries.
    /// `q` and `kv` return a range of this rank's tokens.
    pub fn first(
        &self,
        strips: Strips,
        q: impl FnOnce(Range<usize>) -> Tensor<4>,
        kv: impl Fn(Range<usize>) -> [Tensor<4>; 2],
    ) -> Option<OfFirst> {
        let mut seen = self.arrived(strips);
        let first = self.first_queries();
        if first == 0 {
            return None;
        }
        let q = q(0..first);
        // A square needs the strip whole: from one rank.
        if let [strip] = seen.as_slice()
            && let Some(square) = self.over_square(&q, strip)
        {
            return Some(OfFirst::Square(Box::new(square)));
        }
        seen.push(kv(0..first));
        let (k, v): (Vec<_>, Vec<_>) = seen.into_iter().map(|[k, v]| (k, v)).unzip();
        let inputs = [q, Tensor::cat(k, 1), Tensor::cat(v, 1)];
        let (output, saved) = run(&self.over_keys(first), inputs);
        Some(OfFirst::Apart {
            output: Box::new(output),
            saved: Box::new(saved),
        })
    }

    /// The backward pass of [`Self::first`]: gradients begin to go to the ranks before and to come from
    /// those behind. `dy` `[B, first, H, E]` is that of the first queries' values; `merged` is asked for
    /// where they were done as a square.
    pub fn first_backward(
        &self,
        form: KeyForm,
        saved: Option<First>,
        dy: impl FnOnce(usize) -> Tensor<4>,
        merged: impl FnOnce(usize) -> Merged,
    ) -> EdgeGradients {
        let mut sends = vec![];
        let first = saved.map(|saved| {
            let first = self.first_queries();
            let apart = matches!(saved, First::Apart(_));
            let [dq, dk, dv] = match saved {
                First::Apart(saved) => gradients(self.over_keys(first), *saved, dy(first)),
                First::Square(strip) => self.square_backward(*strip, merged(first)),
            };
            let mut begin = 0;
            for (to, count) in self.left() {
                let range = begin..begin + count;
                sends.push((to, [&dk, &dv].map(|d| along(d, range.clone()))));
                begin += count;
            }
            if !apart {
                return AtFirst::Square(Box::new(dq));
            }
            let own = begin..begin + first;
            let [dk, dv] = [dk, dv].map(|d| along(&d, own.clone()));
            AtFirst::Apart(Box::new([dq, dk, dv]))
        });
        let last = self.trade(sends, self.right(), form);
        EdgeGradients { first, last }
    }

    /// The gradients of this rank's last keys and values that the ranks behind gave, a pair for each rank.
    pub fn returned(&self, strips: Strips) -> Vec<[Tensor<4>; 2]> {
        let returned = self.arrived(strips);
        match self.context.planted(Fault::KeyGradientDropped) {
            true => vec![],
            false => returned,
        }
    }

    /// Begins to send strips of keys and values, each pair flat and end to end, and to receive others
    /// from ranks, of so many tokens each.
    fn trade(
        &self,
        sends: Vec<(usize, [Tensor<4>; 2])>,
        receives: Vec<(usize, usize)>,
        form: KeyForm,
    ) -> Strips {
        let sends = sends.into_iter().map(|(to, [k, v])| {
            let both = vec![k.reshape([-1]), v.reshape([-1])];
            (to, Tensor::<1>::cat(both, 0))
        });
        let due = receives.iter().map(|&(from, count)| Receive {
            from,
            len: 2 * form.elements(count),
            dtype: form.dtype,
            device: form.device.clone(),
        });
        let (sends, due): (Vec<_>, Vec<_>) = (sends.collect(), due.collect());
        let coming = match sends.is_empty() && due.is_empty() {
            true => None,
            false => self
                .context
                .exchange(ATTENTION, |group| group.start_exchange(sends, due)),
        };
        Strips {
            form,
            receives,
            coming,
        }
    }

    /// The strips, a pair from each rank: zeros if one is lost.
    fn arrived(&self, strips: Strips) -> Vec<[Tensor<4>; 2]> {
        let Strips {
            form,
            receives,
            coming,
        } = strips;
        let received =
            coming.and_then(|coming| self.context.exchange(ATTENTION, |_| coming.wait()));
        let parts = receives.iter().enumerate().map(|(i, &(_, count))| {
            let len = form.elements(count);
            let flat = match &received {
                Some(received) => received[i].clone(),
                None => Tensor::zeros([2 * len], (&form.device, form.dtype)),
            };
            [0, 1].map(|half| {
                let half = flat.clone().narrow(0, half * len, len);
                half.reshape([form.batch, count, form.groups, form.size])
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
