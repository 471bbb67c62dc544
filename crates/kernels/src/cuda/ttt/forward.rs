//! The forward pass.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::ahead::gather;
use super::{Ahead, Group, Inputs, Pass, Shape, addresses, arrived, groups, inputs, open_at};
use crate::cuda::stream::{Arg, Buffer, on_stream};
use crate::ops::ttt::Outcome;
use crate::ops::ttt::carry::Exchange;
use crate::packing::Write;

/// A forward pass and its memory.
pub struct Forward<'a> {
    i: Inputs,
    shape: &'a Shape,
    /// The groups of each row, and how many of them, the first, began before it.
    rows: Vec<(Vec<Group<'a>>, usize)>,
    /// `[B, N, D]` bf16
    output: Buffer,
    slab: Buffer,
    /// Of each row that has a document in several groups, f32.
    states: Vec<Option<Buffer>>,
    /// What the output begins with.
    onto: Option<Buffer>,
    /// For the documents that began before a row that has others too.
    carried: Option<Buffer>,
    /// ‖S‖² of each document that ends, behind a zero.
    squares: Buffer,
    /// Those that are known.
    known: usize,
    partial: Buffer,
    norm: Buffer,
    /// Updates that are made before their group's turn.
    ahead: Ahead,
}

/// Groups of a row that follow each other.
struct Job {
    row: usize,
    groups: Range<usize>,
}

impl<'a> Forward<'a> {
    /// z `[B, N, F]`, v `[B, N, D]`, w0 `[D, F]`; what the output is added to, `[B, N, D]`. `None` if there
    /// are no kernels for them.
    pub fn new(
        zv: [&Tensor<3>; 2],
        w0: &Tensor<2>,
        onto: Option<&Tensor<3>>,
        shape: &'a Shape,
    ) -> Option<Self> {
        let i = inputs(zv, w0, shape)?;
        let onto = match onto {
            None => None,
            Some(x) => Some(Buffer::of(x).filter(|x| x.dtype() == DType::BF16)?),
        };
        let s = &i.sizes;
        let most = s.most(&shape.pieces);
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
        let of_rows: Vec<&[Group]> = rows.iter().map(|(all, _)| &all[..]).collect();
        Some(Self {
            ahead: Ahead::new(&i.z, s, &of_rows, false),
            output: i.v.empty(i.v.dims(), DType::BF16),
            slab: i.z.empty([most, s.d, s.f], DType::BF16),
            states: rows
                .iter()
                .map(|(all, _)| all.iter().any(|group| !group.whole).then(state))
                .collect(),
            onto,
            carried: rows.iter().any(both).then(state),
            squares: i.z.empty([ends + 1], DType::F32),
            known: 0,
            partial: i.z.empty([s.blocks(), most], DType::F32),
            norm: i.z.empty([1], DType::F32),
            rows,
            shape,
            i,
        })
    }

    /// What the row's last document has written here, VᵀZ over all of its pieces: `[D, F]` f32, the very sum
    /// that its next piece would read.
    pub fn written(&mut self, row: usize) -> Tensor<2> {
        let s = &self.i.sizes;
        let all = &self.rows[row].0;
        let open = open_at(all)..all.len();
        let sum = self.i.z.empty([s.d, s.f], DType::F32);
        let mut writes = vec![&sum, &self.slab];
        writes.extend(self.ahead.buffer());
        let (i, lr, ahead) = (&self.i, self.shape.lr, &self.ahead);
        on_stream(&[&i.z, &i.v, &i.w0], &writes, |cx, from, to| {
            let pass = Pass::new(i, from, lr);
            cx.zero(to[0], 4 * s.elements())?;
            for at in open.clone() {
                let (group, buffer) = (&all[at], to.get(2).copied().unwrap_or(0));
                let slab = ahead.address(s, (row, at), buffer, to[1]);
                pass.updates(cx, row, group, slab, group.writes())?;
                let which = (group.adds(), group.replaces());
                gather(cx, s, group, (slab, to[0]), which)?;
            }
            Ok(())
        });
        open.for_each(|at| self.ahead.fill(row, at));
        sum.tensor()
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
        if !own.is_empty() {
            // Of a row's first rank these are all documents, and the others wait.
            exchange.pass_on();
            self.walk(&own, &vec![None; self.rows.len()]);
        }
        self.fill(&carried, &mut exchange);
        let sums = exchange.finish();
        if !carried.is_empty() {
            self.walk(&carried, &arrived(&sums));
        }
        self.largest();
        let last = self.rows.iter().zip(self.states);
        let last = last.map(|((all, _), state)| {
            let leaves = |group: &Group| group.last().reads && !group.whole;
            let state = state.filter(|_| all.last().is_some_and(leaves));
            state.map(|state| state.tensor::<2>())
        });
        // The weights of all pieces, where they are together.
        let together =
            matches!(&self.rows[..], [(all, _)] if matches!(&all[..], [group] if group.whole));
        Outcome {
            weights: together.then(|| self.slab.tensor()),
            output: self.output.tensor(),
            norm: self.norm.tensor(),
            last: last.collect(),
            arrived: sums,
        }
    }

