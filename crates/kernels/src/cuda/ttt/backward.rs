//! The backward pass.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::ahead::gather;
use super::scanned::Sums;
use super::selection::covered;
use super::{
    Ahead, Group, Inputs, Pass, Shape, addresses, arrived, groups, inputs, matrices, open_at,
};
use crate::cuda::hopper::learned_fits;
use crate::cuda::stream::{Buffer, on_stream};
use crate::ops::ttt::Gradients;
use crate::ops::ttt::carry::Exchange;
use crate::packing::Write;

mod products;

use products::Products;

/// What the forward pass kept.
#[derive(Debug)]
pub struct Kept<'a> {
    /// The state at the end of a row, f32 where there is one; used up.
    pub last: &'a mut [Option<Tensor<2>>],
    /// The state that a row began with, where the document it belongs to is not the row's last.
    pub first: &'a [Option<Tensor<2>>],
    /// The weights that the pieces of all rows read, if they are there.
    pub weights: Option<&'a Tensor<3>>,
}

/// Elements of a buffer that stands for none.
const NO_SCRATCH: usize = 8;

/// A backward pass and its memory.
pub struct Backward<'a> {
    i: Inputs,
    shape: &'a Shape,
    rows: Vec<Vec<Group<'a>>>,
    dy: Buffer,
    last: Vec<Option<Buffer>>,
    first: Vec<Option<Buffer>>,
    dv: Buffer,
    dw0: Buffer,
    /// G and S of the row at hand.
    later: Buffer,
    state: Buffer,
    /// Slabs: of VᵀZ, then the weights that pieces read, or those that were kept; of dOᵀZ, then of the
    /// sums of later pieces.
    weights: Weights,
    sums: Buffer,
    /// Of gate and up side by side `[T, 2F]`, which made Z: their values and their gradients.
    pair: Option<[Buffer; 2]>,
    /// dW0 holds a sum.
    begun: bool,
    /// dOᵀZ that are made before their group's turn.
    ahead: Ahead,
    /// The slab holds VᵀZ of the group that is next.
    filled: bool,
}

/// The weights that pieces read.
enum Weights {
    /// Those of all rows.
    Kept(Buffer),
    /// Memory for those of one group.
    Slab(Buffer),
}

/// Groups of a row that follow each other.
struct Job {
    row: usize,
    groups: Range<usize>,
    /// Whether they end with the row.
    last: bool,
}

impl<'a> Backward<'a> {
    /// Of what [`super::Forward`] was given, and the output's gradient; `None` if there are no kernels
    /// for them.
    pub fn new(
        zv: [&Tensor<3>; 2],
        w0: &Tensor<2>,
        kept: Kept,
        dy: &Tensor<3>,
        shape: &'a Shape,
    ) -> Option<Self> {
        let i = inputs(zv, w0, shape)?;
        let first = matrices(kept.first)?;
        let dy = Buffer::of(dy).filter(|b| b.dtype() == DType::BF16)?;
        let s = &i.sizes;
        let most = s.most(&shape.pieces);
        let rows: Vec<_> = shape.pieces.iter().map(|p| groups(p, most)).collect();
        let slab = || i.z.empty([most, s.d, s.f], DType::BF16);
        let weights = match kept.weights {
            Some(weights) => Weights::Kept(Buffer::of(weights)?),
            None => Weights::Slab(slab()),
        };
        // Where no group has a state, nothing is read or written there.
        let state = match rows.iter().flatten().all(|group| group.whole) {
            true => vec![NO_SCRATCH],
            false => vec![s.d, s.f],
        };
        let [later, state] = [(); 2].map(|()| i.z.empty(state.clone(), DType::F32));
        // Copied before it is peeled: the tape may still hold the kept state.
        let last = kept.last.iter_mut();
        let last = last.map(|state| state.take().and_then(|t| Buffer::of(&t)));
        let of_rows: Vec<&[Group]> = rows.iter().map(|all| &all[..]).collect();
        Some(Self {
            ahead: Ahead::new(&i.z, s, &of_rows, true),
            dw0: i.z.empty([s.d, s.f], DType::F32),
            sums: slab(),
            rows,
            dv: i.v.empty(i.v.dims(), DType::BF16),
            last: last.collect(),
            first,
            dy,
            later,
            state,
            weights,
            pair: None,
            begun: false,
            filled: false,
            shape,
            i,
        })
    }

    /// On through the SwiGLU that made Z of `pair`, gate and up side by side `[T, 2F]`.
    pub fn through(mut self, pair: &Buffer) -> Self {
        let dpair = pair.empty(pair.dims(), DType::BF16);
        self.pair = Some([pair.clone(), dpair]);
        self
    }

