//! Which pieces of a group a product takes, in as few calls as pays.
//!
//! The last piece of a document writes nothing that is read, and nothing comes back for it. Leaving such
//! pieces out may take several batched products in place of one, and each ends in a wave of tiles that
//! fills the GPU in part. So the ways are weighed by the waves that they take.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::cuda::gemm::Matrix;

/// Rows and columns of the tiles that cuBLASLt mostly takes.
const TILE: (usize, usize) = (128, 256);

/// What a tile gets through of its depth while one more call is launched and starts, about 3 µs.
const CALL: usize = 256;

/// Every `stride`-th piece of a group from `first` on, `count` of them: one batched product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: usize,
    stride: usize,
    count: usize,
}

impl Run {
    /// These of `pieces`, a matrix for each piece of the group.
    pub fn of(self, pieces: Matrix) -> Matrix {
        let apart = pieces.batch.1;
        let at = pieces.at + (self.first * apart * pieces.dtype.size()) as u64;
        Matrix { at, ..pieces }.batched(self.count, self.stride * apart)
    }
}

/// A bit for each piece of `runs`.
pub fn covered(runs: &[Run]) -> u32 {
    let pieces = runs
        .iter()
        .flat_map(|run| (0..run.count).map(|i| run.first + i * run.stride));
    pieces.fold(0, |mask, piece| mask | 1 << piece)
}

/// The product of one piece.
#[derive(Clone, Copy, Debug)]
struct Product {
    tiles: usize,
    depth: usize,
}

impl Product {
    /// Tiles one after the other on `processors`, in units of what a call costs.
    fn time(self, runs: &[Run], processors: usize) -> usize {
        let tiles = runs.iter().map(|run| run.count * self.tiles);
        let waves = tiles.map(|tiles| tiles.div_ceil(processors));
        waves.sum::<usize>() * self.depth.div_ceil(CALL) + runs.len()
    }
}

static ONE_PROCESSOR: AtomicBool = AtomicBool::new(false);

/// From now on pieces are left out as if the GPU had a single processor: small products then take the ways
/// of large ones, and those with running sums the kernels that else must keep the GPU busy. For `doctor`.
pub fn leave_out_always(on: bool) {
    ONE_PROCESSOR.store(on, Ordering::Relaxed);
}

/// Whether ways are weighed as if the GPU had a single processor.
pub fn of_one_processor() -> bool {
    ONE_PROCESSOR.load(Ordering::Relaxed)
}

/// The runs that hold the `wanted` pieces of the products `a` `b`, one for each piece of a group; others only
/// where that is faster.
pub fn runs(wanted: u32, [a, b]: [&Matrix; 2], processors: u32) -> Vec<Run> {
    let product = Product {
        tiles: a.rows.div_ceil(TILE.0) * b.columns.div_ceil(TILE.1),
        depth: a.columns,
    };
    let processors = match of_one_processor() {
        true => 1,
        false => processors as usize,
    };
    fastest(wanted, a.batch.0, product, processors)
}

/// The first of the fastest ways: fewer pieces where it makes no difference.
fn fastest(wanted: u32, count: usize, product: Product, processors: usize) -> Vec<Run> {
    if wanted == 0 {
        return vec![];
    }
    let all = Run {
        first: 0,
        stride: 1,
        count,
    };
    let ways = [neighbours(wanted, count), periods(wanted, count)];
    let ways = ways.into_iter().filter(|runs| !runs.is_empty());
    ways.chain([vec![all]])
        .min_by_key(|runs| product.time(runs, processors))
        .unwrap_or_default()
}

fn holds(mask: u32, piece: usize) -> bool {
    mask >> piece & 1 == 1
}

/// One run for wanted pieces that follow each other.
fn neighbours(wanted: u32, count: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = vec![];
    for piece in (0..count).filter(|&piece| holds(wanted, piece)) {
        match runs.last_mut() {
            Some(run) if run.first + run.count == piece => run.count += 1,
            _ => runs.push(Run {
                first: piece,
                stride: 1,
                count: 1,
            }),
        }
    }
    runs
}

