//! What the attention half does at the edges of a rank's part of rows, on rows that hold a token's
//! queries, keys and values ([`Heads`], not split).

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::attention::Inputs;
use crate::cuda::heads::Heads;
use crate::cuda::stream::Buffer;
use crate::dtype::{cast, widen};
use crate::ops::attention::Saved;
use crate::ops::attention::shared::{EdgeGradients, KeyForm, SharedAttention};

/// The edges of one rank's part.
pub struct Edge {
    shared: SharedAttention,
    form: KeyForm,
    heads: Heads,
    /// N
    tokens: usize,
}

/// What lies in a buffer of queries, keys and values.
#[derive(Clone, Copy)]
enum Of {
    Queries,
    /// Keys, then values, of each token.
    Pairs,
}

impl Edge {
    /// Of the rows in `inputs`.
    pub fn new(shared: SharedAttention, inputs: &Inputs) -> Self {
        let e = &inputs.extents;
        Self {
            shared,
            form: KeyForm {
                batch: e.batch,
                groups: e.groups,
                size: e.size,
                dtype: DType::BF16,
                device: inputs.x.device(),
            },
            heads: inputs.heads,
            tokens: e.tokens,
        }
    }

    /// Puts the values of the first queries into `mixed` `[T, H E]`: these see keys of other ranks.
    pub fn forward(&self, qkv: &Buffer, mixed: Buffer) -> (Buffer, Option<Saved>) {
        let qkv = flat(qkv.clone());
        let g = self.form.groups;
        let q = |tokens| self.read(&qkv, tokens, Of::Queries);
        let kv = |tokens: Range<usize>| {
            let pairs = self.read(&qkv, tokens, Of::Pairs);
            [0, g].map(|from| pairs.clone().narrow(2, from, g))
        };
        let Some((output, saved)) = self.shared.first(&self.form, q, kv) else {
            return (mixed, None);
        };
        let tokens = 0..output.dims()[1];
        let mixed = self.by_head(mixed);
        let mixed = mixed.slice_assign([0..self.form.batch, tokens], output);
        (buffer(mixed.reshape([-1])), Some(saved))
    }

    /// The gradients at the edges, and that of the mixed values `[T, H E]` for the attention of this
    /// rank's tokens among themselves: the first queries take no part in it.
    pub fn backward(
        &self,
        saved: Option<Saved>,
        dmixed: Buffer,
    ) -> (Buffer, Option<EdgeGradients>) {
        let dmixed = self.by_head(dmixed);
        let rows = 0..self.form.batch;
        let first = |first| dmixed.clone().slice([rows.clone(), 0..first]);
        let gradients = self.shared.first_backward(&self.form, saved, first);
        let dmixed = match &gradients.first {
            None => dmixed,
            Some([dq, ..]) => dmixed.slice_assign([rows, 0..dq.dims()[1]], dq.zeros_like()),
        };
        (buffer(dmixed.reshape([-1])), Some(gradients))
    }

    /// dq, dk and dv, laid out as q, k and v are, with those at the edges.
    pub fn added(&self, dqkv: Buffer, gradients: EdgeGradients) -> Buffer {
        let mut dqkv = flat(dqkv);
        // Summed wide and rounded once.
        let add = |dqkv: Tensor<1>, tokens: Range<usize>, kv: [Tensor<4>; 2]| {
            let own = widen(self.read(&dqkv, tokens.clone(), Of::Pairs));
            let sum = own + widen(Tensor::cat(kv.into(), 2));
            self.write(dqkv, tokens, Of::Pairs, cast(sum, DType::BF16))
        };
        if let Some([dq, dk, dv]) = gradients.first {
            let tokens = 0..dq.dims()[1];
            dqkv = self.write(dqkv, tokens.clone(), Of::Queries, dq);
            dqkv = add(dqkv, tokens, [dk, dv]);
        }
        for [dk, dv] in gradients.last {
            let tokens = self.tokens - dk.dims()[1]..self.tokens;
            dqkv = add(dqkv, tokens, [dk, dv]);
        }
        buffer(dqkv)
    }

    /// `[T, X E]` as `[B, N, X, E]`.
    fn by_head(&self, rows: Buffer) -> Tensor<4> {
        let KeyForm { batch, size, .. } = self.form;
        let heads = rows.len() / (batch * self.tokens * size);
        flat(rows).reshape([batch, self.tokens, heads, size])
    }

    /// The tokens `tokens`: `[B, n, X, E]`, X being H or 2 G.
    fn read(&self, qkv: &Tensor<1>, tokens: Range<usize>, of: Of) -> Tensor<4> {
        self.rows(qkv.clone()).slice(self.range(tokens, of))
    }

    /// `qkv` with other values for the tokens `tokens`: `[B, n, X, E]`.
    fn write(&self, qkv: Tensor<1>, tokens: Range<usize>, of: Of, x: Tensor<4>) -> Tensor<1> {
        let rows = self.rows(qkv).slice_assign(self.range(tokens, of), x);
        rows.reshape([-1])
    }

    /// First head among H + 2 G, and how many.
    fn place(&self, of: Of) -> (usize, usize) {
        let (h, g) = (self.heads.heads, self.heads.groups);
        match of {
            Of::Queries => (0, h),
            Of::Pairs => (h, 2 * g),
        }
    }

    /// All of the buffer: `[B, N, H + 2 G, E]`.
    fn rows(&self, qkv: Tensor<1>) -> Tensor<4> {
        let KeyForm { batch, size, .. } = self.form;
        qkv.reshape([batch, self.tokens, self.heads.width() / size, size])
    }

    fn range(&self, tokens: Range<usize>, of: Of) -> [Range<usize>; 3] {
        let (first, count) = self.place(of);
        [0..self.form.batch, tokens, first..first + count]
    }
}

fn flat(buffer: Buffer) -> Tensor<1> {
    let count = buffer.len();
    buffer.tensor::<2>().reshape([count])
}

fn buffer(flat: Tensor<1>) -> Buffer {
    Buffer::of(&flat).expect("it lay in such a buffer before")
}
