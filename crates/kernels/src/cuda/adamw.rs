//! The fused optimizer step and the sum of squares.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

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
    let inputs = (|| Some((Gradient::of(grad)?, f32(scale)?, f32(keep)?)))();
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

/// A gradient as the kernels read it: parts, f32 or bf16, that begin at multiples of four elements.
struct Gradient {
    /// Elements, and the memory unless they are zeros.
    parts: Vec<(usize, Option<Buffer>)>,
}

impl Gradient {
    /// `None` on another backend. Parts that do not fit are joined in one buffer.
    fn of(grad: &[Part]) -> Option<Self> {
        let mut begin = 0;
        let mut parts = vec![];
        for part in grad {
            let buffer = match part {
                Part::Values(values) => Some(Buffer::of(values)?),
                Part::Zeros(_) => None,
            };
            let read = |b: &Buffer| matches!(b.dtype(), DType::F32 | DType::BF16);
            if !buffer.as_ref().is_none_or(read) || begin % 4 != 0 {
                let whole = f32(&joined(grad.to_vec()))?;
                let parts = vec![(whole.len(), Some(whole))];
                return Some(Self { parts });
            }
            begin += part.len();
            parts.push((part.len(), buffer));
        }
        Some(Self { parts })
    }

    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        self.parts.iter().filter_map(|(_, buffer)| buffer.as_ref())
    }

    /// What each launch reads; `addresses` are those of [`Gradient::buffers`].
    fn tables(&self, addresses: &[u64]) -> Result<Vec<Table>, String> {
        let mut addresses = addresses.iter();
        let mut parts = Vec::with_capacity(self.parts.len());
        for (count, buffer) in &self.parts {
            parts.push(match buffer {
                Some(buffer) => {
                    let at = *addresses.next().ok_or("a gradient without an address")?;
                    (*count, at, buffer.dtype())
                }
                None => (*count, 0, DType::F32),
            });
        }
        let all = stretches(&parts);
        Ok(all.chunks(PARTS).map(|few| Table(few.to_vec())).collect())
    }
}

/// Most stretches of a launch; as in the source.
const PARTS: usize = 12;

/// Stretches that one launch reads: at least one.
#[derive(Clone, Debug)]
struct Table(Vec<Stretch>);

impl Table {
    fn end(&self) -> usize {
        self.0.last().map_or(0, |last| last.begin + last.count)
    }

    fn count(&self) -> usize {
        self.end() - self.0.first().map_or(0, |first| first.begin)
    }

    /// Of the gradient.
    fn bytes(&self) -> f64 {
        let there = self.0.iter().filter(|stretch| stretch.at != 0);
        there.map(|s| (s.count * s.dtype.size()) as f64).sum()
    }

    /// `Parts` in the source.
    fn arg(&self) -> Arg {
        let mut words = [0u64; 2 * PARTS + 2];
        let mut narrow = 0u64;
        for (i, stretch) in self.0.iter().enumerate() {
            words[i] = stretch.begin as u64;
            words[PARTS + 1 + i] = stretch.at;
            narrow |= u64::from(stretch.dtype == DType::BF16) << i;
        }
        words[self.0.len()] = self.end() as u64;
        words[2 * PARTS + 1] = narrow | (self.0.len() as u64) << 32;
        Arg::Parts(words)
    }
}

/// Elements of a gradient that lie together.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stretch {
    /// Its first element among all.
    begin: usize,
    /// Elements.
    count: usize,
    /// Address, 0 for zeros.
    at: u64,
    dtype: DType,
}

impl Stretch {
    /// The address behind its last element.
    fn end(&self) -> u64 {
        self.at + (self.count * self.dtype.size()) as u64
    }
}

/// Elements, addresses and precisions of parts as stretches. Parts of one precision that follow each
/// other in memory are one: a product often makes the gradients of several parameters.
fn stretches(parts: &[(usize, u64, DType)]) -> Vec<Stretch> {
    let mut all: Vec<Stretch> = vec![];
    let mut begin = 0;
    for &(count, at, dtype) in parts {
        match all.last_mut() {
            Some(last) if last.at != 0 && last.dtype == dtype && last.end() == at => {
                last.count += count;
            }
            _ => all.push(Stretch {
                begin,
                count,
                at,
                dtype,
            }),
        }
        begin += count;
    }
    all
}

/// Most blocks of the first pass.
const BLOCKS: usize = 2048;

/// Elements that make another block worth while.
const BLOCK: usize = 1 << 13;

/// Σ grad²: `[1]`.
pub fn square_sum(grad: &[Part]) -> Option<Tensor<1>> {
    let grad = Gradient::of(grad)?;
    let like = grad.buffers().next()?;
    let out = like.empty([1], DType::F32);
    let launches = grad.parts.len().div_ceil(PARTS);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn stretch(begin: usize, count: usize, at: u64, dtype: DType) -> Stretch {
        Stretch {
            begin,
            count,
            at,
            dtype,
        }
    }

    #[test]
    fn only_parts_of_one_precision_are_read_together() {
        use DType::{BF16, F32};
        // Two of bf16 side by side; an f32 part just behind them; zeros; f32 twice, with a gap.
        let parts = [
            (8, 1024, BF16),
            (16, 1040, BF16),
            (4, 1072, F32),
            (4, 0, F32),
            (12, 4096, F32),
            (4, 4160, F32),
        ];
        let expected = [
            stretch(0, 24, 1024, BF16),
            stretch(24, 4, 1072, F32),
            stretch(28, 4, 0, F32),
            stretch(32, 12, 4096, F32),
            stretch(44, 4, 4160, F32),
        ];
        assert_eq!(stretches(&parts), expected);
    }

    #[test]
    fn a_launch_reads_its_parts_and_the_end_of_the_last() {
        let table = Table(vec![
            stretch(8, 4, 256, DType::F32),
            stretch(12, 5, 512, DType::BF16),
        ]);
        let Arg::Parts(words) = table.arg() else {
            panic!("a table")
        };
        assert_eq!(words[..4], [8, 12, 17, 0]);
        assert_eq!(words[PARTS + 1..PARTS + 4], [256, 512, 0]);
        assert_eq!(words[2 * PARTS + 1], 2 | 2 << 32);
        assert_eq!((table.count(), table.bytes()), (9, 26.0));
    }
}
