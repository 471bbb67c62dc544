//! The forward pass.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::{Group, Inputs, NORM_BLOCKS, Pass, Shape, addresses, arrived, groups, inputs};
use crate::cuda::norm::sum_partials;
use crate::cuda::stream::{Arg, Buffer, Context, on_stream};
use crate::ops::ttt::Outcome;
use crate::ops::ttt::carry::Exchange;
use crate::packing::Write;

/// A forward pass and its memory.
pub struct Forward<'a> {
    i: Inputs,
    shape: &'a Shape<'a>,
    /// The groups of each row, and how many of them, the first, began before it.
    rows: Vec<(Vec<Group<'a>>, usize)>,
    /// `[B, N, D]` bf16
    output: Buffer,
    slab: Buffer,
    /// Of each row, f32.
    states: Vec<Buffer>,
    /// For the documents that began before a row that has others too.
    carried: Option<Buffer>,
    /// ‖S‖² of each document that ends, behind a zero.
    squares: Buffer,
    /// Those that are known.
    known: usize,
    partial: Buffer,
    norm: Buffer,
    /// The slab holds the updates of the group that is next.
    filled: bool,
}

/// Groups of a row that follow each other.
struct Job {
    row: usize,
    groups: Range<usize>,
}

impl<'a> Forward<'a> {
    /// z `[B, N, F]`, v `[B, N, D]`, w0 `[D, F]`; `None` if there are no kernels for them.
    pub fn new([z, v]: [&Tensor<3>; 2], w0: &Tensor<2>, shape: &'a Shape<'a>) -> Option<Self> {
        let i = inputs(z, v, w0)?;
        let s = &i.sizes;
        let most = s.most(shape.pieces);
        let rows = shape.pieces.iter().map(|pieces| {
            let all = groups(pieces, most);
            // A document that began before the row is read, so that a group ends where it does.
            let carried = all.iter().take_while(|group| group.last().carried).count();
            (all, carried)
        });
        let rows: Vec<_> = rows.collect();
        let state = || i.z.empty([s.d, s.f], DType::F32);
        let both = |(all, carried): &(Vec<Group>, usize)| (1..all.len()).contains(carried);
        let all = shape.pieces.iter().flatten();
        let ends = all.filter(|p| p.reads && p.write == Write::Nothing).count();
        Some(Self {
            output: i.z.empty([rows.len(), s.length, s.d], DType::BF16),
            slab: i.z.empty([most, s.d, s.f], DType::BF16),
            states: rows.iter().map(|_| state()).collect(),
            carried: rows.iter().any(both).then(state),
            squares: i.z.empty([ends + 1], DType::F32),
            known: 0,
            partial: i.z.empty([NORM_BLOCKS], DType::F32),
            norm: i.z.empty([1], DType::F32),
            filled: false,
            rows,
            shape,
            i,
        })
    }

    /// All of it; the documents that began here while the states of the others are on their way.
    pub fn run(mut self, mut exchange: Exchange) -> Outcome {
        let rows = self.rows.iter().enumerate();
        let own = rows.clone().map(|(row, (all, carried))| Job {
            row,
            groups: *carried..all.len(),
        });
        let carried = rows.map(|(row, (_, carried))| Job {
            row,
            groups: 0..*carried,
        });
        let there = |job: &Job| !job.groups.is_empty();
        let own: Vec<Job> = own.filter(there).collect();
        let carried: Vec<Job> = carried.filter(there).collect();
        let at_once = match exchange.travels() {
            true => 1,
            false => own.len().max(1),
        };
        for jobs in own.chunks(at_once) {
            self.walk(jobs, &vec![None; self.rows.len()]);
            exchange.pass_on();
        }
        self.fill(carried.first(), &mut exchange);
        let sums = exchange.finish();
        if !carried.is_empty() {
            self.walk(&carried, &arrived(&sums));
        }
        self.largest();
        let last = self.shape.pieces.iter().zip(self.states);
        let last = last.map(|(pieces, state)| {
            let reads = pieces.last().is_some_and(|piece| piece.reads);
            reads.then(|| state.tensor::<2>())
        });
        Outcome {
            output: self.output.tensor(),
            norm: self.norm.tensor(),
            last: last.collect(),
            arrived: sums,
        }
    }

