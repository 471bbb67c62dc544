//! Attention over rows that ranks share.
//!
//! Either the keys travel: a rank fetches those that its queries see from the ranks before it, and the
//! gradients of these go back there. With a window that is a strip of window − 1 tokens, whatever the
//! length of a row, and only the first queries look at it: they are done apart, with the few keys that
//! they see, and everything else is the attention of this rank's own tokens. Or the heads travel: each
//! rank gets some heads of all tokens.
//!
//! P: ranks. N: tokens of this rank's part. S: tokens of the whole row, or those that are fetched.

use std::ops::Range;

use burn::tensor::Tensor;
use ttt_parallel::Receive;

use super::{Attention, AttentionSpec, Saved};
use crate::context::{AttentionExchange, Context, Fault};
use crate::dtype::{cast, widen};
use crate::function::{Forward, Function, Value};
use crate::packing::Packing;

/// [`super::attention`] on one of several ranks.
#[derive(Debug)]
pub(super) struct SharedAttention {
    pub spec: AttentionSpec,
    pub context: Context,
    /// This rank's part of the rows.
    pub packing: Packing,
}

/// What is kept for the backward pass.
#[derive(Clone, Debug)]
pub(super) enum Shared {
    /// Keys were fetched for all queries.
    Keys(Saved),
    /// Keys were fetched for the first queries alone: theirs, then that of this rank's own tokens.
    Strip(Box<[Saved; 2]>),
    /// Of this rank's share of the heads.
    Heads(Saved),
}

impl Function<3> for SharedAttention {
    type Saved = Shared;

    fn forward(&self, [q, k, v]: [Value; 3]) -> Forward<Shared> {
        let (q, k, v) = (q.tensor::<4>(), k.tensor::<4>(), v.tensor::<4>());
        if self.heads_travel(k.dims()[2]) {
            let (output, saved) = run(&self.over_heads(), self.to_heads([q, k, v]));
            let [output] = self.to_tokens([output]);
            return forward(output, Shared::Heads(saved));
        }
        let Some(first) = self.strip() else {
            let [seen_k, seen_v] = self.fetched([&k, &v], self.packing.length());
            let inner = self.over_keys(self.packing.length());
            let (output, saved) = run(&inner, [q, seen_k, seen_v]);
            return forward(output, Shared::Keys(saved));
        };
        let [seen_k, seen_v] = self.fetched([&k, &v], first);
        let strip = [along(&q, 0..first), seen_k, seen_v];
        let (output, of_strip) = run(&self.over_keys(first), strip);
        let (own, saved) = run(&self.over_own(), [q, k, v]);
        forward(
            replaced(own, output),
            Shared::Strip(Box::new([of_strip, saved])),
        )
    }

    fn backward(self, saved: Shared, dy: Value, wanted: [bool; 3]) -> [Option<Value>; 3] {
        let dy = dy.tensor::<4>();
        let gradients = |inner: Attention, saved: Saved, dy: Tensor<4>| -> [Tensor<4>; 3] {
            let gradients = inner.backward(saved, dy.into(), wanted);
            gradients.map(|g| g.expect("attention gives all of them").tensor())
        };
        let [dq, dk, dv] = match saved {
            Shared::Heads(saved) => {
                let [dy] = self.to_heads([dy]);
                self.to_tokens(gradients(self.over_heads(), saved, dy))
            }
            Shared::Keys(saved) => {
                let inner = self.over_keys(self.packing.length());
                let [dq, dk, dv] = gradients(inner, saved, dy);
                let ([dk, dv], returned) = self.returned([dk, dv]);
                let [dk, dv] = self.with_returned([dk, dv], returned);
                [dq, dk, dv]
            }
            Shared::Strip(saved) => {
                let [of_strip, saved] = *saved;
                let first = of_strip.0.dims()[1];
                let of_first = along(&dy, 0..first);
                // Without a gradient the first queries give none to q, k and v.
                let rest = replaced(dy, of_first.zeros_like());
                let strip = gradients(self.over_keys(first), of_strip, of_first);
                let [first_dq, dk, dv] = strip;
                let ([first_dk, first_dv], returned) = self.returned([dk, dv]);
                let [dq, dk, dv] = gradients(self.over_own(), saved, rest);
                let (dk, dv) = (added(dk, 0, first_dk), added(dv, 0, first_dv));
                let [dk, dv] = self.with_returned([dk, dv], returned);
                [replaced(dq, first_dq), dk, dv]
            }
        };
        [dq, dk, dv].map(|g| Some(g.into()))
    }
}

fn forward(output: Tensor<4>, saved: Shared) -> Forward<Shared> {
    Forward {
        output: output.into(),
        extra: vec![],
        saved,
    }
}

fn run(inner: &Attention, inputs: [Tensor<4>; 3]) -> (Tensor<4>, Saved) {
    let done = inner.forward(inputs.map(Value::from));
    (done.output.tensor(), done.saved)
}

