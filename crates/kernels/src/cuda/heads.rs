//! Queries, keys and values in one buffer: rotation, and the norm of each head.
//!
//! T rows of S = (H + 2 G) E elements: queries, keys, values.

use burn::tensor::DType;

use super::attention::Extents;
use super::gemm::Matrix;
use super::hopper::ROTATED_HEAD;
use super::norm::{MOST_PROCESSORS, sum_partials};
use super::stream::{Arg, Buffer, Context};

/// Blocks per multiprocessor of the kernel that sums the gains' gradients.
const BLOCKS: usize = 4;

/// How queries, keys and values lie.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// T
    pub rows: usize,
    /// H
    pub heads: usize,
    /// G
    pub groups: usize,
    /// E
    pub size: usize,
    /// Whether queries, keys and values have rows of their own, one kind behind the other: cuDNN's
    /// backward pass over packed documents is right for such tensors alone.
    pub split: bool,
    /// Added to the mean square in the norm of a head.
    pub eps: f32,
}

impl Heads {
    /// `None` if there are no kernels for these sizes.
    pub fn check(&self, normed: bool) -> Option<()> {
        let rotates = self.size.is_multiple_of(16);
        // Lanes of a head exchange by shuffles.
        let norms = self.size.is_power_of_two() && self.size <= 256;
        let whole = self.groups > 0 && self.heads.is_multiple_of(self.groups);
        (rotates && whole && (norms || !normed)).then_some(())
    }

    /// S = (H + 2 G) E
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.groups) * self.size
    }

    /// Columns of queries, keys and values.
    fn columns(&self) -> [usize; 3] {
        [self.heads, self.groups, self.groups].map(|heads| heads * self.size)
    }

    /// The matrices of rows, from address `at` on: each with the first of its columns among S.
    pub fn matrices(&self, at: u64) -> Vec<(Matrix, usize)> {
        let bf16 = |at, columns| Matrix::new(at, self.rows, columns, DType::BF16);
        if !self.split {
            return vec![(bf16(at, self.width()), 0)];
        }
        let mut from = 0;
        let each = self.qkv(at).into_iter().zip(self.columns());
        each.map(|(at, columns)| {
            let first = from;
            from += columns;
            (bf16(at, columns), first)
        })
        .collect()
    }

    /// Addresses of the first query, key and value.
    pub fn qkv(&self, at: u64) -> [u64; 3] {
        let [queries, keys, _] = self.columns();
        let rows = if self.split { self.rows } else { 1 };
        let bytes = |columns: usize| (2 * rows * columns) as u64;
        [at, at + bytes(queries), at + bytes(queries + keys)]
    }

    /// Attention over such rows, `tokens` to a sequence.
    pub fn extents(&self, tokens: usize) -> Extents {
        let [queries, keys, _] = self.columns();
        let (query_row, key_row) = match self.split {
            true => (queries, keys),
            false => (self.width(), self.width()),
        };
        Extents {
            batch: self.rows / tokens,
            tokens,
            keys: tokens,
            heads: self.heads,
            groups: self.groups,
            size: self.size,
            query_row,
            dq_row: query_row,
            key_row,
        }
    }

    /// Projects x by w `[S, D]` into `qkv`, queries and keys rotated, in one product. Returns whether there is
    /// one for such rows; else nothing was done.
    pub fn project_rotated(
        &self,
        cx: &mut Context,
        (x, w): (Matrix, Matrix),
        qkv: u64,
        e: &Extents,
        tables: (u64, u64),
    ) -> Result<bool, String> {
        if self.split || self.size != ROTATED_HEAD {
            return Ok(false);
        }
        let turned = self.heads + self.groups;
        cx.rotated_product(x, w, qkv, tables, (e.tokens, turned))
    }

    /// Rotates queries and keys in place, by `sign` times the tables' angle.
    pub fn rotate(
        &self,
        cx: &mut Context,
        qkv: u64,
        e: &Extents,
        (cos, sin): (u64, u64),
        sign: f32,
    ) -> Result<(), String> {
        let [queries, keys, _] = self.qkv(qkv);
        let stretches = match self.split {
            true => vec![
                (queries, self.heads, e.query_row),
                (keys, self.groups, e.key_row),
            ],
            false => vec![(qkv, self.heads + self.groups, self.width())],
        };
        for (at, heads, row) in stretches {
            let items = (self.rows * heads * self.size / 16) as u64;
            let args = [
                Arg::Ptr(at),
                Arg::Ptr(at),
                Arg::Ptr(cos),
                Arg::Ptr(sin),
                Arg::Size(items),
                Arg::Int(e.tokens as i32),
                Arg::Int(heads as i32),
                Arg::Int(self.size as i32 / 2),
                Arg::Int(row as i32),
                Arg::Float(sign),
            ];
            cx.launch_over("rope", items, &args)?;
        }
        Ok(())
    }

    /// Normalises and rotates queries and keys of `raw` into `qkv`, and copies the values.
    pub fn norm_rotate(
        &self,
        cx: &mut Context,
        (qkv, raw): (u64, u64),
        e: &Extents,
        tables: (u64, u64),
        gains: ((u64, u64), &Buffer),
    ) -> Result<(), String> {
        let mut args = vec![Arg::Ptr(qkv), Arg::Ptr(raw)];
        args.extend(self.shared_args(e, tables, gains));
        let lanes = (self.rows * self.width() / 8) as u64;
        cx.launch_over("head_norm_rope", lanes, &args)
    }

    /// Room for the partial sums of the gains' gradients.
    pub fn partial(&self, like: &Buffer) -> Buffer {
        like.empty([MOST_PROCESSORS * BLOCKS, 2 * self.size], DType::F32)
    }

    /// Back through [`Heads::norm_rotate`], in place in `dqkv`; the gains' gradients `[2, E]` f32 into
    /// `dgains`, by way of [`Heads::partial`].
    pub fn norm_rotate_backward(
        &self,
        cx: &mut Context,
        (dqkv, raw): (u64, u64),
        e: &Extents,
        tables: (u64, u64),
        gains: ((u64, u64), &Buffer),
        (dgains, partial): (u64, u64),
    ) -> Result<(), String> {
        let mut args = vec![Arg::Ptr(dqkv), Arg::Ptr(partial), Arg::Ptr(raw)];
        args.extend(self.shared_args(e, tables, gains));
        let blocks = (cx.processors()? as usize).min(MOST_PROCESSORS) * BLOCKS;
        cx.launch("head_norm_rope_backward", (blocks as u32, 1, 1), 256, &args)?;
        sum_partials(cx, dgains, partial, blocks, 2 * self.size)
    }

    fn shared_args(
        &self,
        e: &Extents,
        (cos, sin): (u64, u64),
        ((q, k), gain): ((u64, u64), &Buffer),
    ) -> Vec<Arg> {
        vec![
            Arg::Ptr(q),
            Arg::Ptr(k),
            Arg::Int(i32::from(gain.dtype() == DType::F32)),
            Arg::Ptr(cos),
            Arg::Ptr(sin),
            Arg::Size(self.rows as u64),
            Arg::Int(i32::from(self.split)),
            Arg::Int(e.tokens as i32),
            Arg::Int(self.heads as i32),
            Arg::Int(self.groups as i32),
            Arg::Int(self.size as i32),
            Arg::Float(self.eps),
        ]
    }
}
