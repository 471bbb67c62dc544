//! Heads that travel: from some tokens of all heads to all tokens of some heads, and back.

use burn::tensor::Tensor;

use super::SharedAttention;
use crate::context::ATTENTION;

/// Whether key-value heads can travel among `ranks`.
pub fn heads_divide(groups: usize, ranks: usize) -> bool {
    groups.is_multiple_of(ranks)
}

impl SharedAttention {
    /// All tokens of this rank's share of the heads: `[B, N, X, E]` → `[B, P N, X/P, E]`, in one exchange.
    pub(super) fn to_heads<const T: usize>(&self, tensors: [Tensor<4>; T]) -> [Tensor<4>; T] {
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
    pub(super) fn to_tokens<const T: usize>(&self, tensors: [Tensor<4>; T]) -> [Tensor<4>; T] {
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
        let received = self
            .context
            .exchange(ATTENTION, |group| group.all_to_all(flat));
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
