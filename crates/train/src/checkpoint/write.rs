//! Writing a checkpoint, all ranks at once.
//!
//! A rank's shard of a unit is a range of its parameters laid end to end, or two (`flat.rs`), and so
//! are the files: each is one range of bytes. Ranks that hold the same shard (replicas, and the ranks
//! of one context group) divide it among them.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use ttt_parallel::Mesh;
use ttt_weights::{Dtype, Plan, SharedWriter, Staging, TensorSpec, WrittenPiece};

use super::manifest::{FileEntry, seal, write_file};
use super::{FILE_BYTES, FIRST, Progress, SECOND};
use crate::agree::{all_or_none, together};
use crate::device::read_f32;
use crate::error::TrainError;
use crate::units::UnitState;

/// Elements that are on the host at a time.
const AT_ONCE: usize = 1 << 22;

/// Replicas divide a range at multiples of this, a page of f32, as far as it goes: two machines
/// that write into one page of a file are slow on every shared file system.
const GRAIN: usize = 1 << 10;

/// Writes the checkpoint `path` with `small` files beside the tensors. Rank 0 makes the folder, and
/// runs `then` when it is in place.
pub(super) fn write(
    path: &Path,
    units: &[UnitState],
    progress: &Progress,
    small: &[(String, Vec<u8>)],
    mesh: &Mesh,
    then: impl FnOnce() -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let plans = Plans::new(path, units)?;
    let device = &units[0].moments.first.device();
    let first = mesh.world.rank() == 0;

    // Files of full length, with headers, which the others can open.
    let begun = match first {
        true => Begun::new(path, &plans, small).map(Some),
        false => Ok(None),
    };
    let begun = all_or_none(mesh, device, begun)?;

    // Every rank's share of the data.
    let dir = Staging::path_of(path)?;
    let own = match dir.is_dir() {
        true => plans.write_share(&dir, units, mesh),
        false => Err(TrainError::checkpoint(
            path,
            "the folder that rank 0 has begun is not to be seen here: run.dir must be on a file \
             system that all ranks share",
        )),
    };
    let shares = together(mesh, device, own)?;

    // All is written and flushed: the manifest, and the folder's name.
    let done = match begun {
        Some(begun) => begun.finish(&plans, shares, progress).and_then(|()| then()),
        None => Ok(()),
    };
    all_or_none(mesh, device, done)
}

/// What rank 0 holds while all write.
struct Begun {
    staging: Staging,
    small: Vec<FileEntry>,
    headers: Vec<WrittenPiece>,
}

impl Begun {
    fn new(path: &Path, plans: &Plans, small: &[(String, Vec<u8>)]) -> Result<Self, TrainError> {
        let staging = Staging::begin(path)?;
        let dir = staging.path();
        let small = small
            .iter()
            .map(|(name, bytes)| write_file(dir, name, bytes));
        let small = small.collect::<Result<_, _>>()?;
        let mut headers = plans.model.make_files(dir)?;
        headers.extend(plans.optimizer.make_files(dir)?);
        Ok(Self {
            staging,
            small,
            headers,
        })
    }

    fn finish(
        self,
        plans: &Plans,
        shares: Vec<Vec<Written>>,
        progress: &Progress,
    ) -> Result<(), TrainError> {
        let shares = shares.into_iter().flatten().map(WrittenPiece::from);
        let pieces = self.headers.into_iter().chain(shares).collect();
        let mut files = FileEntry::from_pieces(self.staging.path(), pieces)?;
        let whole = |(name, bytes)| files.iter().any(|file| file.extent() == (name, bytes));
        if let Some((name, _)) = plans.files().find(|file| !whole(*file)) {
            return Err(TrainError::checkpoint(
                self.staging.path(),
                format!(
                    "no rank wrote the end of {name}: do all of them run the same configuration?"
                ),
            ));
        }
        files.extend(self.small);
        seal(self.staging.path(), progress, files)?;
        Ok(self.staging.commit()?)
    }
}

/// A [`WrittenPiece`] as a message.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    file: String,
    begin: u64,
    end: u64,
    blake3: String,
}

impl From<WrittenPiece> for Written {
    fn from(piece: WrittenPiece) -> Self {
        Self {
            file: piece.file,
            begin: piece.range.start,
            end: piece.range.end,
            blake3: piece.blake3,
        }
    }
}

