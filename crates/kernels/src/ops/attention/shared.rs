//! Attention over rows that ranks share.
//!
//! Either the keys travel: a rank fetches those that its queries see from the ranks before it, and the
//! gradients of these go back there. With a window that is a strip of window − 1 tokens, whatever the
//! length of a row, and only the first queries look at it: what they see there is half of a square, and
//! everything else is the attention of this rank's own tokens, which is done while the strip is on its
//! way. Where it is no square, the first queries are done apart, with the few keys that they see. Or the
//! heads travel: each rank gets some heads of all tokens.
//!
//! P: ranks. N: tokens of this rank's part. S: tokens of the whole row, or those that are fetched.

mod heads;
mod keys;
mod square;

use std::ops::Range;

use burn::tensor::Tensor;

use super::merge::LogSumExp;
use super::{Attention, AttentionSpec, Saved};
use crate::context::{AttentionExchange, Context, Fault};
use crate::dtype::{cast, widen};
use crate::function::{Forward, Function, Value};
use crate::packing::Packing;

pub use heads::heads_divide;
#[cfg(feature = "cuda")]
pub use keys::Strips;
pub use keys::{AtFirst, EdgeGradients, First, KeyForm, OfFirst, along};
pub use square::Merged;

/// [`super::attention`] on one of several ranks.
#[derive(Debug)]
pub struct SharedAttention {
    spec: AttentionSpec,
    context: Context,
    /// This rank's part of the rows.
    packing: Packing,
}

/// What is kept for the backward pass.
#[derive(Clone, Debug)]
pub enum Shared {
    /// Of the first queries, which saw other ranks' keys, and of all with this rank's own keys; `None`
    /// where there are none of the one or of the other.
    Keys(Box<(Option<First>, Option<Saved>)>),
    /// Of this rank's share of the heads.
    Heads(Box<Saved>),
}

impl Function<3> for SharedAttention {
    type Saved = Shared;

    fn forward(&self, [q, k, v]: [Value; 3]) -> Forward<Shared> {
        let (q, k, v) = (q.tensor::<4>(), k.tensor::<4>(), v.tensor::<4>());
        let (output, saved) = match self.heads_travel(k.dims()[2]) {
            true => {
                let (output, saved) = run(&self.over_heads(), self.to_heads([q, k, v]));
                let [output] = self.to_tokens([output]);
                (output, Shared::Heads(Box::new(saved)))
            }
            false => {
                let kv = |range: Range<usize>| [&k, &v].map(|x| along(x, range.clone()));
                let strips = self.begin(KeyForm::of(&k), kv);
                let own = self.has_own().then(|| {
                    let inputs = [&q, &k, &v].map(Tensor::clone);
                    run(&self.over_own(), inputs)
                });
                let first = self.first(strips, |range| along(&q, range), kv);
                self.together(own, first)
            }
        };
        Forward {
            output: output.into(),
            extra: vec![],
            saved,
        }
    }

    fn backward(self, saved: Shared, dy: Value, _: [bool; 3]) -> [Option<Value>; 3] {
        let dy = dy.tensor::<4>();
        let all = match saved {
            Shared::Heads(saved) => {
                let [dy] = self.to_heads([dy]);
                self.to_tokens(gradients(self.over_heads(), *saved, dy))
            }
            Shared::Keys(saved) => {
                let (first, own) = *saved;
                let k = match (&own, &first) {
                    (Some(own), _) => &own.1,
                    (None, Some(First::Apart(first))) => &first.1,
                    _ => unreachable!("all queries are own ones or first ones"),
                };
                let form = KeyForm::of(k);
                let of_edge = self.first_backward(
                    form,
                    first,
                    |first| along(&dy, 0..first),
                    |first| {
                        let (q, _, _, output, sums) = own.as_ref().expect("beside a square");
                        let [q, output, dy] = [q, output, &dy].map(|x| along(x, 0..first));
                        let sums = sums.first(first);
                        Merged {
                            q,
                            output,
                            sums,
                            dy,
                        }
                    },
                );
                self.with_own_backward(of_edge, own, dy)
            }
        };
        all.map(|g| Some(g.into()))
    }
}

