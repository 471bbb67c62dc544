//! The first queries and the strip of keys before them, as one causal square.
//!
//! n = window − 1. Query i of a part sees of the strip's n tokens those from i on: with both turned
//! round, query n − 1 − i and keys up to n − 1 − i, causal attention without a window and without an own
//! key in it. What the queries see of their own part is what the attention of the part gives anyway, and
//! both are merged ([`crate::ops::attention`]'s `merge`), so that nothing is computed twice.
//!
//! A document that begins inside the strip would cut the square at its keys: then the first queries are
//! done with all their keys, apart. One that ends among the queries leaves some that see nothing of the
//! strip; they are taken out by their sums of exponentials.

use burn::tensor::{Tensor, TensorData};

use super::{SharedAttention, gradients, run};
use crate::context::Fault;
use crate::ops::attention::merge::{LogSumExp, merged, turned};
use crate::ops::attention::{Attention, AttentionSpec};

/// What a square gives before it is merged, with its tokens turned round.
#[derive(Debug)]
pub struct Square {
    /// `[B, n, H, E]`
    output: Tensor<4>,
    /// `[B, H, n]`
    sums: Tensor<3>,
    /// Keys and values of the strip.
    pub(super) strip: [Tensor<4>; 2],
}

/// What is known of the first queries when their gradients are asked for, merged: `[B, n, H, E]`.
#[derive(Debug)]
pub struct Merged {
    pub q: Tensor<4>,
    pub output: Tensor<4>,
    /// `[B, H, n]`
    pub sums: Tensor<3>,
    pub dy: Tensor<4>,
}

/// So far from any log-sum-exp that no exponential of the difference is left, and yet finite: fused
/// kernels multiply it.
const FAR: f64 = 1e30;

impl SharedAttention {
    /// Of each row, how many of the first queries see the strip, where these are one square; `None` where
    /// there are no such queries, all tokens are first ones, or a document begins inside the strip.
    pub(super) fn square(&self) -> Option<Vec<usize>> {
        let n = self.first_queries();
        if n == 0 || !self.has_own() {
            return None;
        }
        let rows = 0..self.packing.rows().len();
        if self.context.planted(Fault::KeysWithoutDocuments) {
            return Some(rows.map(|_| n).collect());
        }
        let begin = self.packing.positions().start;
        let seeing = |row| {
            let document = self.packing.document_around(row, begin);
            match document.start {
                start if start == begin => Some(0),
                start if start + n <= begin => Some(n.min(document.end - begin)),
                _ => None,
            }
        };
        rows.map(seeing).collect()
    }

    /// The square of `q` and the strip `[k, v]`, where it is one.
    pub(super) fn over_square(&self, q: &Tensor<4>, strip: &[Tensor<4>; 2]) -> Option<Square> {
        let seeing = self.square()?;
        let strip = strip.each_ref().map(turned);
        let [k, v] = strip.clone();
        let (output, (.., sums)) = run(&self.turned(), [turned(q), k, v]);
        let sums = taken_out(sums.values, &seeing, -FAR);
        Some(Square {
            output,
            sums,
            strip,
        })
    }

    /// `own`, the values of this rank's tokens among themselves, and their sums, with the square in them.
    pub(super) fn with_square(
        &self,
        square: &Square,
        own: &Tensor<4>,
        sums: LogSumExp,
    ) -> (Tensor<4>, LogSumExp) {
        let n = square.output.dims()[1];
        let own = super::along(own, 0..n);
        let (output, merged) = merged((&own, &sums.first(n)), (&square.output, &square.sums));
        match self.context.planted(Fault::SumsOfOwnKeys) {
            true => (output, sums),
            false => (output, sums.with_first(merged)),
        }
    }

    /// dq of the first queries, as far as it comes from the strip, and dk and dv of the strip.
    pub(super) fn square_backward(&self, [k, v]: [Tensor<4>; 2], first: Merged) -> [Tensor<4>; 3] {
        let [q, output, dy] = [&first.q, &first.output, &first.dy].map(turned);
        let sums = first.sums.flip([2]);
        let sums = match self.square() {
            // Without weights, and so without gradients.
            Some(seeing) => taken_out(sums, &seeing, FAR),
            None => sums,
        };
        let sums = LogSumExp {
            values: sums,
            by_token: false,
        };
        let saved = (q, k, v, output, sums);
        gradients(self.turned(), saved, dy).map(|gradient| turned(&gradient))
    }

    /// Causal attention of whole rows.
    fn turned(&self) -> Attention {
        Attention {
            spec: AttentionSpec {
                window: None,
                packing: None,
                context: None,
                ..self.spec.clone()
            },
        }
    }
}

/// Log-sum-exps `[B, H, n]` of queries that are turned round, moved by `far` where they see nothing: of
/// row b, all but the first `seeing[b]` queries.
fn taken_out(sums: Tensor<3>, seeing: &[usize], far: f64) -> Tensor<3> {
    let [rows, heads, n] = sums.dims();
    if seeing.iter().all(|&count| count == n) {
        return sums;
    }
    let row = |&count: &usize| (0..n).map(move |i| if i < n - count { far } else { 0.0 });
    let data = TensorData::new(seeing.iter().flat_map(row).collect(), [rows, 1, n]);
    let moved = Tensor::<3>::from_data(data, (&sums.device(), sums.dtype()));
    sums + moved.expand([rows, heads, n])
}
