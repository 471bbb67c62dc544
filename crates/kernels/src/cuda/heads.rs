//! Queries and keys in rows that they share with the values: rotation, and the norm of each head.
//!
//! A row is S = (H + 2 G) E elements: queries, keys, values.

use burn::tensor::DType;

use super::attention::Extents;
use super::norm::{MOST_PROCESSORS, sum_partials};
use super::stream::{Arg, Buffer, Context};

/// Blocks per multiprocessor of the kernel that sums the gains' gradients.
const BLOCKS: usize = 4;

/// How a row is divided.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// H
    pub heads: usize,
    /// G
    pub groups: usize,
    /// E
    pub size: usize,
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

    /// S
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.groups) * self.size
    }

    /// Attention over such rows.
    pub fn extents(&self, batch: usize, tokens: usize) -> Extents {
        Extents {
            batch,
            tokens,
            keys: tokens,
            heads: self.heads,
            groups: self.groups,
            size: self.size,
            query_row: self.row(),
            key_row: self.row(),
        }
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
        let heads = self.heads + self.groups;
        let items = (e.batch * e.tokens * heads * self.size / 16) as u64;
        let args = [
            Arg::Ptr(qkv),
            Arg::Ptr(qkv),
            Arg::Ptr(cos),
            Arg::Ptr(sin),
            Arg::Size(items),
            Arg::Int(e.tokens as i32),
            Arg::Int(heads as i32),
            Arg::Int(self.size as i32 / 2),
            Arg::Int(self.row() as i32),
            Arg::Float(sign),
        ];
        cx.launch_over("rope", items, &args)
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
        let heads = self.heads + 2 * self.groups;
        let lanes = (e.batch * e.tokens * heads * self.size / 8) as u64;
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
            Arg::Size((e.batch * e.tokens) as u64),
            Arg::Int(e.tokens as i32),
            Arg::Int(self.heads as i32),
            Arg::Int(self.groups as i32),
            Arg::Int(self.size as i32),
            Arg::Float(self.eps),
        ]
    }
}
