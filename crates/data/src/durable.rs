//! Files that appear whole or not at all: write aside, flush to disk, rename, flush the folder.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::DataError;

/// Suffix of files being written; left behind only by a killed process, removed by the next build.
pub(crate) const PARTIAL_SUFFIX: &str = ".partial";

/// Writes `path` through a sibling file and a rename. `fill` writes the content.
pub(crate) fn write_atomically<T>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<T>,
) -> Result<T, DataError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(PARTIAL_SUFFIX);
    let partial = PathBuf::from(partial);
    let file = File::create(&partial).map_err(DataError::io(&partial, "create the file"))?;
    let mut writer = std::io::BufWriter::with_capacity(1 << 20, file);
    let value = fill(&mut writer).map_err(DataError::io(&partial, "write"))?;
    let file = writer
        .into_inner()
        .map_err(|error| DataError::io(&partial, "write")(error.into_error()))?;
    file.sync_all()
        .map_err(DataError::io(&partial, "flush to disk"))?;
    std::fs::rename(&partial, path).map_err(DataError::io(path, "rename into place"))?;
    sync_parent(path)?;
    Ok(value)
}

/// Makes a rename or creation in `path`'s folder survive a power cut.
pub(crate) fn sync_parent(path: &Path) -> Result<(), DataError> {
    #[cfg(unix)]
    if let Some(parent) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        File::open(parent)
            .and_then(|folder| folder.sync_all())
            .map_err(DataError::io(parent, "flush the folder to disk"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_names_the_file_and_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_atomically(&path, |writer| writer.write_all(b"old")).unwrap();
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = write_atomically(&path, |writer| {
            writer.write_all(b"half of the new")?;
            Err::<(), _>(full())
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.contains(&*path.to_string_lossy()) && error.contains(&full().to_string()),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_an_error() {
        // Every write to /dev/full fails as on a full disk.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::os::unix::fs::symlink("/dev/full", dir.path().join("file.partial")).unwrap();
        let error = write_atomically(&path, |writer| writer.write_all(&[0; 4 << 20])).unwrap_err();
        assert!(
            matches!(&error, DataError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull),
            "{error}"
        );
    }
}