impl From<Written> for WrittenPiece {
    fn from(piece: Written) -> Self {
        Self {
            file: piece.file,
            range: piece.begin..piece.end,
            blake3: piece.blake3,
        }
    }
}

/// What files there will be, the same on every rank.
struct Plans {
    model: Plan,
    optimizer: Plan,
}

impl Plans {
    fn new(path: &Path, units: &[UnitState]) -> Result<Self, TrainError> {
        let specs = |unit: &UnitState, kind: &str| {
            let specs = unit.layout.specs.iter().map(|spec| TensorSpec {
                name: format!("{}{kind}", spec.name),
                shape: spec.shape.clone(),
                dtype: Dtype::F32,
            });
            specs.collect::<Vec<_>>()
        };
        let model = units.iter().flat_map(|unit| specs(unit, "")).collect();
        let moments = units
            .iter()
            .flat_map(|unit| [specs(unit, FIRST), specs(unit, SECOND)].concat())
            .collect();
        let plan = |stem, specs| Plan::new(path, stem, specs, FILE_BYTES, HashMap::new());
        Ok(Self {
            model: plan("model", model)?,
            optimizer: plan("optimizer", moments)?,
        })
    }

    fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.model.files().chain(self.optimizer.files())
    }

    /// Writes this rank's share into the files in `dir`.
    fn write_share(
        &self,
        dir: &Path,
        units: &[UnitState],
        mesh: &Mesh,
    ) -> Result<Vec<Written>, TrainError> {
        let mut model = SharedWriter::new(dir, &self.model);
        let mut optimizer = SharedWriter::new(dir, &self.optimizer);
        for unit in units {
            let master = |range| unit.master.read(range).map_err(TrainError::Execution);
            write_buffer(&mut model, unit, master, "", mesh)?;
            for (moment, kind) in [(&unit.moments.first, FIRST), (&unit.moments.second, SECOND)] {
                let moment = |range| read_f32(&moment.clone().slice([range]));
                write_buffer(&mut optimizer, unit, moment, kind, mesh)?;
            }
        }
        let flushing = |file: &str| mesh.activity.at(format_args!("flushing {file}"));
        let pieces = model.finish(flushing)?.into_iter();
        let pieces = pieces.chain(optimizer.finish(flushing)?);
        Ok(pieces.map(Written::from).collect())
    }
}

/// Writes this rank's share of one of a unit's buffers, of which `read` gives any elements, and whose
/// tensors are named with `kind`.
fn write_buffer(
    writer: &mut SharedWriter<'_>,
    unit: &UnitState,
    read: impl Fn(Range<usize>) -> Result<Vec<f32>, TrainError>,
    kind: &str,
    mesh: &Mesh,
) -> Result<(), TrainError> {
    let layout = &unit.layout;
    let pieces = layout.pieces(mesh.shard.rank());
    let (replica, replicas) = (mesh.replicas.rank(), mesh.replicas.size());
    let own = share(0..layout.shard_len(), replica, replicas);
    for begin in own.clone().step_by(AT_ONCE) {
        let here = begin..own.end.min(begin + AT_ONCE);
        mesh.activity
            .at(format_args!("{:?}{kind} from {begin}", unit.unit));
        let values = read(here.clone())?;
        for piece in &pieces {
            let (from, to) = (piece.at.max(here.start), piece.end().min(here.end));
            if from < to {
                let name = format!("{}{kind}", layout.specs[piece.param].name);
                let first = piece.elements.start + from - piece.at;
                writer.write_f32(&name, first, &values[from - here.start..to - here.start])?;
            }
        }
    }
    Ok(())
}

/// The part of `range` that falls to the `index`-th of `of`.
fn share(range: Range<usize>, index: usize, of: usize) -> Range<usize> {
    let grains = range.len().div_ceil(GRAIN);
    let at = |i: usize| (range.start + grains * i / of * GRAIN).min(range.end);
    at(index)..at(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_of_a_range_and_nearly_equal() {
        for len in [0, 1, GRAIN - 1, GRAIN, 10 * GRAIN + 7] {
            for of in [1, 2, 3, 8] {
                let parts: Vec<_> = (0..of).map(|i| share(5..5 + len, i, of)).collect();
                assert_eq!((parts[0].start, parts[of - 1].end), (5, 5 + len));
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
                let largest = parts.iter().map(Range::len).max();
                assert!(largest <= Some((len.div_ceil(GRAIN)).div_ceil(of) * GRAIN));
            }
        }
    }
}
