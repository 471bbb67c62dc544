//! From the inputs as written in the configuration to an ordered list of files.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use super::{DocumentUnit, SourceSpec, hub};
use crate::DataError;
use crate::manifest::{HubRevision, Skipped};

/// How a file's bytes become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Text,
    JsonLines,
    Parquet,
}

/// What lies around a file's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// One file to read.
#[derive(Clone, Debug)]
pub(crate) struct InputFile {
    pub path: PathBuf,
    /// Its path relative to the input that named it: stays the same when the data moves.
    pub label: String,
    pub format: Format,
    pub compression: Compression,
    pub bytes: u64,
}

/// A source's inputs, found and put in reading order.
#[derive(Clone, Debug)]
pub(crate) struct Discovered {
    pub spec: SourceSpec,
    /// Files that are read together: one, or all of a directory that makes one document.
    pub units: Vec<Vec<InputFile>>,
    pub hub: Vec<HubRevision>,
    /// Counts of what folders held beside the files listed.
    pub skipped: Skipped,
}

impl Discovered {
    pub fn bytes(&self) -> u64 {
        self.units.iter().flatten().map(|file| file.bytes).sum()
    }
}

/// Extensions that a folder is searched for, lower-case: prose, mark-up and program sources.
const TEXT_EXTENSIONS: &str = " txt text md markdown rst org adoc tex typ html htm css scss \
    rs py pyi ipy c h cc cpp cxx hh hpp hxx inl cu cuh cl m mm java kt kts scala groovy clj cljs go js jsx mjs cjs ts tsx \
    vue svelte rb php pl pm lua r jl swift cs fs fsx vb hs lhs ml mli elm erl ex exs dart zig nim d ada adb ads f f90 f95 \
    for pas asm s v vh sv vhd vhdl sql sh bash zsh fish ps1 bat tcl el lisp scm rkt proto thrift graphql cmake mk ninja \
    gradle yaml yml toml ini cfg conf ";

/// Files without extension that a folder is searched for.
const TEXT_NAMES: [&str; 7] = [
    "Makefile",
    "Dockerfile",
    "README",
    "CHANGES",
    "NEWS",
    "AUTHORS",
    "INSTALL",
];

/// Finds the files of `spec`.
pub(crate) fn discover(spec: &SourceSpec, offline: bool) -> Result<Discovered, DataError> {
    let mut found = Finder {
        spec,
        files: Vec::new(),
        skipped: Skipped::default(),
    };
    let mut hub_revisions = Vec::new();
    if spec.inputs.is_empty() {
        return Err(DataError::setting(
            format!("sources.{}.inputs", spec.name),
            "the list is empty",
        ));
    }
    for input in &spec.inputs {
        let before = found.files.len();
        if let Some(name) = input.strip_prefix(hub::PREFIX) {
            let snapshot = hub::fetch_dataset(name, offline)?;
            hub_revisions.push(HubRevision {
                input: input.clone(),
                commit: snapshot.commit,
            });
            for (path, label) in snapshot.files {
                found.named_file(path, label)?;
            }
        } else {
            found.local(input)?;
        }
        if found.files.len() == before {
            return Err(DataError::NoInput {
                name: spec.name.clone(),
                input: input.clone(),
            });
        }
    }
    let mut seen = HashSet::new();
    if let Some(twice) = found
        .files
        .iter()
        .find(|file| !seen.insert(file.path.clone()))
    {
        return Err(DataError::setting(
            format!("sources.{}.inputs", spec.name),
            format!(
                "{} is matched by two inputs; its text would count twice",
                twice.path.display()
            ),
        ));
    }
    let Finder { files, skipped, .. } = found;
    let units = match spec.document {
        Some(DocumentUnit::Directory) => {
            let mut directories: BTreeMap<PathBuf, Vec<InputFile>> = BTreeMap::new();
            for file in files {
                let parent = file.path.parent().unwrap_or(Path::new("")).to_path_buf();
                directories.entry(parent).or_default().push(file);
            }
            directories.into_values().collect()
        }
        _ => files.into_iter().map(|file| vec![file]).collect(),
    };
    Ok(Discovered {
        spec: spec.clone(),
        units,
        hub: hub_revisions,
        skipped,
    })
}

struct Finder<'s> {
    spec: &'s SourceSpec,
    files: Vec<InputFile>,
    skipped: Skipped,
}