/// Whether heads can travel among `ranks`.
pub(super) fn heads_divide(groups: usize, ranks: usize) -> bool {
    groups.is_multiple_of(ranks)
}

impl SharedAttention {
    fn heads_travel(&self, groups: usize) -> bool {
        let ranks = self.context.size();
        let divide = heads_divide(groups, ranks);
        match (self.spec.window, self.context.settings.attention) {
            (Some(_), _) | (None, AttentionExchange::Keys) => false,
            (None, AttentionExchange::Auto) => divide,
            (None, AttentionExchange::Heads) => {
                assert!(divide, "{groups} key-value heads among {ranks} ranks");
                true
            }
        }
    }

    /// How many queries are done apart, where the others see only this rank's own keys: those within the
    /// window of its edge, if they are few enough to be worth it.
    fn strip(&self) -> Option<usize> {
        let first = self.spec.window? - 1;
        let worth = self.reach(self.context.rank()) > 0 && 2 * first <= self.packing.length();
        worth.then_some(first)
    }

    /// Attention over all tokens, with a share of the heads.
    fn over_heads(&self) -> Attention {
        self.over(0, 0..self.packing.whole().length())
    }

    /// Attention of the first `queries` of this rank, with the keys before them.
    fn over_keys(&self, queries: usize) -> Attention {
        let begin = self.packing.positions().start;
        let reach = self.reach(self.context.rank());
        self.over(reach, begin - reach..begin + queries)
    }

    /// Attention of this rank's tokens among themselves.
    fn over_own(&self) -> Attention {
        self.over(0, self.packing.positions())
    }

    fn over(&self, query_offset: usize, keys: Range<usize>) -> Attention {
        let packing = match self.context.planted(Fault::KeysWithoutDocuments) {
            true => Packing::whole_rows(self.packing.rows().len(), keys.len()),
            false => self.packing.part(keys),
        };
        Attention {
            spec: AttentionSpec {
                query_offset,
                packing: Some(packing),
                context: None,
                ..self.spec.clone()
            },
        }
    }

