//! Folders that appear whole or not at all: write aside, flush to disk, rename.

use std::fs::{File, Metadata, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::WeightsError;

/// Ends the names of folders being written (they begin with a dot). One that nobody has locked was
/// left by a killed process; it means nothing and the next [`atomic_folder`] beside it removes it.
pub const PARTIAL_SUFFIX: &str = ".ttt-partial";

/// Makes the folder `path`: `fill` writes into another one beside it, whose files and folders are
/// then flushed to disk, and which takes its final name last. If `fill` fails, nothing remains.
///
/// # Errors
/// Those of `fill`; if `path` exists, somebody else is writing it, or the disk refuses.
pub fn atomic_folder<T, E: From<WeightsError>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let staging = Staging::begin(path)?;
    let value = fill(staging.path())?;
    staging.commit()?;
    Ok(value)
}

/// A folder that has not got its final name yet; removed unless committed.
///
/// [`atomic_folder`] in steps, for where several processes write into it: one begins and commits,
/// the others find it at [`Staging::path_of`].
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    target: PathBuf,
    /// Held while this process writes: a lock ends with its process, so a leftover has none.
    _lock: File,
}

impl Staging {
    /// Where the folder `path` is while it is being written.
    ///
    /// # Errors
    /// If `path` is no name of a folder.
    pub fn path_of(path: &Path) -> Result<PathBuf, WeightsError> {
        let Some(name) = path.file_name() else {
            let source = ErrorKind::InvalidInput.into();
            return Err(WeightsError::io(path, "make a folder of this name")(source));
        };
        let name = format!(".{}{PARTIAL_SUFFIX}", name.to_string_lossy());
        Ok(parent(path).join(name))
    }

    /// Makes the folder that becomes `path`, and removes what killed processes left beside it.
    ///
    /// # Errors
    /// If `path` exists, somebody else is writing it, or the disk refuses.
    pub fn begin(path: &Path) -> Result<Self, WeightsError> {
        if path.symlink_metadata().is_ok() {
            let path = path.to_path_buf();
            return Err(WeightsError::Exists { path });
        }
        let partial = Self::path_of(path)?;
        let parent = parent(path);
        std::fs::create_dir_all(parent).map_err(WeightsError::io(parent, "make the folder"))?;
        remove_leftovers(parent)?;
        loop {
            match std::fs::create_dir(&partial) {
                // Leftovers are gone, so this one is being written.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    let path = path.to_path_buf();
                    return Err(WeightsError::Busy { path });
                }
                made => made.map_err(WeightsError::io(&partial, "make the folder"))?,
            }
            // Between these two lines it has no lock, and somebody who removes leftovers may take
            // it for one: then it is gone once the lock is ours.
            if let Some(lock) = lock_if_there(&partial)? {
                return Ok(Self {
                    path: partial,
                    target: path.to_path_buf(),
                    _lock: lock,
                });
            }
        }
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes all that is in the folder and gives it its name.
    ///
    /// # Errors
    /// If the name has been taken meanwhile or the disk refuses; then nothing remains.
    pub fn commit(self) -> Result<(), WeightsError> {
        sync_tree(&self.path)?;
        let path = &self.target;
        if path.symlink_metadata().is_ok() {
            let path = path.to_path_buf();
            return Err(WeightsError::Exists { path });
        }
        std::fs::rename(&self.path, path).map_err(WeightsError::io(path, "rename into place"))?;
        sync(parent(path))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a commit there is nothing of this name. A failure here leaves a leftover, which
        // the next writer removes.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Locks a folder; `None` if it was removed meanwhile.
fn lock_if_there(path: &Path) -> Result<Option<File>, WeightsError> {
    let gone_is_none = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => Ok(None),
        _ => Err(WeightsError::io(path, "lock the folder")(error)),
    };
    let folder = match File::open(path) {
        Ok(folder) => folder,
        Err(error) => return gone_is_none(error),
    };
    folder
        .lock()
        .map_err(WeightsError::io(path, "lock the folder"))?;
    let (locked, there) = (folder.metadata(), path.metadata());
    match (locked, there) {
        (Ok(locked), Ok(there)) => Ok(same_file(&locked, &there).then_some(folder)),
        (Err(error), _) | (_, Err(error)) => gone_is_none(error),
    }
}

#[cfg(unix)]
fn same_file(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(_: &Metadata, _: &Metadata) -> bool {
    true // open folders cannot be removed there
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn remove_leftovers(parent: &Path) -> Result<(), WeightsError> {
    let io = |action| WeightsError::io(parent, action);
    for entry in std::fs::read_dir(parent).map_err(io("list the folder"))? {
        let entry = entry.map_err(io("list the folder"))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !(name.starts_with('.') && name.ends_with(PARTIAL_SUFFIX)) {
            continue;
        }
        let path = entry.path();
        let Ok(folder) = File::open(&path) else {
            continue; // its writer has just renamed it
        };
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => {
                return Err(WeightsError::io(&path, "lock the folder")(source));
            }
            Ok(()) => {
                let removed = std::fs::remove_dir_all(&path);
                removed.map_err(WeightsError::io(&path, "remove what a killed process left"))?;
            }
        }
    }
    Ok(())
}

/// Flushes every file and folder below `dir`, and `dir`.
fn sync_tree(dir: &Path) -> Result<(), WeightsError> {
    let io = |action| WeightsError::io(dir, action);
    for entry in std::fs::read_dir(dir).map_err(io("list the folder"))? {
        let path = entry.map_err(io("list the folder"))?.path();
        match path.is_dir() {
            true => sync_tree(&path)?,
            false => sync(&path)?,
        }
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<(), WeightsError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(WeightsError::io(path, "flush to disk"))
}
