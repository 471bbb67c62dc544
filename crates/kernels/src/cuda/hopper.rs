//! Matrix products that end in SwiGLU or in a rotation, for Hopper GPUs (`source/hopper_backward.cu`,
//! `source/hopper_gated.cu`): what the separate kernels read and write between the product and its last step
//! stays in registers.

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::DType;

use super::gemm::Matrix;
use super::stream::{Arg, Context};
use super::tensor_map;
use crate::work::Work;

/// As in the source: rows and columns of a tile, its depth, stages of shared memory.
pub(super) const TILE: usize = 128;
pub(super) const DEPTH: usize = 64;
const STAGES: usize = 6;

/// Columns of each half of a tile of the forward products, and their stages.
const HALF: usize = 128;
const HELD_STAGES: usize = 4;

/// Rows that a warp of a forward product holds of a tile.
const WARP_ROWS: usize = 16;

/// The deepest [`Context::rotated_product`] that was measured: beside cuBLASLt's product and the rotation after it
/// it takes .84 of the time at a depth of 1024, .90 at 2048 (H100, docs/benchmarks.md).
const MOST_ROTATED: usize = 2048;

/// Columns of a head in [`Context::rotated_product`].
pub const ROTATED_HEAD: usize = HALF;

/// Bytes of shared memory of so many stages, each of `lines` lines of depth: they, and what aligns the
/// first.
const fn shared(stages: usize, lines: usize) -> u32 {
    (stages * lines * DEPTH * 2 + 1024) as u32
}

/// Of a product of two tiles, and of the forward products.
const SHARED: u32 = shared(STAGES, 2 * TILE);
const SHARED_HELD: u32 = shared(HELD_STAGES, TILE + 2 * HALF);

/// A product of this process ran on a kernel of this file.
static RAN: AtomicBool = AtomicBool::new(false);

/// Whether [`Context::learned_product_backward`] has a kernel for pieces of these sizes, at most 32 of a
/// group, as far as the host knows: once one of these kernels has run.
pub fn learned_fits(pieces: &[usize], d: usize, f: usize) -> bool {
    let whole = |piece: &usize| piece.is_multiple_of(2 * TILE);
    RAN.load(Ordering::Relaxed)
        && pieces.iter().all(whole)
        && d.is_multiple_of(DEPTH)
        && f.is_multiple_of(TILE)
}

/// Whether [`Context::gated_product`] has a kernel for these sizes, as far as the host knows: once one of
/// these kernels has run.
pub fn gated_fits(d: usize, f: usize) -> bool {
    RAN.load(Ordering::Relaxed) && d.is_multiple_of(DEPTH) && f.is_multiple_of(TILE)
}

/// Threads of a block: a warpgroup that loads, two that multiply.
pub(super) const THREADS: u32 = 384;

/// `[rows, columns]` bf16 in boxes of `height` × 64.
fn map(matrix: &Matrix, height: usize) -> Result<Arg, String> {
    let extents = [matrix.columns, matrix.rows];
    let part = [DEPTH, height];
    tensor_map::map((matrix.at, DType::BF16), extents, &[2 * matrix.ld], part)
}

/// Whether the kernels take operands like these: bf16, row-major, whole tiles, aligned.
fn fits(cx: &mut Context, matrices: &[&Matrix], outputs: &[u64], k: usize, f: usize) -> bool {
    let sound = |m: &&Matrix| {
        m.dtype == DType::BF16 && !m.transposed && m.at.is_multiple_of(16) && m.ld.is_multiple_of(8)
    };
    cx.is_hopper()
        && k.is_multiple_of(DEPTH)
        && f.is_multiple_of(TILE)
        && outputs.iter().all(|at| at.is_multiple_of(16))
        && matrices.iter().all(sound)
}