impl Finder<'_> {
    fn local(&mut self, input: &str) -> Result<(), DataError> {
        let path = Path::new(input);
        if path.is_dir() {
            return self.folder(path, path);
        }
        if path.is_file() {
            return self.named_file(path.to_path_buf(), file_name(path));
        }
        if !input.contains(['*', '?', '[']) {
            return Ok(()); // the caller reports that nothing was found
        }
        let bad = |reason: String| DataError::BadPattern {
            name: self.spec.name.clone(),
            input: input.to_string(),
            reason,
        };
        // Pattern matches come sorted by path.
        for entry in glob::glob(input).map_err(|error| bad(error.to_string()))? {
            let path = entry.map_err(|error| {
                let path = error.path().to_path_buf();
                DataError::io(&path, "list")(error.into())
            })?;
            if path.is_dir() {
                self.folder(&path, &path)?;
            } else {
                let label = path.to_string_lossy().into_owned();
                self.named_file(path, label)?;
            }
        }
        Ok(())
    }

    /// All text and record files below `folder`, sorted, without hidden entries.
    fn folder(&mut self, root: &Path, folder: &Path) -> Result<(), DataError> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(DataError::io(folder, "list the folder"))? {
            entries.push(
                entry
                    .map_err(DataError::io(folder, "list the folder"))?
                    .path(),
            );
        }
        entries.sort();
        for path in entries {
            let hidden = file_name(&path).starts_with('.');
            if hidden || (path.is_symlink() && path.is_dir()) {
                // Links to folders may lead in circles.
                self.skipped.hidden += 1;
            } else if path.is_dir() {
                self.folder(root, &path)?;
            } else if let Some((format, compression)) = listed_format(&path)
                && self.fits_unit(format)
            {
                let label = path
                    .strip_prefix(root)
                    .unwrap_or(&path)
                    .to_string_lossy()
                    .into_owned();
                self.push(path, label, format, compression)?;
            } else {
                self.skipped.other_files += 1;
            }
        }
        Ok(())
    }

    /// A file that the user named: an unknown extension is read as text.
    fn named_file(&mut self, path: PathBuf, label: String) -> Result<(), DataError> {
        let (format, compression) =
            listed_format(&path).unwrap_or((Format::Text, compression(&path).0));
        if !self.fits_unit(format) {
            return Err(DataError::setting(
                format!("sources.{}.document", self.spec.name),
                format!(
                    "{} {}",
                    path.display(),
                    if format == Format::Text {
                        "is a text file, which has no records; use \"file\" or \"directory\""
                    } else {
                        "holds records; use \"record\", or leave the setting out"
                    }
                ),
            ));
        }
        self.push(path, label, format, compression)
    }

    fn fits_unit(&self, format: Format) -> bool {
        match self.spec.document {
            None => true,
            Some(DocumentUnit::Record) => format != Format::Text,
            Some(DocumentUnit::File | DocumentUnit::Directory) => format == Format::Text,
        }
    }

    fn push(
        &mut self,
        path: PathBuf,
        label: String,
        format: Format,
        compression: Compression,
    ) -> Result<(), DataError> {
        let bytes = std::fs::metadata(&path)
            .map_err(DataError::io(&path, "read the size"))?
            .len();
        self.files.push(InputFile {
            path,
            label,
            format,
            compression,
            bytes,
        });
        Ok(())
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

/// The compression by the last extension, and the name without it.
fn compression(path: &Path) -> (Compression, String) {
    let name = file_name(path);
    let lower = name.to_lowercase();
    for (extension, compression) in [(".gz", Compression::Gzip), (".zst", Compression::Zstd)] {
        if lower.ends_with(extension) {
            return (
                compression,
                name[..name.len() - extension.len()].to_string(),
            );
        }
    }
    (Compression::None, name)
}

/// Format and compression of a file by its name; `None` for names that are not on the list.
pub(super) fn listed_format(path: &Path) -> Option<(Format, Compression)> {
    let (compression, name) = compression(path);
    let format = match Path::new(&name)
        .extension()
        .map(|e| e.to_string_lossy().to_lowercase())
        .as_deref()
    {
        Some("jsonl" | "ndjson") => Format::JsonLines,
        Some("parquet") => Format::Parquet,
        Some(extension)
            if TEXT_EXTENSIONS
                .split_whitespace()
                .any(|listed| listed == extension) =>
        {
            Format::Text
        }
        None if TEXT_NAMES.contains(&name.as_str()) => Format::Text,
        _ => return None,
    };
    Some((format, compression))
}
