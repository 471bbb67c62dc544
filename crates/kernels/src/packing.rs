//! Where documents begin in the rows of a batch, and how chunks and documents cut a row.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};

/// The documents packed into the rows of one batch.
///
/// Known on the host, so that the TTT layer can lay out its work without asking the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    length: usize,
    /// For each row, where documents begin: ascending, the first 0.
    rows: Vec<Vec<usize>>,
}

/// A document layout that no row can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "row {row}: document starts must ascend from 0 and stay below the row's {length} tokens, got {starts:?}"
)]
pub struct PackingError {
    row: usize,
    length: usize,
    starts: Vec<usize>,
}

impl Packing {
    /// Rows of `length` tokens whose documents begin at `rows[b]`.
    ///
    /// # Errors
    /// If a row does not start with 0, does not ascend, or reaches past `length`.
    pub fn new(length: usize, rows: Vec<Vec<usize>>) -> Result<Self, PackingError> {
        for (row, starts) in rows.iter().enumerate() {
            let ascends = starts.windows(2).all(|pair| pair[0] < pair[1]);
            let inside = starts.last().is_some_and(|&last| last < length);
            if starts.first() != Some(&0) || !ascends || !inside {
                let starts = starts.clone();
                return Err(PackingError {
                    row,
                    length,
                    starts,
                });
            }
        }
        Ok(Self { length, rows })
    }

    /// One document in each of `rows` rows of `length` tokens.
    pub fn whole_rows(rows: usize, length: usize) -> Self {
        Self {
            length,
            rows: vec![vec![0]; rows],
        }
    }

    /// Tokens of a row.
    pub fn length(&self) -> usize {
        self.length
    }

    /// For each row, where documents begin.
    pub fn rows(&self) -> &[Vec<usize>] {
        &self.rows
    }

    /// Whether every row is one document.
    pub fn is_whole_rows(&self) -> bool {
        self.rows.iter().all(|starts| starts.len() == 1)
    }

    /// For each token of row `row`, the position at which its document begins.
    pub fn document_start(&self, row: usize) -> Vec<i32> {
        let mut starts = Vec::with_capacity(self.length);
        for (i, &start) in self.rows[row].iter().enumerate() {
            let end = self.rows[row].get(i + 1).copied().unwrap_or(self.length);
            starts.resize(end, start as i32);
        }
        starts
    }

    /// [`Packing::document_start`] of all rows, on a device: `[B, N]`.
    pub fn document_starts(&self, device: &Device) -> Tensor<2, Int> {
        let all: Vec<i32> = (0..self.rows.len())
            .flat_map(|row| self.document_start(row))
            .collect();
        Tensor::from_data(TensorData::new(all, [self.rows.len(), self.length]), device)
    }

    /// The pieces of row `row` on the absolute chunk grid: chunk(p) = ⌊p / `chunk`⌋, cut again where
    /// documents begin (docs/in-place-ttt.md, section 4).
    ///
    /// # Panics
    /// If `chunk` is 0.
    pub fn pieces(&self, row: usize, chunk: usize) -> Vec<Piece> {
        let starts = &self.rows[row];
        let mut pieces: Vec<Piece> = Vec::new();
        let mut document = 0; // index into starts
        let mut begin = 0;
        while begin < self.length {
            let chunk_begin = begin - begin % chunk;
            let chunk_end = (chunk_begin + chunk).min(self.length);
            let next_document = starts.get(document + 1).copied().unwrap_or(self.length);
            let end = chunk_end.min(next_document);
            let document_start = starts[document];
            // Only a later chunk of the same document can read what this piece writes.
            let read_later = end == chunk_end && end < self.length && end != next_document;
            let reads = document_start < chunk_begin;
            pieces.push(Piece {
                range: begin..end,
                document_start,
                reads,
                write: match (read_later, reads) {
                    (false, _) => Write::Nothing,
                    (true, true) => Write::Add,
                    (true, false) => Write::Replace,
                },
            });
            if end == next_document {
                document += 1;
            }
            begin = end;
        }
        pieces
    }
}

/// The tokens of one document inside one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Positions in the row.
    pub range: Range<usize>,
    /// Where the piece's document begins in the row.
    pub document_start: usize,
    /// Whether the document began in an earlier chunk, so that the running state is its own.
    pub reads: bool,
    /// What the piece does to the running state once it has been applied.
    pub write: Write,
}

/// What a piece does to the running state S.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// No later chunk reads it.
    Nothing,
    /// S += VᵀZ.
    Add,
    /// S = VᵀZ: the first piece of its document.
    Replace,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout() -> impl Strategy<Value = (usize, usize, Vec<usize>)> {
        (1usize..60, 1usize..12).prop_flat_map(|(length, chunk)| {
            proptest::collection::btree_set(0..length, 0..8).prop_map(move |mut starts| {
                starts.insert(0);
                (length, chunk, starts.into_iter().collect())
            })
        })
    }

    proptest! {
        /// A piece reads exactly what the definition says: tokens of its document in earlier chunks.
        #[test]
        fn state_covers_earlier_chunks_of_the_document((length, chunk, starts) in layout()) {
            let packing = Packing::new(length, vec![starts]).unwrap();
            let document = packing.document_start(0);
            let mut state: Vec<usize> = Vec::new();
            let mut covered = 0;
            for piece in packing.pieces(0, chunk) {
                prop_assert_eq!(piece.range.start, covered);
                covered = piece.range.end;
                for p in piece.range.clone() {
                    let visible: Vec<usize> = (0..length)
                        .filter(|&q| document[q] == document[p] && q / chunk < p / chunk)
                        .collect();
                    let read = if piece.reads { state.clone() } else { Vec::new() };
                    prop_assert_eq!(visible, read);
                }
                match piece.write {
                    Write::Nothing => {}
                    Write::Add => state.extend(piece.range),
                    Write::Replace => state = piece.range.collect(),
                }
            }
            prop_assert_eq!(covered, length);
        }
    }

    #[test]
    fn impossible_layouts_are_refused() {
        for starts in [vec![], vec![1], vec![0, 3, 3], vec![0, 5, 2], vec![0, 8]] {
            assert!(Packing::new(8, vec![starts]).is_err());
        }
    }
}