impl Context<'_> {
    /// gate and up side by side `[T, 2F]` into `pair`, unless that is 0, and `Z = silu(gate) ∘ up` `[T, F]`
    /// into `z`, with gate = x `gate`ᵀ and up = x `up`ᵀ: x `[T, D]`, gate, up `[F, D]`. Returns whether there
    /// is a kernel for them; else nothing was done.
    pub fn gated_product(
        &mut self,
        x: Matrix,
        (gate, up): (Matrix, Matrix),
        (pair, z): (u64, u64),
    ) -> Result<bool, String> {
        let (k, f) = (x.columns, gate.rows);
        if !fits(self, &[&x, &gate, &up], &[pair, z], k, f) {
            return Ok(false);
        }
        let args = [
            map(&x, TILE)?,
            map(&gate, HALF)?,
            map(&up, HALF)?,
            Arg::Ptr(pair),
            Arg::Ptr(z),
            Arg::Int(x.rows as i32),
            Arg::Int(f as i32),
            Arg::Int(k as i32),
        ];
        self.doing(Work::Flops(4.0 * x.rows as f64 * (f * k) as f64))
            .launch_clusters("product_gated", SHARED_HELD, &args)
    }

    /// Queries, keys and values `[T, S]` into `out`, those of the first `turned` heads rotated by the angles
    /// of their tokens: x `w`ᵀ with x `[T, D]`, w `[S, D]`; cosine and sine `[N, E/2]` f32, E being
    /// `ROTATED_HEAD`; T a multiple of N. Returns whether there is a kernel for them; else nothing was done.
    pub fn rotated_product(
        &mut self,
        x: Matrix,
        w: Matrix,
        out: u64,
        (cosine, sine): (u64, u64),
        (tokens, turned): (usize, usize),
    ) -> Result<bool, String> {
        let (k, s) = (x.columns, w.rows);
        let whole = s.is_multiple_of(2 * HALF) && tokens.is_multiple_of(WARP_ROWS);
        if !whole || k > MOST_ROTATED || !fits(self, &[&x, &w], &[out, cosine, sine], k, s) {
            return Ok(false);
        }
        let args = [
            map(&x, TILE)?,
            map(&w, HALF)?,
            Arg::Ptr(out),
            Arg::Ptr(cosine),
            Arg::Ptr(sine),
            Arg::Int(x.rows as i32),
            Arg::Int(s as i32),
            Arg::Int(k as i32),
            Arg::Int(tokens as i32),
            Arg::Int((turned * ROTATED_HEAD) as i32),
        ];
        self.doing(Work::Flops(2.0 * x.rows as f64 * (s * k) as f64))
            .launch_clusters("product_rotated", SHARED_HELD, &args)
    }

    /// Back through SwiGLU from dy, with dZ = dy `down`: the gradients of gate and up side by side
    /// `[T, 2F]` into `dpair`, Z again into `z` `[T, F]`. dy `[T, D]`, down `[D, F]`, pair `[T, 2F]`. Returns
    /// whether there is a kernel for them; else nothing was done.
    pub fn gated_product_backward(
        &mut self,
        dy: Matrix,
        down: Matrix,
        pair: u64,
        (dpair, z): (u64, u64),
    ) -> Result<bool, String> {
        let (k, f) = (dy.columns, down.columns);
        if !fits(self, &[&dy, &down], &[pair, dpair, z], k, f) {
            return Ok(false);
        }
        let args = [
            map(&dy, TILE)?,
            map(&down, DEPTH)?,
            Arg::Ptr(dpair),
            Arg::Ptr(z),
            Arg::Ptr(pair),
            Arg::Int(dy.rows as i32),
            Arg::Int(f as i32),
            Arg::Int(k as i32),
        ];
        self.doing(Work::Flops(2.0 * dy.rows as f64 * (f * k) as f64))
            .launch_clusters("product_gated_backward", SHARED, &args)
    }

    /// Back through SwiGLU where the down projection learned: dZ = dy Wᵢ + v Gᵢ for piece i of `piece` tokens;
    /// without v Gᵢ where bit i of `gets` is not set: Gᵢ is then not read.
    /// The gradients of gate and up side by side `[T, 2F]` into `dpair`. dy, v `[T, D]`; weights, sums
    /// `[T / piece · D, F]`, those of the pieces one below the other; pair `[T, 2F]`. Returns whether there is a
    /// kernel for them; else nothing was done.
    pub fn learned_product_backward(
        &mut self,
        [dy, v]: [Matrix; 2],
        [weights, sums]: [Matrix; 2],
        (piece, gets): (usize, u32),
        (dpair, pair): (u64, u64),
    ) -> Result<bool, String> {
        let (d, f) = (dy.columns, weights.columns);
        // The two blocks of a cluster, on neighbouring tiles of rows, are then in one piece.
        let whole = piece.is_multiple_of(2 * TILE) && dy.rows.is_multiple_of(piece);
        let whole = whole && dy.rows / piece <= u32::BITS as usize;
        let all = [&dy, &v, &weights, &sums];
        if !whole || !fits(self, &all, &[pair, dpair], d, f) {
            return Ok(false);
        }
        let args = [
            map(&dy, TILE)?,
            map(&v, TILE)?,
            map(&weights, DEPTH)?,
            map(&sums, DEPTH)?,
            Arg::Ptr(dpair),
            Arg::Ptr(pair),
            Arg::Int(dy.rows as i32),
            Arg::Int(f as i32),
            Arg::Int(2 * d as i32),
            Arg::Int(piece as i32),
            Arg::Bits(gets),
        ];
        let rows = dy.rows + gets.count_ones() as usize * piece;
        self.doing(Work::Flops(2.0 * rows as f64 * (f * d) as f64))
            .launch_clusters("product_learned_backward", SHARED, &args)
    }

    /// One block on each multiprocessor but those left to exchanges, in clusters of two.
    fn launch_clusters(
        &mut self,
        name: &'static str,
        shared: u32,
        args: &[Arg],
    ) -> Result<bool, String> {
        let blocks = self.processors_for_products()? / 2 * 2;
        self.launch_shared(name, (blocks, 1, 1), THREADS, shared, args)?;
        RAN.store(true, Ordering::Relaxed);
        Ok(true)
    }
}
