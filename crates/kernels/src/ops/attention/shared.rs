//! Attention over rows that ranks share.
//!
//! Either the keys travel: a rank fetches those that its queries see from the ranks before it, and the
//! gradients of these go back there. With a window that is a strip of window − 1 tokens, whatever the
//! length of a row. Or the heads do: each rank gets some heads of all tokens.
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

/// What travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Keys,
    Heads,
}

impl Function<3> for SharedAttention {
    type Saved = Saved;

    fn forward(&self, [q, k, v]: [Value; 3]) -> Forward<Saved> {
        let (q, k, v) = (q.tensor::<4>(), k.tensor::<4>(), v.tensor::<4>());
        match self.form(k.dims()[2]) {
            Form::Keys => {
                let [k, v] = self.fetched([k, v]);
                self.inner(Form::Keys)
                    .forward([q.into(), k.into(), v.into()])
            }
            Form::Heads => {
                let [q, k, v] = self.to_heads([q, k, v]);
                let inner = self.inner(Form::Heads);
                let mut done = inner.forward([q.into(), k.into(), v.into()]);
                let [output] = self.to_tokens([done.output.tensor()]);
                done.output = output.into();
                done
            }
        }
    }

    fn backward(self, saved: Saved, dy: Value, wanted: [bool; 3]) -> [Option<Value>; 3] {
        // Saved keys have all heads, or this rank's share of them.
        let all_heads = dy.clone().tensor::<4>().dims()[2] == saved.0.dims()[2];
        let form = if all_heads { Form::Keys } else { Form::Heads };
        let inner = self.inner(form);
        let given = |gradients: [Option<Value>; 3]| -> [Tensor<4>; 3] {
            gradients.map(|g| g.expect("attention gives all of them").tensor())
        };
        match form {
            Form::Keys => {
                let [dq, dk, dv] = given(inner.backward(saved, dy, wanted));
                let [dk, dv] = self.returned([dk, dv]);
                [dq, dk, dv].map(|g| Some(g.into()))
            }
            Form::Heads => {
                let [dy] = self.to_heads([dy.tensor()]);
                let gradients = given(inner.backward(saved, dy.into(), wanted));
                self.to_tokens(gradients).map(|g| Some(g.into()))
            }
        }
    }
}

/// Whether heads can travel among `ranks`.
pub(super) fn heads_divide(groups: usize, ranks: usize) -> bool {
    groups.is_multiple_of(ranks)
}

impl SharedAttention {
    fn form(&self, groups: usize) -> Form {
        let divide = heads_divide(groups, self.context.size());
        match (self.spec.window, self.context.settings.attention) {
            (Some(_), _) | (None, AttentionExchange::Keys) => Form::Keys,
            (None, AttentionExchange::Heads) => {
                assert!(
                    divide,
                    "{groups} key-value heads among {} ranks",
                    self.context.size()
                );
                Form::Heads
            }
            (None, AttentionExchange::Auto) if divide => Form::Heads,
            (None, AttentionExchange::Auto) => Form::Keys,
        }
    }

    /// The attention that is left to this rank.
    fn inner(&self, form: Form) -> Attention {
        let here = self.packing.positions();
        let (query_offset, keys) = match form {
            Form::Heads => (0, 0..self.packing.whole().length()),
            Form::Keys => {
                let reach = self.reach(self.context.rank());
                (reach, here.start - reach..here.end)
            }
        };
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

    /// Keys and values with those before them that this rank sees: `[B, N, G, E]` → `[B, S, G, E]`.
    fn fetched(&self, [k, v]: [Tensor<4>; 2]) -> [Tensor<4>; 2] {
        let tokens = self.packing.length();
        let strip = |x: &Tensor<4>, count: usize| along(x, tokens - count..tokens);
        let right = self.right().into_iter();
        let sends = right.map(|(to, count)| (to, [strip(&k, count), strip(&v, count)]));
        let left = self.left();
        let mut parts = self.trade(sends.collect(), &left, &k);
        if parts.is_empty() {
            return [k, v];
        }
        parts.push([k, v]);
        let (k, v): (Vec<_>, Vec<_>) = parts.into_iter().map(|[k, v]| (k, v)).unzip();
        [Tensor::cat(k, 1), Tensor::cat(v, 1)]
    }

    /// The gradients of this rank's keys and values, with what other ranks give to them, from those of
    /// all that it saw: `[B, S, G, E]` → `[B, N, G, E]`.
    fn returned(&self, [dk, dv]: [Tensor<4>; 2]) -> [Tensor<4>; 2] {
        let mut begin = 0;
        let sends = self.left().into_iter().map(|(to, count)| {
            let range = begin..begin + count;
            begin += count;
            (to, [along(&dk, range.clone()), along(&dv, range)])
        });
        let sends = sends.collect();
        let right = self.right();
        let parts = self.trade(sends, &right, &dk);
        let own = begin..dk.dims()[1];
        let (mut dk, mut dv) = (along(&dk, own.clone()), along(&dv, own));
        let longest = right.iter().map(|(_, count)| *count).max().unwrap_or(0);
        if longest > 0 && !self.context.planted(Fault::KeyGradientDropped) {
            let (k, v): (Vec<_>, Vec<_>) = parts.into_iter().map(|[k, v]| (k, v)).unzip();
            (dk, dv) = (added(dk, k, longest), added(dv, v, longest));
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

/// x plus `parts` at its end, the longest of which has `longest` tokens; summed wide, rounded once.
fn added(x: Tensor<4>, parts: Vec<Tensor<4>>, longest: usize) -> Tensor<4> {
    let (tokens, dtype) = (x.dims()[1], x.dtype());
    let mut end = widen(along(&x, tokens - longest..tokens));
    for part in parts {
        let before = longest - part.dims()[1];
        let sum = along(&end, before..longest) + widen(part);
        end = match before {
            0 => sum,
            _ => Tensor::cat(vec![along(&end, 0..before), sum], 1),
        };
    }
    let end = cast(end, dtype);
    match tokens - longest {
        0 => end,
        before => Tensor::cat(vec![along(&x, 0..before), end], 1),
    }
}

#[cfg(test)]
mod tests;
