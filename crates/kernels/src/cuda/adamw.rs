//! The fused optimizer step and the sum of squares.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::gradient::{Gradient, PARTS};
use super::stream::{Arg, Buffer, on_stream};
use crate::ops::adamw::{AdamW, Moments};
use crate::ops::flat::{Part, joined};
use crate::ops::master::{Halves, Master};
use crate::work::Work;

fn f32(tensor: &Tensor<1>) -> Option<Buffer> {
    Buffer::of(tensor).filter(|b| b.dtype() == DType::F32)
}

/// What a step replaces.
struct Updated {
    from: Buffer,
    /// The same memory if nothing else refers to it, else fresh of its size.
    to: Buffer,
}

impl Updated {
    /// The tensor must be consumed before its buffer is asked whether it is the only reference.
    fn new(from: Buffer) -> Self {
        let to = match from.is_ours() {
            true => from.clone(),
            false => from.empty([from.len()], from.dtype()),
        };
        Self { from, to }
    }

    fn float(tensor: Tensor<1>) -> Option<Self> {
        let buffer = Buffer::of(&tensor);
        drop(tensor);
        buffer.map(Self::new)
    }
}

/// Weights in the order of the kernel's arguments: f32, upper halves, lower halves.
fn weights(master: Master) -> [Option<Updated>; 3] {
    let Master { wide, halves } = master;
    let (high, low) = match halves {
        Some(Halves { high, low }) => {
            let buffer = Buffer::of_ints(&low);
            drop(low);
            (Updated::float(high), buffer.map(Updated::new))
        }
        None => (None, None),
    };
    [wide.and_then(Updated::float), high, low]
}

/// The same as they were held.
fn master([wide, high, low]: [Option<Updated>; 3]) -> Master {
    let halves = high.zip(low).map(|(high, low)| Halves {
        high: high.to.tensor(),
        low: low.to.ints(),
    });
    Master {
        wide: wide.map(|wide| wide.to.tensor()),
        halves,
    }
}

/// Addresses of those that are there, 0 for the others, and what is left of `list`.
fn addresses<'a>(of: &[Option<Updated>; 3], list: &'a [u64]) -> ([Arg; 3], &'a [u64]) {
    let mut at = 0;
    let args = of.each_ref().map(|buffer| {
        let address = buffer.as_ref().and_then(|_| list.get(at));
        at += usize::from(buffer.is_some());
        Arg::Ptr(address.copied().unwrap_or(0))
    });
    (args, list.get(at..).unwrap_or_default())
}

/// See [`crate::ops::adamw::adamw_step`]. In place where the caller gave its only references.
#[allow(clippy::too_many_arguments)] // the operands of one formula
#[allow(clippy::result_large_err)] // what cannot be done here goes back by value, not cloned
pub fn step(
    held: Master,
    moments: Moments,
    grad: &[Part],
    decayed: &Range<usize>,
    lr: f64,
    step: u64,
    scale: &Tensor<1>,
    keep: &Tensor<1>,
    hyper: &AdamW,
) -> Result<(Master, Moments), (Master, Moments)> {
    let inputs = (|| Some((gradient(grad)?, f32(scale)?, f32(keep)?)))();
    let high = held.halves.as_ref().map(|halves| &halves.high);
    let on_gpu = (held.wide.iter().chain(high))
        .chain([&moments.first, &moments.second])
        .all(|tensor| Buffer::of(tensor).is_some());
    let (Some((grad, scale, keep)), true) = (inputs, on_gpu) else {
        return Err((held, moments));
    };
    let wide = held.wide_len() as u64;
    let weights = weights(held);
    let (Some(m), Some(v)) = (
        Updated::float(moments.first),
        Updated::float(moments.second),
    ) else {
        unreachable!("checked above")
    };
    let constants = [
        hyper.beta1,
        hyper.beta2,
        hyper.eps,
        lr,
        1.0 - lr * hyper.weight_decay,
        1.0 - hyper.beta1.powf(step as f64),
        1.0 - hyper.beta2.powf(step as f64),
    ]
    .map(|c| c as f32);
    let there = || weights.iter().flatten();
    let mut writes: Vec<&Buffer> = there().map(|updated| &updated.to).collect();
    writes.extend([&m.to, &v.to]);
    let mut reads: Vec<&Buffer> = there().map(|updated| &updated.from).collect();
    reads.extend([&m.from, &v.from, &scale, &keep]);
    reads.extend(grad.buffers());
    on_stream(&reads, &writes, |cx, from, to| {
        let ([w_to, high_to, low_to], to) = addresses(&weights, to);
        let ([w, high, low], from) = addresses(&weights, from);
        for table in grad.tables(&from[4..])? {
            let args = [
                w_to,
                high_to,
                low_to,
                Arg::Ptr(to[0]),
                Arg::Ptr(to[1]),
                w,
                high,
                low,
                Arg::Ptr(from[0]),
                Arg::Ptr(from[1]),
                table.arg(),
                Arg::Ptr(from[2]),
                Arg::Ptr(from[3]),
                Arg::Size(wide),
                Arg::Size(decayed.start as u64),
                Arg::Size(decayed.end as u64),
                Arg::Floats(constants),
            ];
            // Master and moments in and out.
            let work = Work::Bytes(table.bytes() + table.count() as f64 * 24.0);
            let vectors = (table.count() as u64).div_ceil(4);
            cx.doing(work).launch_over("adamw", vectors, &args)?;
        }
        Ok(())
    });
    let moments = Moments {
        first: m.to.tensor(),
        second: v.to.tensor(),
    };
    Ok((master(weights), moments))
}

/// Of any parts: those that do not fit are joined in one buffer. `None` on another backend.
fn gradient(grad: &[Part]) -> Option<Gradient> {
    Gradient::of(grad).or_else(|| {
        let whole = joined(grad.to_vec());
        Buffer::of(&whole)?;
        Gradient::of(&[Part::Values(whole)])
    })
}

/// Most blocks of the first pass.
const BLOCKS: usize = 2048;

/// Elements that make another block worth while.
const BLOCK: usize = 1 << 13;

/// Σ grad²: `[1]`.
pub fn square_sum(grad: &[Part]) -> Option<Tensor<1>> {
    let grad = gradient(grad)?;
    let like = grad.buffers().next()?;
    let out = like.empty([1], DType::F32);
    let launches = grad.len().div_ceil(PARTS);
    let partial = like.empty([launches * BLOCKS], DType::F32);
    let reads: Vec<&Buffer> = grad.buffers().collect();
    on_stream(&reads, &[&out, &partial], |cx, from, to| {
        let mut sums = 0;
        for table in grad.tables(from)? {
            let blocks = table.count().div_ceil(BLOCK).clamp(1, BLOCKS);
            let args = [Arg::Ptr(to[1] + 4 * sums as u64), table.arg()];
            sums += blocks;
            cx.doing(Work::Bytes(table.bytes())).launch(
                "square_sum",
                (blocks as u32, 1, 1),
                512,
                &args,
            )?;
        }
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(to[1]),
            Arg::Int(sums as i32),
            Arg::Float(1.0),
        ];
        cx.launch("scaled_total", (1, 1, 1), 1024, &args)
    });
    Some(out.tensor())
}
