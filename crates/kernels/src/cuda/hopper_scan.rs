//! The TTT scan's products together with their running sums, for Hopper GPUs (`source/hopper_scan.cu`): the
//! products of single pieces are never written, and what the pieces read is written once.

use burn::tensor::DType;

use super::gemm::Matrix;
use super::hopper::{DEPTH, THREADS, TILE};
use super::stream::{Arg, Context};
use super::tensor_map::map;
use super::ttt::of_one_processor;
use crate::work::Work;

/// Stages, and parts of W0 under way with their columns, as in the source.
const STAGES: usize = 4;
const RING: usize = 4;
const PART: usize = 32;

/// Bytes of the widest tile's stages or of the narrow one's and W0, and what aligns the first.
const SHARED: u32 = (STAGES * (TILE + 192) * DEPTH * 2 + RING * TILE * PART * 4 + 1024) as u32;

/// Chains, and pieces of a chain, that a launch takes.
const MOST: usize = 32;

/// Of the clusters' time, at least so much is work. Where a chain of 31 pieces at 500m's sizes kept .73 of them busy, a
/// form of the kernel took as long as the two before it; where .97, .84 of that (H100, docs/benchmarks.md).
const LEAST_BUSY: f64 = 0.85;

/// "None", as in the source.
const NO_SLOT: u32 = 255;
const NO_SQUARE: u32 = 31;

/// What the sums are, and which slots they are written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Pieces in order. W0 + η S, S the sum of the pieces before, into each one's slot.
    Forward,
    /// From the last to the first. η G, G the sum of the pieces behind, into each one's slot.
    Backward,
    /// From the last to the first: each is taken off the sum, then W0 + η S into its slot.
    Peel,
}

impl Form {
    /// Columns of a tile; where W0 takes registers too, there are enough for the second only.
    fn columns(self) -> &'static [usize] {
        match self {
            Self::Forward | Self::Peel => &[192],
            Self::Backward => &[256, 192],
        }
    }
}

/// Pieces of a group that follow each other, those of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The piece that is multiplied first.
    pub first: usize,
    /// How many are multiplied.
    pub steps: usize,
    /// The slot that the sum of all of them leaves to: scaled and on top of W0 as the others, but the bare sum
    /// in [`Form::Backward`].
    pub end: Option<usize>,
    /// The sums begin with what `enter` holds, instead of zero.
    pub enters: bool,
    /// The sum goes to `leave`.
    pub leaves: bool,
    /// Before the first product the slot of the piece `first` is written, or of the one behind it in
    /// [`Form::Peel`]. Without a sum that enters, only W0 in [`Form::Forward`] can be.
    pub opens: bool,
    /// Which of the squared norms is that of the sum.
    pub square: Option<usize>,
}

impl Chain {
    /// As the kernels read it.
    fn bits(&self) -> u32 {
        let flags = [self.enters, self.leaves, self.opens];
        let flags = flags
            .iter()
            .rev()
            .fold(0, |all, &on| all << 1 | u32::from(on));
        let square = self.square.map_or(NO_SQUARE, |k| k as u32);
        let end = self.end.map_or(NO_SLOT, |slot| slot as u32);
        self.first as u32 | (self.steps as u32) << 5 | end << 13 | flags << 21 | square << 24
    }
}

/// Addresses of matrices `[D, F]`, 0 where there is none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Matrices {
    /// bf16, one below the other, a slot for each piece of the group.
    pub slots: u64,
    /// W0 in f32; not read in [`Form::Backward`].
    pub w0: u64,
    /// f32, each element read before it is written in `leave`, so that both may be one.
    pub enter: u64,
    /// f32.
    pub leave: u64,
    /// Partial sums of the squared norms, f32: `[groups, norms]`.
    pub squares: u64,
}

/// Tiles of a launch, each cluster's.
struct Layout {
    columns: usize,
    /// Tiles of one chain.
    pairs: usize,
    clusters: usize,
}

