//! Products of pieces that are made before the scan comes to them.
//!
//! A rank that hands on the sum of its updates needs all of them before it needs any, and one that waits for
//! such a sum has nothing better to do meanwhile than its own. So their groups have places of their own, as
//! far as memory is spent on it, and each product is made once.

use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::DType;

use super::{Group, Sizes};
use crate::cuda::stream::{Arg, Buffer, Context};
use crate::packing::Write;

/// Most bytes of all places. `ttt plan` knows the number too.
const MOST: usize = 2 << 30;

static SPENT: AtomicUsize = AtomicUsize::new(MOST);

/// From now on at most so many bytes are spent on places; all that are worth it, if that is `None`. For
/// `doctor`.
pub fn spend_ahead(bytes: Option<usize>) {
    SPENT.store(bytes.unwrap_or(MOST), Ordering::Relaxed);
}

/// The places of a pass.
#[derive(Debug)]
pub struct Ahead {
    /// `[pieces, D, F]` bf16, if any group has a place.
    buffer: Option<Buffer>,
    /// For each row, those of its groups.
    places: Vec<Vec<Option<Place>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Pieces before it.
    at: usize,
    filled: bool,
}

impl Ahead {
    /// Places for the groups of `rows` that exchanges have to do with, as many as memory is spent on, the first of
    /// each row first; `back`: the last of each row first, as the backward pass comes to them.
    pub fn new(like: &Buffer, s: &Sizes, rows: &[&[Group]], back: bool) -> Self {
        let most = SPENT.load(Ordering::Relaxed) / (2 * s.elements());
        let (places, pieces) = places(rows, most, back);
        Self {
            buffer: (pieces > 0).then(|| like.empty([pieces, s.d, s.f], DType::BF16)),
            places,
        }
    }

    /// What the places lie in, for a call that uses them.
    pub fn buffer(&self) -> Option<&Buffer> {
        self.buffer.as_ref()
    }

    /// Where the products of a group are, or are to be: in its own place of the buffer, whose address is
    /// `buffer`, or else in `slab`.
    pub fn address(&self, s: &Sizes, (row, group): (usize, usize), buffer: u64, slab: u64) -> u64 {
        match self.places[row][group] {
            Some(place) => buffer + (2 * place.at * s.elements()) as u64,
            None => slab,
        }
    }

    /// Whether the products of a group are there.
    pub fn is_filled(&self, row: usize, group: usize) -> bool {
        self.places[row][group].is_some_and(|place| place.filled)
    }

    /// Whether they are not but have a place.
    pub fn waits(&self, row: usize, group: usize) -> bool {
        self.places[row][group].is_some_and(|place| !place.filled)
    }

    /// They are there, where they have a place.
    pub fn fill(&mut self, row: usize, group: usize) {
        if let Some(place) = &mut self.places[row][group] {
            place.filled = true;
        }
    }
}

/// The places of the groups of each row, and the pieces of all.
fn places(rows: &[&[Group]], most: usize, back: bool) -> (Vec<Vec<Option<Place>>>, usize) {
    let mut pieces = 0;
    let of_row = |groups: &&[Group]| {
        // The document that goes on behind the row, if one does.
        let last = groups.last().map(Group::last);
        let leaving = last.filter(|piece| piece.write != Write::Nothing);
        let leaving = leaving.map(|piece| piece.document_start);
        let mut place = |group: &Group| {
            let count = group.pieces.len();
            let document = group.last();
            let crosses = document.carried || leaving == Some(document.document_start);
            (crosses && pieces + count <= most).then(|| {
                pieces += count;
                Place {
                    at: pieces - count,
                    filled: false,
                }
            })
        };
        if back {
            let mut row: Vec<_> = groups.iter().rev().map(&mut place).collect();
            row.reverse();
            return row;
        }
        groups.iter().map(&mut place).collect()
    };
    let places = rows.iter().map(of_row).collect();
    (places, pieces)
}

/// Σ over the pieces of a group whose products lie at `slab`, onto `state`: those of `adds` are added, those
/// of `replaces` begin anew.
pub fn gather(
    cx: &mut Context,
    s: &Sizes,
    group: &Group,
    (slab, state): (u64, u64),
    (adds, replaces): (u32, u32),
) -> Result<(), String> {
    let args = [
        Arg::Ptr(slab),
        Arg::Ptr(state),
        Arg::Int(group.pieces.len() as i32),
        Arg::Bits(adds),
        Arg::Bits(replaces),
        Arg::Size(s.elements() as u64),
    ];
    cx.doing(s.moves((adds | replaces).count_ones(), 2))
        .launch("scan_state", s.grid(), 256, &args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::ttt::groups;
    use crate::packing::{Packing, Piece};

    /// First pieces of the places of a row's groups.
    fn at(pieces: &[Piece], most: usize, back: bool) -> Vec<Option<usize>> {
        let all = groups(pieces, 4);
        let (places, _) = places(&[&all], most, back);
        places[0].iter().map(|p| p.map(|p| p.at)).collect()
    }

    #[test]
    fn what_crosses_an_edge_between_ranks_has_places_while_there_is_room() {
        // A document of 48 tokens that ends in one of 16 (of its own rank alone), and one of 64 behind it.
        let rows = Packing::new(128, vec![vec![0, 48, 64]]).expect("ascending");
        let first = rows.part(0..96).pieces(0, 8);
        // Six pieces in groups of four and two, one of two, four that go on.
        assert_eq!(at(&first, 32, false), [None, None, None, Some(0)]);
        assert_eq!(at(&first, 3, false), [None; 4]);
        let second = rows.part(96..128).pieces(0, 8);
        assert_eq!(at(&second, 32, false), [Some(0)]);
    }

    #[test]
    fn the_backward_pass_begins_at_the_end_of_a_row() {
        let rows = Packing::whole_rows(1, 192);
        let first = rows.part(0..96).pieces(0, 8);
        assert_eq!(at(&first, 8, false), [Some(0), Some(4), None]);
        assert_eq!(at(&first, 8, true), [None, Some(4), Some(0)]);
        assert_eq!(at(&first, 12, true), [Some(8), Some(4), Some(0)]);
        // Of a whole row nothing goes to other ranks.
        let whole = rows.pieces(0, 8);
        assert!(at(&whole, 32, false).iter().all(Option::is_none));
    }
}
