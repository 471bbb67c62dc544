//! Where documents begin in the rows of a batch, and how chunks and documents cut a row.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

/// The documents packed into the rows of one batch.
///
/// Known on the host, so that the TTT layer can lay out its work without asking the device. The rows may
/// be a part of longer ones ([`Packing::part`]), where each rank of a context group holds one; positions
/// are then those in the part, and chunks lie on the grid of the whole row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    length: usize,
    /// For each row, where documents begin: ascending, the first 0.
    rows: Vec<Vec<usize>>,
    /// The rows that these are a part of, and where the part begins.
    whole: Option<(Arc<Packing>, usize)>,
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
        Ok(Self {
            length,
            rows,
            whole: None,
        })
    }

    /// One document in each of `rows` rows of `length` tokens.
    pub fn whole_rows(rows: usize, length: usize) -> Self {
        Self {
            length,
            rows: vec![vec![0]; rows],
            whole: None,
        }
    }

    /// The tokens `range` of every row, of the whole rows if these are a part themselves. A document that
    /// began before the part begins at its first token, and the part knows so.
    ///
    /// # Panics
    /// If `range` is empty or reaches past the rows.
    pub fn part(&self, range: Range<usize>) -> Self {
        let whole = match &self.whole {
            Some((whole, _)) => whole.clone(),
            None => Arc::new(self.clone()),
        };
        assert!(
            range.start < range.end && range.end <= whole.length,
            "a part {range:?} of rows of {} tokens",
            whole.length
        );
        let cut = |starts: &Vec<usize>| {
            let inside = starts.iter().filter(|start| range.contains(*start));
            let inside = inside.map(|start| start - range.start);
            let first = [0].into_iter();
            let mut cut: Vec<usize> = first.chain(inside).collect();
            cut.dedup();
            cut
        };
        Self {
            length: range.len(),
            rows: whole.rows.iter().map(cut).collect(),
            whole: Some((whole, range.start)),
        }
    }

    /// The rows that these are a part of; these, if they are whole.
    pub fn whole(&self) -> &Packing {
        self.whole.as_ref().map_or(self, |(whole, _)| whole)
    }

    /// Positions of the tokens in the whole rows.
    pub fn positions(&self) -> Range<usize> {
        let begin = self.whole.as_ref().map_or(0, |(_, begin)| *begin);
        begin..begin + self.length
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

    /// The positions, in the whole rows, of the document of row `row` that covers position `at` of the
    /// whole row.
    pub fn document_around(&self, row: usize, at: usize) -> Range<usize> {
        let whole = self.whole();
        let starts = &whole.rows[row];
        let next = starts.partition_point(|&start| start <= at);
        starts[next - 1]..starts.get(next).copied().unwrap_or(whole.length)
    }

    /// The pieces of row `row` on the chunk grid of the whole row: chunk(p) = ⌊p / `chunk`⌋, cut again
    /// where documents begin (docs/in-place-ttt.md, section 4). A part has the pieces that the whole row
    /// has there: its first may read what was written before it, its last may write for those behind it.
    ///
    /// # Panics
    /// If `chunk` is 0, or the ends of a part are not those of chunks.
    pub fn pieces(&self, row: usize, chunk: usize) -> Vec<Piece> {
        let here = self.positions();
        let whole = self.whole().length;
        let on_grid = |at: usize| at.is_multiple_of(chunk) || at == whole;
        assert!(
            on_grid(here.start) && on_grid(here.end),
            "a part {here:?} that cuts chunks of {chunk} tokens"
        );
        let mut pieces: Vec<Piece> = Vec::new();
        let mut begin = here.start;
        while begin < here.end {
            let chunk_begin = begin - begin % chunk;
            let chunk_end = (chunk_begin + chunk).min(whole);
            let document = self.document_around(row, begin);
            let end = chunk_end.min(document.end);
            // Only a later chunk of the same document can read what this piece writes.
            let read_later = end < document.end;
            let reads = document.start < chunk_begin;
            pieces.push(Piece {
                range: begin - here.start..end - here.start,
                document_start: document.start.saturating_sub(here.start),
                carried: document.start < here.start,
                reads,
                write: match (read_later, reads) {
                    (false, _) => Write::Nothing,
                    (true, true) => Write::Add,
                    (true, false) => Write::Replace,
                },
            });
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
    /// Where the piece's document begins in the row; 0 also if it began before the part at hand.
    pub document_start: usize,
    /// Whether the document began before the part at hand.
    pub carried: bool,
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

    proptest! {
        /// Parts have the pieces of the whole row, moved, and know what was cut off.
        #[test]
        fn parts_have_the_pieces_of_the_whole((length, chunk, starts) in layout(), chunks in 1usize..4) {
            let whole = Packing::new(length, vec![starts]).unwrap();
            let of_whole = whole.pieces(0, chunk);
            let mut of_parts = vec![];
            for begin in (0..length).step_by(chunks * chunk) {
                let range = begin..length.min(begin + chunks * chunk);
                // A part of a part is counted from the whole row.
                let part = whole.part(0..length).part(range.clone());
                prop_assert_eq!(part.positions(), range.clone());
                let documents = whole.document_start(0);
                for (i, &start) in part.document_start(0).iter().enumerate() {
                    let of_whole = documents[begin + i] as usize;
                    prop_assert_eq!(start as usize, of_whole.saturating_sub(begin));
                }
                for mut piece in part.pieces(0, chunk) {
                    let of_whole = documents[begin + piece.range.start] as usize;
                    prop_assert_eq!(piece.carried, of_whole < begin);
                    prop_assert_eq!(piece.document_start, of_whole.saturating_sub(begin));
                    piece.range = piece.range.start + begin..piece.range.end + begin;
                    (piece.document_start, piece.carried) = (of_whole, false);
                    of_parts.push(piece);
                }
            }
            prop_assert_eq!(of_parts, of_whole);
        }
    }

    #[test]
    fn impossible_layouts_are_refused() {
        for starts in [vec![], vec![1], vec![0, 3, 3], vec![0, 5, 2], vec![0, 8]] {
            assert!(Packing::new(8, vec![starts]).is_err());
        }
    }
}