    /// The updates of the first group that needs what arrives, half before what others wait for is passed
    /// on, half after it.
    fn fill(&mut self, job: Option<&Job>, exchange: &mut Exchange) {
        let Some(job) = job else { return };
        let group = &self.rows[job.row].0[job.groups.start];
        let (i, lr, half) = (&self.i, self.shape.lr, group.pieces.len() / 2);
        for part in [0..half, half..group.pieces.len()] {
            let first = part.start;
            let pieces = Group {
                pieces: &group.pieces[part],
            };
            if !pieces.pieces.is_empty() {
                on_stream(&[&i.z, &i.v, &i.w0], &[&self.slab], |cx, from, to| {
                    let slab = to[0] + (2 * first * i.sizes.elements()) as u64;
                    Pass::new(i, from, lr).updates(cx, job.row, &pieces, slab)
                });
            }
            exchange.pass_on();
        }
        self.filled = true;
    }

    /// The groups of `jobs`; for each row, the state that it begins with.
    fn walk(&mut self, jobs: &[Job], arriving: &[Option<Buffer>]) {
        let (i, lr) = (&self.i, self.shape.lr);
        let s = &i.sizes;
        let mut reads = vec![&i.z, &i.v, &i.w0];
        reads.extend(arriving.iter().flatten());
        let mut writes = vec![&self.output, &self.slab, &self.squares, &self.partial];
        writes.extend(&self.states);
        writes.extend(&self.carried);
        let (rows, filled) = (&self.rows, std::mem::take(&mut self.filled));
        let (known, apart) = (self.known, self.carried.is_some());
        let ends = jobs.iter().map(|job| {
            let groups = rows[job.row].0[job.groups.clone()].iter();
            groups.filter(|group| group.ends_document()).count()
        });
        self.known += ends.sum::<usize>();
        on_stream(&reads, &writes, |cx, from, to| {
            let (output, slab, squares, partial) = (to[0], to[1], to[2], to[3]);
            let arriving = addresses(arriving, from, &mut 3);
            let pass = Pass::new(i, from, lr);
            let mut next = squares + 4 * (1 + known) as u64;
            let mut filled = filled;
            for job in jobs {
                let (all, carried) = &rows[job.row];
                let others = job.groups.end < all.len() && apart;
                let state = match others {
                    true => to[4 + rows.len()],
                    false => to[4 + job.row],
                };
                if let (true, Some(source)) = (job.groups.start < *carried, arriving[job.row]) {
                    cx.copy(state, source, 4 * s.elements())?;
                }
                for group in &all[job.groups.clone()] {
                    if !std::mem::take(&mut filled) {
                        pass.updates(cx, job.row, group, slab)?;
                    }
                    pass.forward(cx, group, (slab, state), true)?;
                    let z = s.rows(pass.z, job.row, group, s.f);
                    let out = s.rows(output, job.row, group, s.d);
                    cx.gemm(z, s.slots(slab, group).t(), out, 1.0, 0.0)?;
                    if group.ends_document() {
                        square_sum(cx, (next, partial), state, s.elements())?;
                        next += 4;
                    }
                }
            }
            Ok(())
        });
    }

    /// The norm of the largest state.
    fn largest(&self) {
        let (squares, known) = (&self.squares, self.known);
        on_stream(&[], &[&self.norm, squares], |cx, _, to| {
            cx.zero(to[1], 4)?;
            let count = Arg::Int(known as i32 + 1);
            let args = [Arg::Ptr(to[0]), Arg::Ptr(to[1]), count];
            cx.launch("largest_root", (1, 1, 1), 32, &args)
        });
    }
}

/// ‖S‖² into `out`, by way of `partial`.
fn square_sum(
    cx: &mut Context,
    (out, partial): (u64, u64),
    state: u64,
    elements: usize,
) -> Result<(), String> {
    let args = [
        Arg::Ptr(partial),
        Arg::Ptr(state),
        Arg::Size(elements as u64),
    ];
    cx.launch("square_sum", (NORM_BLOCKS as u32, 1, 1), 512, &args)?;
    sum_partials(cx, out, partial, NORM_BLOCKS, 1)
}