    /// Tokens before its part that rank `rank` sees.
    fn reach(&self, rank: usize) -> usize {
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

    /// Sends strips of keys and values, each pair flat and end to end, and receives others of `count`
    /// tokens each: zeros if that fails.
    fn trade(
        &self,
        sends: Vec<(usize, [Tensor<4>; 2])>,
        receives: &[(usize, usize)],
        like: &Tensor<4>,
    ) -> Vec<[Tensor<4>; 2]> {
        if sends.is_empty() && receives.is_empty() {
            return vec![];
        }
        let [batch, _, groups, size] = like.dims();
        let len = |count: usize| batch * count * groups * size;
        let sends = sends.into_iter().map(|(to, [k, v])| {
            let both = vec![k.reshape([-1]), v.reshape([-1])];
            (to, Tensor::<1>::cat(both, 0))
        });
        let expected = receives.iter().map(|&(from, count)| Receive {
            from,
            len: 2 * len(count),
            dtype: like.dtype(),
            device: like.device(),
        });
        let (sends, expected) = (sends.collect(), expected.collect());
        let received = self
            .context
            .exchange(|group| group.exchange(sends, expected));
        let parts = receives.iter().enumerate().map(|(i, &(_, count))| {
            let flat = match &received {
                Some(received) => received[i].clone(),
                None => Tensor::zeros([2 * len(count)], (&like.device(), like.dtype())),
            };
            [0, 1].map(|half| {
                let range = half * len(count)..(half + 1) * len(count);
                flat.clone()
                    .slice([range])
                    .reshape([batch, count, groups, size])
            })
        });
        parts.collect()
    }

    /// The first `own` keys and values with those before them that this rank sees:
    /// `[B, N, G, E]` → `[B, S, G, E]`.
    fn fetched(&self, [k, v]: [&Tensor<4>; 2], own: usize) -> [Tensor<4>; 2] {
        let tokens = self.packing.length();
        let strip = |x: &Tensor<4>, count: usize| along(x, tokens - count..tokens);
        let right = self.right().into_iter();
        let sends = right.map(|(to, count)| (to, [strip(k, count), strip(v, count)]));
        let mut parts = self.trade(sends.collect(), &self.left(), k);
        if parts.is_empty() && own == tokens {
            return [k.clone(), v.clone()];
        }
        parts.push([along(k, 0..own), along(v, 0..own)]);
        let (k, v): (Vec<_>, Vec<_>) = parts.into_iter().map(|[k, v]| (k, v)).unzip();
        [Tensor::cat(k, 1), Tensor::cat(v, 1)]
    }

    /// Sends the gradients of fetched keys and values, `[B, S, G, E]`, to their ranks: what is left of
    /// them for this rank's own, and what the ranks behind it send of its last ones.
    fn returned(&self, [dk, dv]: [Tensor<4>; 2]) -> ([Tensor<4>; 2], Vec<[Tensor<4>; 2]>) {
        let mut begin = 0;
        let sends = self.left().into_iter().map(|(to, count)| {
            let range = begin..begin + count;
            begin += count;
            (to, [along(&dk, range.clone()), along(&dv, range)])
        });
        let sends = sends.collect();
        let parts = self.trade(sends, &self.right(), &dk);
        let own = begin..dk.dims()[1];
        ([along(&dk, own.clone()), along(&dv, own)], parts)
    }

    /// Gradients of this rank's keys and values with those of its last ones: `[B, N, G, E]`.
    fn with_returned(
        &self,
        [mut dk, mut dv]: [Tensor<4>; 2],
        returned: Vec<[Tensor<4>; 2]>,
    ) -> [Tensor<4>; 2] {
        if self.context.planted(Fault::KeyGradientDropped) {
            return [dk, dv];
        }
        for [k, v] in returned {
            let at = dk.dims()[1] - k.dims()[1];
            (dk, dv) = (added(dk, at, k), added(dv, at, v));
        }
        [dk, dv]
    }

    /// All tokens of this rank's share of the heads: `[B, N, X, E]` → `[B, P N, X/P, E]`, in one exchange.
    fn to_heads<const T: usize>(&self, tensors: [Tensor<4>; T]) -> [Tensor<4>; T] {
        let ranks = self.context.size();
        let shapes = tensors.each_ref().map(|t| {
            let [batch, tokens, heads, size] = t.dims();
            [batch, tokens, heads / ranks, size]
        });
        let parts = tensors.into_iter().zip(shapes).map(|(t, [b, n, h, e])| {
            let t: Tensor<5> = t.reshape([b, n, ranks, h, e]);
            t.permute([2, 0, 1, 3, 4]).reshape([ranks as i32, -1])
        });
        self.all_to_all(parts.collect(), shapes).map(|t| {
            let [ranks, batch, tokens, heads, size] = t.dims();
            t.swap_dims(0, 1)
                .reshape([batch, ranks * tokens, heads, size])
        })
    }

    /// The reverse: `[B, P N, X/P, E]` → `[B, N, X, E]`.
    fn to_tokens<const T: usize>(&self, tensors: [Tensor<4>; T]) -> [Tensor<4>; T] {
        let ranks = self.context.size();
        let shapes = tensors.each_ref().map(|t| {
            let [batch, tokens, heads, size] = t.dims();
            [batch, tokens / ranks, heads, size]
        });
        let parts = tensors.into_iter().zip(shapes).map(|(t, [b, n, h, e])| {
            let t: Tensor<5> = t.reshape([b, ranks, n, h, e]);
            t.swap_dims(0, 1).reshape([ranks as i32, -1])
        });
        self.all_to_all(parts.collect(), shapes).map(|t| {
            let [ranks, batch, tokens, heads, size] = t.dims();
            let t = t.permute([1, 2, 0, 3, 4]);
            t.reshape([batch, tokens, ranks * heads, size])
        })
    }

    /// Row i of each part goes to rank i; row j of each result, of the given shape, is from rank j.
    fn all_to_all<const T: usize>(
        &self,
        parts: Vec<Tensor<2>>,
        shapes: [[usize; 4]; T],
    ) -> [Tensor<5>; T] {
        let ranks = self.context.size();
        let together = Tensor::cat(parts, 1); // [P, Σ B N X/P E]
        let width = together.dims()[1];
        let flat = together.clone().reshape([-1]);
        let received = self.context.exchange(|group| group.all_to_all(flat));
        let received = match received {
            Some(received) => received.reshape([ranks, width]),
            None => together.zeros_like(),
        };
        let mut begin = 0;
        shapes.map(|[b, n, h, e]| {
            let range = begin..begin + b * n * h * e;
            begin = range.end;
            received
                .clone()
                .slice([0..ranks, range])
                .reshape([ranks, b, n, h, e])
        })
    }
}

/// Tokens `range`: `[B, N, G, E]`.
fn along(x: &Tensor<4>, range: Range<usize>) -> Tensor<4> {
    let rows = x.dims()[0];
    x.clone().slice([0..rows, range])
}

/// x with `part` added from token `at` on, summed wide and rounded once.
fn added(x: Tensor<4>, at: usize, part: Tensor<4>) -> Tensor<4> {
    let (rows, dtype) = (x.dims()[0], x.dtype());
    let range = at..at + part.dims()[1];
    let sum = cast(widen(along(&x, range.clone())) + widen(part), dtype);
    x.slice_assign([0..rows, range], sum)
}

/// x with its first tokens replaced.
fn replaced(x: Tensor<4>, first: Tensor<4>) -> Tensor<4> {
    let [rows, count, _, _] = first.dims();
    x.slice_assign([0..rows, 0..count], first)
}

#[cfg(test)]
mod tests;
