//! `manifest.json`: what a checkpoint consists of, and the hashes by which damage is seen.
//!
//! Files are hashed in pieces, each by the rank that wrote it, so that many ranks can write and
//! verify one file. Format 1 had one hash per file, and is read as one piece.

use std::path::Path;

use serde::{Deserialize, Serialize};
use ttt_weights::{WrittenFile, WrittenPiece, hash_piece};

use super::Progress;
use crate::error::TrainError;

/// Version of the layout that is written.
const FORMAT: u32 = 2;

/// The one before.
const WHOLE_FILES: u32 = 1;

/// The file's name.
pub(super) const MANIFEST: &str = "manifest.json";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: u32,
    pub progress: Progress,
    files: Vec<FileEntry>,
}

/// A file of a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileEntry {
    name: String,
    bytes: u64,
    /// Of the whole file; in format 1 always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blake3: Option<String>,
    /// Instead of it: pieces that follow on each other from the first byte to the last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pieces: Vec<Piece>,
}

/// A part of a file that was hashed on its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Piece {
    bytes: u64,
    blake3: String,
}

impl FileEntry {
    fn whole(name: String, bytes: u64, blake3: String) -> Self {
        Self {
            name,
            bytes,
            blake3: Some(blake3),
            pieces: vec![],
        }
    }

    /// Files from the pieces that all ranks wrote of them; each file's pieces must follow on each
    /// other. `dir` is the folder that an error names.
    pub(super) fn from_pieces(
        dir: &Path,
        mut pieces: Vec<WrittenPiece>,
    ) -> Result<Vec<Self>, TrainError> {
        pieces.sort_by(|a, b| (&a.file, a.range.start).cmp(&(&b.file, b.range.start)));
        let mut files: Vec<Self> = vec![];
        for WrittenPiece {
            file: name,
            range,
            blake3,
        } in pieces
        {
            if files.last().is_none_or(|file| file.name != name) {
                files.push(Self {
                    name: name.clone(),
                    bytes: 0,
                    blake3: None,
                    pieces: vec![],
                });
            }
            let file = files.last_mut().expect("pushed above");
            if file.bytes != range.start {
                let (end, begin) = (file.bytes, range.start);
                return Err(TrainError::checkpoint(
                    dir,
                    format!(
                        "what the ranks wrote of {name} does not meet (to byte {end}, from byte {begin}): \
                         do all of them run the same program and configuration?"
                    ),
                ));
            }
            file.bytes = range.end;
            let bytes = range.end - range.start;
            file.pieces.push(Piece { bytes, blake3 });
        }
        Ok(files)
    }

    /// Name and size.
    pub(super) fn extent(&self) -> (&str, u64) {
        (&self.name, self.bytes)
    }
}

impl From<WrittenFile> for FileEntry {
    fn from(file: WrittenFile) -> Self {
        Self::whole(file.file, file.bytes, file.blake3)
    }
}

/// Writes a file into `dir`.
pub(crate) fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<FileEntry, TrainError> {
    let path = dir.join(name);
    std::fs::write(&path, bytes).map_err(TrainError::io("write", &path))?;
    let blake3 = blake3::hash(bytes).to_hex().to_string();
    Ok(FileEntry::whole(name.into(), bytes.len() as u64, blake3))
}

/// Writes the manifest, without which a folder is no checkpoint.
pub(crate) fn seal(
    dir: &Path,
    progress: &Progress,
    files: Vec<FileEntry>,
) -> Result<(), TrainError> {
    let manifest = Manifest {
        format: FORMAT,
        progress: progress.clone(),
        files,
    };
    let json = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    write_file(dir, MANIFEST, &json)?;
    Ok(())
}

/// One of so many that share the work of verifying.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub index: usize,
    pub of: usize,
}

impl Manifest {
    /// Reads the manifest of the checkpoint `path`.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let refuse = |problem: String| Err(TrainError::checkpoint(path, problem));
        let file = path.join(MANIFEST);
        if !file.is_file() {
            return refuse(
                "has no manifest.json: name a folder such as <run>/checkpoints/step-00000100"
                    .into(),
            );
        }
        let json = std::fs::read(&file).map_err(TrainError::io("read", &file))?;
        // The version first: another one may have other keys.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        match serde_json::from_slice(&json) {
            Ok(Version {
                format: WHOLE_FILES | FORMAT,
            }) => {}
            Ok(Version { format }) => {
                return refuse(format!(
                    "has format {format}, this program reads {WHOLE_FILES} and {FORMAT}"
                ));
            }
            Err(error) => return refuse(format!("{MANIFEST}: {error}")),
        }
        match serde_json::from_slice(&json) {
            Ok(manifest) => Ok(manifest),
            Err(error) => refuse(format!("{MANIFEST}: {error}")),
        }
    }

    /// Compares sizes of all files and hashes of a share of their pieces with what was written. `each`
    /// hears the file of every piece, before it is read.
    pub fn verify(&self, path: &Path, share: Share, each: impl Fn(&str)) -> Result<(), TrainError> {
        for file in &self.files {
            file.verify_size(path)?;
        }
        // Sizes of files on disk: their sum fits.
        let total: u64 = self.files.iter().map(|file| file.bytes).sum();
        let mut before = 0;
        for file in &self.files {
            let mut begin = 0;
            for piece in file.hashes(path)? {
                // To whom the piece's first byte falls when all bytes are dealt out in order.
                let owner = u128::from(before + begin) * share.of as u128;
                let owner = owner / u128::from(total.max(1));
                let end = begin + piece.bytes;
                each(&file.name);
                if owner == share.index as u128
                    && hash_piece(&path.join(&file.name), begin..end)? != piece.blake3
                {
                    return Err(TrainError::checkpoint(
                        path,
                        format!(
                            "{} does not have the content it was written with (bytes {begin} to {end}): \
                             it is damaged, use an older checkpoint",
                            file.name
                        ),
                    ));
                }
                begin = end;
            }
            before += file.bytes;
        }
        Ok(())
    }
}

impl FileEntry {
    /// The file's pieces, which must be all of it.
    fn hashes(&self, folder: &Path) -> Result<Vec<Piece>, TrainError> {
        let bytes = self.bytes;
        let sizes = self.pieces.iter().map(|piece| piece.bytes);
        let covered = sizes.fold(0, u64::saturating_add);
        match &self.blake3 {
            Some(blake3) if self.pieces.is_empty() => Ok(vec![Piece {
                bytes,
                blake3: blake3.clone(),
            }]),
            None if covered == bytes && !self.pieces.is_empty() => Ok(self.pieces.clone()),
            _ => Err(TrainError::checkpoint(
                folder,
                format!("{MANIFEST} has no hash for all of {:?}", self.name),
            )),
        }
    }

    fn verify_size(&self, folder: &Path) -> Result<(), TrainError> {
        let name = &self.name;
        if name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(TrainError::checkpoint(
                folder,
                format!("{MANIFEST} names {name:?}, which is no file of the folder"),
            ));
        }
        let path = folder.join(name);
        let length = std::fs::metadata(&path)
            .map_err(TrainError::io("read", &path))?
            .len();
        match length == self.bytes {
            true => Ok(()),
            false => Err(TrainError::checkpoint(
                folder,
                format!(
                    "{name} has {length} bytes instead of {}: it is damaged, use an older checkpoint",
                    self.bytes
                ),
            )),
        }
    }
}
