//! What the attention half does at the edges of a rank's part of rows, on queries, keys and values that
//! lie in one buffer ([`Heads`]).

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::attention::Inputs;
use crate::cuda::attention_merge::{self, Lies};
use crate::cuda::heads::Heads;
use crate::cuda::stream::Buffer;
use crate::dtype::{cast, widen};
use crate::ops::attention::merge::LogSumExp;
use crate::ops::attention::shared::{
    AtFirst, EdgeGradients, First, KeyForm, Merged, SharedAttention, Strips, along,
};

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
    Keys,
    Values,
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

    /// Begins to fetch the keys that the first queries see, and to give this rank's to others.
    pub fn begin(&self, qkv: &Buffer) -> Strips {
        let qkv = flat(qkv.clone());
        self.shared
            .begin(self.form.clone(), |tokens| self.pair(&qkv, tokens))
    }

    /// Puts the values of the first queries into `mixed` `[T, H E]`, and their sums of exponentials into
    /// `sums`: these see keys of other ranks.
    pub fn forward(
        &self,
        strips: Strips,
        qkv: &Buffer,
        mixed: Buffer,
        sums: LogSumExp,
    ) -> (Buffer, LogSumExp, Option<First>) {
        let qkv = flat(qkv.clone());
        let q = |tokens| self.read(&qkv, tokens, Of::Queries);
        let first = self
            .shared
            .first(strips, q, |tokens| self.pair(&qkv, tokens));
        let Some(first) = first else {
            return (mixed, sums, None);
        };
        let (mixed, sums, first) = self.shared.joined(first, self.by_head(mixed), sums);
        (buffer(mixed.reshape([-1])), sums, Some(first))
    }

    /// The gradients at the edges, and that of the mixed values `[T, H E]` for the attention of this
    /// rank's tokens among themselves: where the first queries were done apart, they take no part in it.
    /// `qkv`, `mixed` and `sums` are those of the forward pass.
    pub fn backward(
        &self,
        saved: Option<First>,
        (qkv, mixed, sums): (&Buffer, &Buffer, &LogSumExp),
        dmixed: Buffer,
    ) -> (Buffer, Option<EdgeGradients>) {
        let dmixed = self.by_head(dmixed);
        let rows = 0..self.form.batch;
        let first = |first| along(&dmixed, 0..first);
        let merged = |first| Merged {
            q: self.read(&flat(qkv.clone()), 0..first, Of::Queries),
            output: along(&self.by_head(mixed.clone()), 0..first),
            sums: sums.first(first),
            dy: along(&dmixed, 0..first),
        };
        let form = self.form.clone();
        let gradients = self.shared.first_backward(form, saved, first, merged);
        let dmixed = match &gradients.first {
            Some(AtFirst::Apart(first)) => {
                let [dq, ..] = first.as_ref();
                dmixed.slice_assign([rows, 0..dq.dims()[1]], dq.zeros_like())
            }
            _ => dmixed,
        };
        (buffer(dmixed.reshape([-1])), Some(gradients))
    }

    /// dq, dk and dv, laid out as q, k and v are, with those at the edges.
    pub fn added(&self, mut dqkv: Buffer, gradients: EdgeGradients) -> Buffer {
        match gradients.first {
            None => {}
            Some(AtFirst::Square(dq)) => dqkv = self.add(dqkv, 0, Of::Queries, &dq),
            Some(AtFirst::Apart(first)) => {
                let [dq, dk, dv] = *first;
                let tokens = 0..dq.dims()[1];
                dqkv = buffer(self.write(flat(dqkv), tokens, Of::Queries, dq));
                dqkv = self.add(dqkv, 0, Of::Keys, &dk);
                dqkv = self.add(dqkv, 0, Of::Values, &dv);
            }
        }
        for [dk, dv] in self.shared.returned(gradients.last) {
            let begin = self.tokens - dk.dims()[1];
            dqkv = self.add(dqkv, begin, Of::Keys, &dk);
            dqkv = self.add(dqkv, begin, Of::Values, &dv);
        }
        dqkv
    }

    /// `dqkv` with `part` `[B, n, X, E]` added to the tokens from `begin` on: summed wide and rounded once.
    fn add(&self, dqkv: Buffer, begin: usize, of: Of, part: &Tensor<4>) -> Buffer {
        let place = self.place(of);
        let token = place.row * self.form.size;
        let lies = Lies {
            first: place.from + begin * token + place.heads.start * self.form.size,
            row: self.tokens * token,
            token,
        };
        if attention_merge::add(&dqkv, lies, part) {
            return dqkv;
        }
        let (dqkv, tokens) = (flat(dqkv), begin..begin + part.dims()[1]);
        let own = widen(self.read(&dqkv, tokens.clone(), of));
        let sum = cast(own + widen(part.clone()), DType::BF16);
        buffer(self.write(dqkv, tokens, of, sum))
    }

    /// `[T, X E]` as `[B, N, X, E]`.
    fn by_head(&self, rows: Buffer) -> Tensor<4> {
        let KeyForm { batch, size, .. } = self.form;
        let heads = rows.len() / (batch * self.tokens * size);
        flat(rows).reshape([batch, self.tokens, heads, size])
    }

    /// Keys and values of the tokens `tokens`: `[B, n, G, E]` each.
    fn pair(&self, qkv: &Tensor<1>, tokens: Range<usize>) -> [Tensor<4>; 2] {
        [Of::Keys, Of::Values].map(|of| self.read(qkv, tokens.clone(), of))
    }

    /// The tokens `tokens`: `[B, n, X, E]`, X being H or G.
    fn read(&self, qkv: &Tensor<1>, tokens: Range<usize>, of: Of) -> Tensor<4> {
        let place = self.place(of);
        let all = qkv.clone().narrow(0, place.from, place.len);
        let KeyForm { batch, size, .. } = self.form;
        let rows: Tensor<4> = all.reshape([batch, self.tokens, place.row, size]);
        rows.slice([0..batch, tokens, place.heads])
    }

    /// `qkv` with other values for the tokens `tokens`: `[B, n, X, E]`.
    fn write(&self, qkv: Tensor<1>, tokens: Range<usize>, of: Of, x: Tensor<4>) -> Tensor<1> {
        let place = self.place(of);
        let KeyForm { batch, size, .. } = self.form;
        if place.len == qkv.dims()[0] {
            let rows: Tensor<4> = qkv.reshape([batch, self.tokens, place.row, size]);
            let rows = rows.slice_assign([0..batch, tokens, place.heads], x);
            return rows.reshape([-1]);
        }
        // A stretch of each sequence, written where it lies.
        let each = tokens.len() * place.row * size;
        let x: Tensor<1> = x.reshape([-1]);
        (0..batch).fold(qkv, |qkv, row| {
            let from = place.from + (row * self.tokens + tokens.start) * place.row * size;
            let part = x.clone().narrow(0, row * each, each);
            let stretch = from..from + each;
            qkv.slice_assign(std::slice::from_ref(&stretch), part)
        })
    }

    fn place(&self, of: Of) -> Place {
        let Heads { heads, groups, .. } = self.heads;
        let (before, count) = match of {
            Of::Queries => (0, heads),
            Of::Keys => (heads, groups),
            Of::Values => (heads + groups, groups),
        };
        let tokens = self.form.batch * self.tokens;
        match self.heads.split {
            true => Place {
                from: tokens * before * self.form.size,
                len: tokens * count * self.form.size,
                row: count,
                heads: 0..count,
            },
            false => Place {
                from: 0,
                len: tokens * self.heads.width(),
                row: self.heads.width() / self.form.size,
                heads: before..before + count,
            },
        }
    }
}

/// Where queries, keys or values lie in a buffer of all.
struct Place {
    /// The first element of the rows that hold them.
    from: usize,
    /// Elements of these rows.
    len: usize,
    /// Heads of a row.
    row: usize,
    /// Those that are meant.
    heads: Range<usize>,
}

fn flat(buffer: Buffer) -> Tensor<1> {
    let count = buffer.len();
    buffer.tensor::<2>().reshape([count])
}

fn buffer(flat: Tensor<1>) -> Buffer {
    Buffer::of(&flat).expect("it lay in such a buffer before")
}