fn run(inner: &Attention, inputs: [Tensor<4>; 3]) -> (Tensor<4>, Saved) {
    let done = inner.forward(inputs.map(Value::from));
    (done.output.tensor(), done.saved)
}

fn gradients(inner: Attention, saved: Saved, dy: Tensor<4>) -> [Tensor<4>; 3] {
    let gradients = inner.backward(saved, dy.into(), [true; 3]);
    gradients.map(|g| g.expect("attention gives all of them").tensor())
}

impl SharedAttention {
    /// The attention of `spec`, whose packing is this rank's part of the rows of its context.
    pub fn new(spec: &AttentionSpec) -> Option<Self> {
        Some(Self {
            context: spec.context.clone()?,
            packing: spec.packing.clone()?,
            spec: spec.clone(),
        })
    }

    /// Whether the values of this rank's tokens are those of attention among themselves but for the
    /// first, which [`SharedAttention::first`] gives.
    #[cfg(feature = "cuda")]
    pub fn is_own_but_for_the_first(&self, groups: usize) -> bool {
        !self.heads_travel(groups) && self.has_own()
    }

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

    /// Whether there are queries that see none but this rank's keys.
    fn has_own(&self) -> bool {
        self.first_queries() < self.packing.length()
    }

    /// The values of all queries, of this rank's tokens among themselves and of the first; and both for the
    /// backward pass.
    fn together(
        &self,
        own: Option<(Tensor<4>, Saved)>,
        first: Option<OfFirst>,
    ) -> (Tensor<4>, Shared) {
        let keys = |first, own| Shared::Keys(Box::new((first, own)));
        match (own, first) {
            // One output is kept, written in place.
            (Some((own, (q, k, v, kept, sums))), Some(first)) => {
                drop(kept);
                let (output, sums, first) = self.joined(first, own, sums);
                let saved = (q, k, v, output.clone(), sums);
                (output, keys(Some(first), Some(saved)))
            }
            (Some((output, saved)), None) => (output, keys(None, Some(saved))),
            (None, Some(OfFirst::Apart { output, saved })) => {
                (*output, keys(Some(First::Apart(saved)), None))
            }
            (None, _) => unreachable!("all queries are own ones or first ones"),
        }
    }

    /// `own`, the values of this rank's tokens among themselves, and their sums of exponentials, with those
    /// of the first queries; and what [`Self::first_backward`] needs of these.
    pub fn joined(
        &self,
        first: OfFirst,
        own: Tensor<4>,
        sums: LogSumExp,
    ) -> (Tensor<4>, LogSumExp, First) {
        match first {
            // The backward pass multiplies the sums of the first queries by their gradient, zero.
            OfFirst::Apart { output, saved } => (replaced(own, *output), sums, First::Apart(saved)),
            OfFirst::Square(square) => {
                let (output, sums) = self.with_square(&square, own, sums);
                (output, sums, First::Square(Box::new(square.strip)))
            }
        }
    }

    /// dq, dk and dv of this rank's tokens, given what the edges give.
    fn with_own_backward(
        &self,
        EdgeGradients { first, last }: EdgeGradients,
        own: Option<Saved>,
        dy: Tensor<4>,
    ) -> [Tensor<4>; 3] {
        let [dq, mut dk, mut dv] = match (first, own) {
            (Some(AtFirst::Apart(all)), None) => *all,
            (Some(AtFirst::Square(first_dq)), own) => {
                let own = own.expect("beside a square");
                let [dq, dk, dv] = gradients(self.over_own(), own, dy);
                [added(dq, 0, *first_dq), dk, dv]
            }
            (None, own) => gradients(self.over_own(), own.expect("all queries"), dy),
            (Some(AtFirst::Apart(first)), Some(own)) => {
                let [first_dq, first_dk, first_dv] = *first;
                // Without a gradient the first queries give none to q, k and v.
                let rest = replaced(dy, first_dq.zeros_like());
                let [dq, dk, dv] = gradients(self.over_own(), own, rest);
                let (dk, dv) = (added(dk, 0, first_dk), added(dv, 0, first_dv));
                [replaced(dq, first_dq), dk, dv]
            }
        };
        for [k, v] in self.returned(last) {
            let at = dk.dims()[1] - k.dims()[1];
            (dk, dv) = (added(dk, at, k), added(dv, at, v));
        }
        [dq, dk, dv]
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