    /// The updates of the groups that need what arrives, as many as have places, some before what others wait
    /// for is passed on, some after it.
    fn fill(&mut self, jobs: &[Job], exchange: &mut Exchange) {
        let all = jobs
            .iter()
            .flat_map(|job| job.groups.clone().map(|at| (job.row, at)));
        let waiting: Vec<_> = all.filter(|&(row, at)| self.ahead.waits(row, at)).collect();
        let (before, after) = waiting.split_at(waiting.len() / 2);
        for part in [before, after] {
            if let (Some(buffer), false) = (self.ahead.buffer(), part.is_empty()) {
                let (i, lr, ahead) = (&self.i, self.shape.lr, &self.ahead);
                on_stream(&[&i.z, &i.v, &i.w0], &[buffer], |cx, from, to| {
                    let pass = Pass::new(i, from, lr);
                    for &(row, at) in part {
                        let group = &self.rows[row].0[at];
                        let place = ahead.address(&i.sizes, (row, at), to[0], 0);
                        pass.updates(cx, row, group, place, group.writes())?;
                    }
                    Ok(())
                });
            }
            exchange.pass_on();
        }
        for (row, at) in waiting {
            self.ahead.fill(row, at);
        }
    }

    /// The groups of `jobs`; for each row, the state that it begins with.
    fn walk(&mut self, jobs: &[Job], arriving: &[Option<Buffer>]) {
        let (i, lr) = (&self.i, self.shape.lr);
        let s = &i.sizes;
        let mut reads = vec![&i.z, &i.v, &i.w0];
        reads.extend(arriving.iter().flatten());
        reads.extend(&self.onto);
        let mut writes = vec![&self.output, &self.slab, &self.squares, &self.partial];
        writes.extend(&self.carried);
        writes.extend(self.states.iter().flatten());
        writes.extend(self.ahead.buffer());
        let (rows, ahead) = (&self.rows, &self.ahead);
        let (known, apart) = (self.known, self.carried.is_some());
        let ends = jobs.iter().map(|job| {
            let groups = rows[job.row].0[job.groups.clone()].iter();
            groups
                .map(|group| group.ends().count_ones() as usize)
                .sum::<usize>()
        });
        self.known += ends.sum::<usize>();
        let (states, onto) = (&self.states, self.onto.is_some());
        on_stream(&reads, &writes, |cx, from, to| {
            let (output, slab, squares, partial) = (to[0], to[1], to[2], to[3]);
            let mut at = 3;
            let arriving = addresses(arriving, from, &mut at);
            let onto = onto.then(|| from[at]);
            let mut at = 4 + usize::from(apart);
            let states = addresses(states, to, &mut at);
            let places = to.get(at).copied().unwrap_or(0);
            let pass = Pass::new(i, from, lr);
            let mut next = squares + 4 * (1 + known) as u64;
            for job in jobs {
                let (all, carried) = &rows[job.row];
                let others = job.groups.end < all.len() && apart;
                let state = match others {
                    true => to[4],
                    false => states[job.row].unwrap_or(0),
                };
                if let (true, Some(source)) = (job.groups.start < *carried, arriving[job.row]) {
                    cx.copy(state, source, 4 * s.elements())?;
                }
                for at in job.groups.clone() {
                    let group = &all[at];
                    let slab = ahead.address(s, (job.row, at), places, slab);
                    let state = if group.whole { 0 } else { state };
                    let (to, norms) = ((slab, state), (next, partial));
                    let filled = ahead.is_filled(job.row, at);
                    if filled || !pass.scanned_forward(cx, job.row, group, to, norms)? {
                        if !filled {
                            pass.updates(cx, job.row, group, slab, group.writes())?;
                        }
                        pass.forward(cx, group, to, norms)?;
                    }
                    next += 4 * u64::from(group.ends().count_ones());
                    let z = s.rows(pass.z, job.row, group, s.f);
                    let out = s.rows(output, job.row, group, s.d);
                    let weights = s.slots(slab, group).t();
                    match onto {
                        None => cx.gemm(z, weights, out, 1.0, 0.0)?,
                        Some(x) => {
                            let x = s.rows(x, job.row, group, s.d);
                            cx.gemm_onto(z, weights, out, x.at, 1.0, 1.0)?;
                        }
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