impl Layout {
    /// What the clusters take, in columns of blocks of depth, and how much of it is work.
    fn time(&self, chains: &[Chain]) -> (usize, f64) {
        let mut loads = vec![0; self.clusters];
        let units = chains
            .iter()
            .flat_map(|c| std::iter::repeat_n(c.steps, self.pairs));
        for (at, steps) in units.enumerate() {
            loads[at % self.clusters] += steps;
        }
        let longest = loads.iter().copied().max().unwrap_or(0);
        let busy = loads.iter().sum::<usize>() as f64 / (longest * self.clusters).max(1) as f64;
        (longest * self.columns, busy)
    }
}

/// The form of tiles that takes these chains fastest, if it leaves few clusters idle.
fn layout(
    form: Form,
    chains: &[Chain],
    [d, f, tokens]: [usize; 3],
    clusters: usize,
) -> Option<Layout> {
    // A block of tokens for each part of a tile to leave in.
    let fits = |&&columns: &&usize| tokens >= columns / PART * DEPTH;
    let all = form.columns().iter().filter(fits).map(|&columns| Layout {
        columns,
        pairs: d / (2 * TILE) * f.div_ceil(columns),
        clusters,
    });
    let (_, best) = all
        .map(|layout| (layout.time(chains), layout))
        .filter(|((_, busy), _)| *busy >= LEAST_BUSY)
        .min_by_key(|((time, _), _)| *time)?;
    Some(best)
}

/// `[rows, columns]` bf16 in boxes of `height` rows × `wide` · 64 columns, each 64 columns of them together.
fn boxes(matrix: &Matrix, height: usize, wide: usize) -> Result<Arg, String> {
    let extents = [DEPTH, matrix.rows, matrix.columns / DEPTH];
    let strides = [2 * matrix.ld, 2 * DEPTH];
    map(
        (matrix.at, matrix.dtype),
        extents,
        &strides,
        [DEPTH, height, wide],
    )
}

