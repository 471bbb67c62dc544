//! The first queries and the strip of keys before them, as a square of which they see the upper triangle.
//!
//! n = window − 1. Query i of a part sees of the strip's n tokens those from i on: it stands behind all of
//! them, n + i tokens behind the first. What the queries see of their own part is what the attention of the
//! part gives anyway, and both are merged ([`crate::ops::attention`]'s `merge`), so that nothing is computed
//! twice.
//!
//! A document that begins inside the strip would cut the square at its keys: then the first queries are
//! done with all their keys, apart. One that ends among the queries leaves some that see nothing of the
//! strip; they are taken out by their sums of exponentials.

use burn::tensor::{Tensor, TensorData};

use super::{SharedAttention, gradients, run};
use crate::context::Fault;
use crate::ops::attention::merge::{LogSumExp, merged};
use crate::ops::attention::{Attention, AttentionSpec};

/// What a square gives before it is merged.
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

    /// The square of `q` and the strip `[k, v]`, where it is one, and the device has a form for it.
    pub(super) fn over_square(&self, q: &Tensor<4>, strip: &[Tensor<4>; 2]) -> Option<Square> {
        let seeing = self.square()?;
        #[cfg(feature = "cuda")]
        if crate::cuda::attention::lacks_bands(q) {
            return None;
        }
        let [k, v] = strip.clone();
        let (output, (.., sums)) = run(&self.over_strip(), [q.clone(), k, v]);
        let sums = taken_out(sums.values, &seeing, -FAR);
        Some(Square {
            output,
            sums,
            strip: strip.clone(),
        })
    }

    /// `own`, the values of this rank's tokens among themselves, and their sums, with the square in them.
    pub(super) fn with_square(
        &self,
        square: &Square,
        own: Tensor<4>,
        sums: LogSumExp,
    ) -> (Tensor<4>, LogSumExp) {
        let of_own = self
            .context
            .planted(Fault::SumsOfOwnKeys)
            .then(|| sums.clone());
        let (output, sums) = merged(own, sums, (&square.output, &square.sums));
        (output, of_own.unwrap_or(sums))
    }

    /// dq of the first queries, as far as it comes from the strip, and dk and dv of the strip.
    pub(super) fn square_backward(&self, [k, v]: [Tensor<4>; 2], first: Merged) -> [Tensor<4>; 3] {
        let sums = match self.square() {
            // Without weights, and so without gradients.
            Some(seeing) => taken_out(first.sums, &seeing, FAR),
            None => first.sums,
        };
        let sums = LogSumExp {
            values: sums,
            by_token: false,
        };
        let saved = (first.q, k, v, first.output, sums);
        gradients(self.over_strip(), saved, first.dy)
    }

    /// Attention of the first queries to the strip, which ends where they begin.
    fn over_strip(&self) -> Attention {
        Attention {
            spec: AttentionSpec {
                query_offset: self.first_queries(),
                packing: None,
                context: None,
                ..self.spec.clone()
            },
        }
    }
}

/// Log-sum-exps `[B, H, n]` of the first queries, moved by `far` where they see nothing: of row b, all but
/// the first `seeing[b]`.
fn taken_out(sums: Tensor<3>, seeing: &[usize], far: f64) -> Tensor<3> {
    let [rows, heads, n] = sums.dims();
    if seeing.iter().all(|&count| count == n) {
        return sums;
    }
    let row = |&count: &usize| (0..n).map(move |i| if i < count { 0.0 } else { far });
    let data = TensorData::new(seeing.iter().flat_map(row).collect(), [rows, 1, n]);
    let moved = Tensor::<3>::from_data(data, (&sums.device(), sums.dtype()));
    sums + moved.expand([rows, heads, n])
}