/// Where the mask repeats itself, as that of rows of equal documents does: one run for each wanted piece of
/// the shortest period. Else none.
fn periods(wanted: u32, count: usize) -> Vec<Run> {
    let repeats = |&period: &usize| {
        let alike = |piece| holds(wanted, piece) == holds(wanted, piece - period);
        count.is_multiple_of(period) && (period..count).all(alike)
    };
    let Some(period) = (2..=count / 2).find(repeats) else {
        return vec![];
    };
    let first = (0..period).filter(|&piece| holds(wanted, piece));
    first
        .map(|first| Run {
            first,
            stride: period,
            count: count / period,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;

    const H100: usize = 132;

    /// VᵀZ of 1024 tokens at D 1024, F 3072, and Z ηGᵀ of the same.
    const UPDATE: Product = Product {
        tiles: 8 * 12,
        depth: 1024,
    };
    const TARGET: Product = Product {
        tiles: 8 * 4,
        depth: 3072,
    };

    fn run(first: usize, stride: usize, count: usize) -> Run {
        Run {
            first,
            stride,
            count,
        }
    }

    /// Documents of so many pieces, of which all but the last are wanted.
    fn documents(lengths: &[usize]) -> (u32, usize) {
        let add = |(mask, at): (u32, usize), &length: &usize| {
            let wanted = (1 << (length - 1)) - 1;
            (mask | wanted << at, at + length)
        };
        lengths.iter().fold((0, 0), add)
    }

    fn rows(count: usize, each: usize) -> (u32, usize) {
        documents(&vec![each; count])
    }

    fn chosen((wanted, count): (u32, usize), product: Product) -> Vec<Run> {
        fastest(wanted, count, product, H100)
    }

    #[test]
    fn a_document_is_one_run_without_its_last_piece() {
        for product in [UPDATE, TARGET] {
            assert_eq!(chosen(rows(1, 32), product), [run(0, 1, 31)]);
            assert_eq!(chosen(rows(1, 8), product), [run(0, 1, 7)]);
        }
        // A document that goes on behind the group.
        assert_eq!(chosen((0xff, 8), UPDATE), [run(0, 1, 8)]);
        assert_eq!(chosen((0xfe, 8), UPDATE), [run(1, 1, 7)]);
        assert_eq!(chosen((u32::MAX, 32), UPDATE), [run(0, 1, 32)]);
    }

    #[test]
    fn rows_of_equal_documents_are_runs_over_the_rows() {
        let by_rows = |documents, each| -> Vec<Run> {
            let first = 0..each - 1;
            first.map(|i| run(i, each, documents)).collect()
        };
        // 6 waves for each of three calls, where all pieces take 24.
        assert_eq!(chosen(rows(8, 4), UPDATE), by_rows(8, 4));
        assert_eq!(chosen(rows(8, 4), TARGET), by_rows(8, 4));
        // Four calls of 7 pieces end in waves that are hardly filled: 24; seven of 4 take 21.
        assert_eq!(chosen(rows(4, 8), UPDATE), by_rows(4, 8));
        // Two calls of 15 pieces take 22 waves, fifteen of 2 take 30.
        assert_eq!(chosen(rows(2, 16), UPDATE), [run(0, 1, 15), run(16, 1, 15)]);
    }

    #[test]
    fn what_would_take_longer_is_not_left_out() {
        // Nine calls take 23 waves, one takes 24.
        let (wanted, count) = documents(&[4, 3, 4, 3, 4, 3, 4, 3, 4]);
        assert_eq!(chosen((wanted, count), UPDATE), [run(0, 1, 32)]);
        // Two take 21 and 2.
        let unequal = documents(&[29, 3]);
        assert_eq!(chosen(unequal, UPDATE), [run(0, 1, 28), run(29, 1, 2)]);
        // Tiles one after the other: every piece that is left out pays.
        let single = fastest(wanted, count, UPDATE, 1);
        assert_eq!((covered(&single), single.len()), (wanted, 9));
        // One wave for all.
        let small = Product {
            tiles: 1,
            depth: 256,
        };
        assert_eq!(chosen(rows(8, 4), small), [run(0, 1, 32)]);
    }

    #[test]
    fn every_wanted_piece_is_in_one_run() {
        for count in [1, 2, 3, 6, 12, 31, 32] {
            let most = u32::MAX >> (32 - count);
            for seed in 0..200u32 {
                let wanted = seed.wrapping_mul(0x9e37_79b9).rotate_left(seed) & most;
                for processors in [1, H100, 1 << 20] {
                    let runs = fastest(wanted, count, UPDATE, processors);
                    let pieces: usize = runs.iter().map(|run| run.count).sum();
                    let mask = covered(&runs);
                    assert_eq!(mask & wanted, wanted);
                    assert_eq!(pieces, mask.count_ones() as usize, "{runs:?}");
                    assert_eq!(mask & !most, 0, "{runs:?}");
                    assert!(mask == wanted || runs == [run(0, 1, count)], "{runs:?}");
                }
            }
        }
        assert!(chosen((0, 32), UPDATE).is_empty());
    }

    #[test]
    fn a_run_is_a_batch_of_matrices() {
        let pieces = Matrix::new(1 << 20, 16, 8, DType::BF16).batched(12, 16 * 8);
        let taken = run(1, 4, 3).of(pieces);
        assert_eq!(taken.at, (1 << 20) + 16 * 8 * 2);
        assert_eq!(taken.batch, (3, 4 * 16 * 8));
        assert_eq!((taken.rows, taken.columns), (16, 8));
    }
}