impl Context<'_> {
    /// The tiles of these chains, and the chains in their order; `None` if there is no kernel for them.
    fn scanned_layout(
        &mut self,
        form: Form,
        chains: &[Chain],
        [a, z]: [&Matrix; 2],
        tokens: usize,
    ) -> Result<Option<(Layout, Vec<Chain>)>, String> {
        let (d, f) = (a.columns, z.columns);
        let sound = |m: &Matrix| {
            m.dtype == DType::BF16
                && !m.transposed
                && m.at.is_multiple_of(16)
                && m.ld.is_multiple_of(8)
        };
        let few = |chain: &Chain| chain.first < MOST && chain.steps <= MOST;
        let small = chains.len() <= MOST && chains.iter().all(few) && d * f <= u32::MAX as usize;
        // Of a narrower F the parts of norms would be more than those of the separate kernel.
        let whole = d.is_multiple_of(2 * TILE) && f.is_multiple_of(DEPTH) && f >= TILE;
        let whole = whole && tokens.is_multiple_of(DEPTH);
        if !(self.is_hopper() && sound(a) && sound(z) && small && whole) {
            return Ok(None);
        }
        // The longest first: what comes last then fills the gaps best.
        let mut chains = chains.to_vec();
        chains.sort_by_key(|chain| std::cmp::Reverse(chain.steps));
        let clusters = self.processors_for_products()? as usize / 2;
        // One cluster is always busy.
        let weighed = if of_one_processor() { 1 } else { clusters };
        let layout = layout(form, &chains, [d, f, tokens], weighed);
        Ok(layout.map(|layout| (Layout { clusters, ..layout }, chains)))
    }

    /// Whether [`Context::scanned_product`] has a kernel for these chains.
    pub fn scanned_fits(
        &mut self,
        form: Form,
        chains: &[Chain],
        of: [&Matrix; 2],
        tokens: usize,
    ) -> Result<bool, String> {
        Ok(self.scanned_layout(form, chains, of, tokens)?.is_some())
    }

    /// The sums of aᵀ z over the pieces of `chains`: a `[pieces · tokens, D]`, z `[pieces · tokens, F]` bf16 of a
    /// group's pieces, each of `tokens`. Squared norms, of which there are `norms`, are left in parts.
    ///
    /// Returns the number of those parts; `None` if there is no kernel for them, and nothing was done: unless D is a
    /// multiple of 256, F of 64 and 128 at least, pieces are whole blocks of 64 tokens and long enough (384; backward in
    /// its wide tiles 512), and the tiles keep the GPU busy.
    pub fn scanned_product(
        &mut self,
        form: Form,
        chains: &[Chain],
        [a, z]: [Matrix; 2],
        tokens: usize,
        (to, norms): (Matrices, usize),
        lr: f32,
    ) -> Result<Option<usize>, String> {
        let Some((layout, chains)) = self.scanned_layout(form, chains, [&a, &z], tokens)? else {
            return Ok(None);
        };
        let (d, f) = (a.columns, z.columns);
        let aligned = [to.slots, to.w0, to.enter, to.leave];
        if norms >= NO_SQUARE as usize || !aligned.iter().all(|at| at.is_multiple_of(16)) {
            return Ok(None);
        }
        let mut table = [0; MOST];
        for (entry, chain) in table.iter_mut().zip(&chains) {
            *entry = chain.bits();
        }
        // A form without W0 is given some map.
        let w0 = match form {
            Form::Forward | Form::Peel => to.w0,
            Form::Backward => to.slots,
        };
        let w0 = (w0, DType::F32);
        let args = [
            boxes(&a, DEPTH, TILE / DEPTH)?,
            boxes(&z, DEPTH / 2, layout.columns / DEPTH)?,
            map(w0, [f, d], &[4 * f], [PART, TILE])?,
            Arg::Chains(table),
            Arg::Int(chains.len() as i32),
            Arg::Ptr(to.slots),
            Arg::Ptr(to.enter),
            Arg::Ptr(to.leave),
            Arg::Ptr(to.squares),
            Arg::Int(norms as i32),
            Arg::Float(lr),
            Arg::Int(d as i32),
            Arg::Int(f as i32),
            Arg::Int(tokens as i32),
        ];
        let name = match (form, layout.columns) {
            (Form::Forward, _) => "scanned_forward",
            (Form::Peel, _) => "scanned_peel",
            (Form::Backward, 256) => "scanned_backward",
            (Form::Backward, _) => "scanned_backward_192",
        };
        let pieces: usize = chains.iter().map(|c| c.steps).sum();
        let blocks = (2 * layout.clusters) as u32;
        self.doing(Work::Flops(2.0 * (pieces * tokens) as f64 * (d * f) as f64))
            .launch_shared(name, (blocks, 1, 1), THREADS, SHARED, &args)?;
        // Of each tile's two blocks, those of eight warps.
        Ok(Some(layout.pairs * 16))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chains(steps: &[usize]) -> Vec<Chain> {
        let chain = |&steps| Chain {
            first: 0,
            steps,
            end: None,
            enters: false,
            leaves: false,
            opens: false,
            square: None,
        };
        steps.iter().map(chain).collect()
    }

    #[test]
    fn narrow_tiles_where_wide_ones_leave_clusters_idle() {
        let columns = |steps: &[usize], sizes| {
            layout(Form::Backward, &chains(steps), sizes, 66).map(|layout| layout.columns)
        };
        assert_eq!(columns(&[31], [1024, 3072, 1024]), Some(192));
        assert_eq!(columns(&[3; 8], [1024, 3072, 1024]), Some(256));
        assert_eq!(columns(&[7], [2560, 9728, 1024]), Some(256));
        // Four pairs of tiles for 66 clusters; pieces that end before a tile has left.
        assert_eq!(columns(&[31], [512, 512, 1024]), None);
        assert_eq!(columns(&[3; 8], [1024, 3072, 320]), None);
        let forward =
            |f| layout(Form::Forward, &chains(&[7]), [2560, f, 1024], 66).map(|l| l.pairs);
        // The last tile of a row is not whole.
        assert_eq!(forward(9728), Some(10 * 51));
    }

    #[test]
    fn a_chain_is_told_apart_in_each_field() {
        let chain = Chain {
            first: 31,
            steps: 32,
            end: Some(31),
            enters: true,
            leaves: false,
            opens: true,
            square: Some(30),
        };
        let bits = chain.bits();
        assert_eq!([bits & 31, bits >> 5 & 255, bits >> 13 & 255], [31, 32, 31]);
        assert_eq!([bits >> 21 & 7, bits >> 24], [0b101, 30]);
    }
}