    /// Σ dOᵀZ over the pieces of the row's document that began before it, all of which read what arrived:
    /// `[D, F]` f32, the very sum that goes back to the piece before them.
    pub fn read(&mut self, row: usize) -> Tensor<2> {
        let s = &self.i.sizes;
        let all = &self.rows[row];
        let carried = all.iter().take_while(|group| group.last().carried).count();
        let sum = self.i.z.empty([s.d, s.f], DType::F32);
        let mut writes = vec![&sum, &self.sums];
        writes.extend(self.ahead.buffer());
        let (i, lr, ahead) = (&self.i, self.shape.lr, &self.ahead);
        let reads = [&i.z, &i.v, &i.w0, &self.dy];
        on_stream(&reads, &writes, |cx, from, to| {
            let pass = Pass::new(i, from, lr);
            cx.zero(to[0], 4 * s.elements())?;
            for at in (0..carried).rev() {
                let (group, buffer) = (&all[at], to.get(2).copied().unwrap_or(0));
                let sums = ahead.address(s, (row, at), buffer, to[1]);
                let products = Products {
                    pass: &pass,
                    dy: from[3],
                    slabs: (0, sums),
                };
                products.gradients(cx, row, group)?;
                gather(cx, s, group, (sums, to[0]), (group.mask(|_| true), 0))?;
            }
            Ok(())
        });
        (0..carried).for_each(|at| self.ahead.fill(row, at));
        sum.tensor()
    }

    /// All of it; the documents that end here while the gradients of the others' fast weights are on
    /// their way.
    pub fn run(mut self, mut exchange: Exchange) -> Gradients {
        let (mut own, mut open) = (vec![], vec![]);
        for (row, all) in self.rows.iter().enumerate() {
            let begin = match exchange.arrives(row) {
                true => open_at(all),
                false => all.len(),
            };
            let job = |groups: Range<usize>| Job {
                row,
                last: groups.end == all.len(),
                groups,
            };
            own.extend((begin > 0).then(|| job(0..begin)));
            open.extend((begin < all.len()).then(|| job(begin..all.len())));
        }
        let dz = self.inner_gradient();
        if !own.is_empty() {
            // Of a row's last rank these are all documents, and the others wait.
            exchange.pass_on();
            self.walk(&own, &dz, &vec![None; self.rows.len()]);
        }
        self.fill(&open, &mut exchange);
        let returned = exchange.finish();
        if !open.is_empty() {
            self.walk(&open, &dz, &arrived(&returned));
        }
        Gradients {
            z: match self.pair {
                Some([_, dpair]) => dpair.tensor::<2>().unsqueeze(),
                None => dz.tensor(),
            },
            v: self.dv.tensor(),
            w0: self.dw0.tensor(),
            returned,
        }
    }

    /// Memory for dZ; if that goes on through SwiGLU, of one group at a time, or none where the product does.
    fn inner_gradient(&self) -> Buffer {
        let (z, s) = (&self.i.z, &self.i.sizes);
        if self.pair.is_none() {
            return z.empty(z.dims(), DType::BF16);
        }
        let groups = self.rows.iter().flatten();
        let length = |group: &Group| group.pieces[0].range.len();
        let pieces: Vec<usize> = groups.clone().map(length).collect();
        if learned_fits(&pieces, s.d, s.f) {
            return z.empty([NO_SCRATCH], DType::BF16);
        }
        let tokens = groups.map(|group| group.pieces.len() * length(group));
        z.empty([tokens.max().unwrap_or(1), s.f], DType::BF16)
    }

    /// Products of groups that need what returns: VᵀZ of the first before what others wait for is passed on,
    /// dOᵀZ of as many as have places after it.
    fn fill(&mut self, jobs: &[Job], exchange: &mut Exchange) {
        let (i, lr) = (&self.i, self.shape.lr);
        let reads = [&i.z, &i.v, &i.w0, &self.dy];
        // Of a group that needs what returns, no weights were kept.
        if let (Some(job), Weights::Slab(weights)) = (jobs.first(), &self.weights) {
            let group = &self.rows[job.row][job.groups.end - 1];
            on_stream(&reads, &[weights], |cx, from, to| {
                let pass = Pass::new(i, from, lr);
                let slabs = (to[0], 0);
                let dy = from[3];
                let products = Products {
                    pass: &pass,
                    dy,
                    slabs,
                };
                products.updates(cx, job.row, group)
            });
            self.filled = true;
        }
        exchange.pass_on();
        let all = jobs
            .iter()
            .flat_map(|job| job.groups.clone().rev().map(|at| (job.row, at)));
        let waiting: Vec<_> = all.filter(|&(row, at)| self.ahead.waits(row, at)).collect();
        if let (Some(buffer), false) = (self.ahead.buffer(), waiting.is_empty()) {
            on_stream(&reads, &[buffer], |cx, from, to| {
                let pass = Pass::new(i, from, lr);
                for &(row, at) in &waiting {
                    let sums = self.ahead.address(&i.sizes, (row, at), to[0], 0);
                    let products = Products {
                        pass: &pass,
                        dy: from[3],
                        slabs: (0, sums),
                    };
                    products.gradients(cx, row, &self.rows[row][at])?;
                }
                Ok(())
            });
        }
        for (row, at) in waiting {
            self.ahead.fill(row, at);
        }
    }

    /// The groups of `jobs`, backwards; for each row, G at its end.
    fn walk(&mut self, jobs: &[Job], dz: &Buffer, behind: &[Option<Buffer>]) {
        let (i, lr) = (&self.i, self.shape.lr);
        let s = &i.sizes;
        // Three lists of matrices follow, each without its gaps.
        let lists = [&self.last[..], &self.first, behind];
        let mut reads = vec![&i.z, &i.v, &i.w0, &self.dy];
        reads.extend(lists.iter().flat_map(|list| list.iter().flatten()));
        let mut writes = vec![
            dz,
            &self.dv,
            &self.dw0,
            &self.later,
            &self.state,
            &self.sums,
        ];
        let pair = &self.pair;
        let has_scratch = dz.len() > NO_SCRATCH;
        let known = match &self.weights {
            Weights::Kept(weights) => {
                reads.push(weights);
                true
            }
            Weights::Slab(weights) => {
                writes.push(weights);
                false
            }
        };
        reads.extend(pair.iter().map(|[values, _]| values));
        writes.extend(pair.iter().map(|[_, gradients]| gradients));
        let places = writes.len();
        writes.extend(self.ahead.buffer());
        let (rows, ahead) = (&self.rows, &self.ahead);
        let mut begun = std::mem::replace(&mut self.begun, true);
        let mut filled = std::mem::take(&mut self.filled);
        on_stream(&reads, &writes, |cx, from, to| {
            let dy = from[3];
            let (dz, dv, dw0, later, state, sums) = (to[0], to[1], to[2], to[3], to[4], to[5]);
            let mut at = 4;
            let [last, first, behind] = lists.map(|list| addresses(list, from, &mut at));
            let scratch = has_scratch.then_some(dz);
            let weights = if known { from[at] } else { to[6] };
            let pair = pair.as_ref().map(|_| match known {
                true => (from[at + 1], to[6]),
                false => (from[at], to[7]),
            });
            let pass = Pass::new(i, from, lr);
            let places = to.get(places).copied().unwrap_or(0);
            for job in jobs {
                let row = job.row;
                let all = &rows[row];
                let last = last[row].filter(|_| job.last);
                let behind = behind[row].filter(|_| job.last);
                let (mut has_state, mut has_later) = (last.is_some(), behind.is_some());
                for (to, source) in [(state, last), (later, behind)] {
                    if let Some(source) = source {
                        cx.copy(to, source, 4 * s.elements())?;
                    }
                }
                for at in job.groups.clone().rev() {
                    let group = &all[at];
                    let sums = ahead.address(s, (row, at), places, sums);
                    let products = Products {
                        pass: &pass,
                        dy,
                        slabs: (weights, sums),
                    };
                    if group.ends_document() && !group.whole && !has_state {
                        // An earlier document of the row: its state was not kept, so sum it again.
                        let start = group.last().document_start;
                        if let (true, Some(source)) = (group.last().carried, first[row]) {
                            cx.copy(state, source, 4 * s.elements())?;
                        }
                        let of_document = |g: &&Group| g.last().range.end > start;
                        for earlier in all[..=at].iter().filter(of_document) {
                            pass.updates(cx, row, earlier, weights, earlier.writes())?;
                            let which = (earlier.adds(), earlier.replaces());
                            gather(cx, s, earlier, (weights, state), which)?;
                        }
                        has_state = true;
                    }
                    let (gets, keeps) = receivers(group, &mut has_later);
                    has_state &= group.pieces.iter().all(|piece| piece.reads);
                    let taken = products.taken(cx, row, group, gets)?;
                    let to = Sums {
                        weights: (!known).then_some(weights),
                        sums,
                        state,
                        later,
                        dw0,
                        holds: std::mem::replace(&mut begun, true),
                    };
                    let there = (std::mem::take(&mut filled), ahead.is_filled(row, at));
                    let masks = [gets, keeps, covered(&taken)];
                    products.summed(cx, (row, group), there, &to, masks)?;
                    match pair {
                        Some(pair) => {
                            let at = (pair, scratch);
                            products.through(cx, row, group, at, (gets, &taken))?;
                        }
                        None => {
                            let dz = s.rows(dz, row, group, s.f);
                            products.inner(cx, row, group, dz, &taken)?;
                        }
                    }
                    products.targets(cx, row, group, dv, &taken)?;
                }
            }
            Ok(())
        });
    }
}

/// The pieces that get a gradient for what they wrote, and those whose own readers' sum goes on to the
/// piece before; `has_later`: whether pieces behind the group read its state, then those before it.
fn receivers(group: &Group, has_later: &mut bool) -> (u32, u32) {
    let (mut gets, mut keeps) = (0u32, 0u32);
    for (bit, piece) in group.pieces.iter().enumerate().rev() {
        let writes = u32::from(piece.write != Write::Nothing && *has_later);
        let adds = u32::from(piece.write == Write::Add && *has_later);
        gets |= writes << bit;
        keeps |= adds << bit;
        *has_later = piece.reads;
    }
    (gets, keeps)
}
