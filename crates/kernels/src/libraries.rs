//! NVIDIA's libraries: where they are looked for, what to do about a missing one.
//!
//! They are opened by name when they are first needed, so the loader must find them. `TTT_CUDA_LIBS`
//! names folders, separated by colons, that come before all others: such as `site-packages/nvidia` of a
//! Python that has NVIDIA's wheels. The loader reads its path once, when a process starts; therefore
//! [`find`] says what to start the program with, and its `main` starts it again in its own place. (To
//! open the files ahead of need under their full names is not enough: a later look-up by name only
//! finds what has that very soname, and `libnccl.so.2` has none that is asked for.)

use std::env::{join_paths, split_paths};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

/// Names extra folders.
pub const FOLDERS: &str = "TTT_CUDA_LIBS";
/// Holds the value of [`FOLDERS`] that the program was started again with.
pub const APPLIED: &str = "TTT_CUDA_LIBS_APPLIED";
/// Where the loader looks.
pub const LOADER: &str = "LD_LIBRARY_PATH";

/// Names under which the bindings look first, and what NVIDIA's wheels have. Without a link, the one would not be
/// found, and of the other perhaps an older one of the system.
const UNVERSIONED: [(&str, &str); 2] = [
    ("libnccl.so", "libnccl.so.2"),
    ("libcudnn.so", "libcudnn.so.9"),
];

/// How to get `library`, of which nothing was found.
pub fn missing(library: &str, package: &str, wheel: &str) -> String {
    format!(
        "{library} was not found: install the system package {package} of NVIDIA's repository, or the \
         Python wheel {wheel} and name the folder of its libraries in {FOLDERS}"
    )
}

/// What the environment says about libraries.
#[derive(Clone, Copy, Debug, Default)]
pub struct Environment<'a> {
    /// The value of [`FOLDERS`].
    pub folders: Option<&'a OsStr>,
    /// The value of [`APPLIED`].
    pub applied: Option<&'a OsStr>,
    /// The value of [`LOADER`].
    pub loader: Option<&'a OsStr>,
}

/// The value of [`LOADER`] to start the program again with; `None` if it is fine as it runs. `links` is
/// a folder that may be made for links to libraries under the names that they are asked for.
///
/// # Errors
/// If a folder is not there.
pub fn find(
    environment: Environment<'_>,
    links: Option<&Path>,
) -> Result<Option<OsString>, String> {
    let Some(folders) = environment.folders.filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    if environment.applied == Some(folders) {
        return Ok(None);
    }
    let mut path: Vec<PathBuf> = vec![];
    for named in split_paths(folders).filter(|folder| !folder.as_os_str().is_empty()) {
        // Absolute, since the loader reads it from wherever the program then is.
        let folder = named.canonicalize().ok().filter(|folder| folder.is_dir());
        let folder = folder
            .ok_or_else(|| format!("{FOLDERS} names {}, which is no folder", named.display()))?;
        path.extend(library_folders(&folder));
    }
    if let Some(links) = links {
        let there = |name: &str| path.iter().map(|f| f.join(name)).find(|f| f.exists());
        let mut linked = false;
        for (plain, versioned) in UNVERSIONED {
            if let (Some(library), None) = (there(versioned), there(plain)) {
                link(links, plain, &library).map_err(|error| {
                    format!("cannot make a link in {}: {error}", links.display())
                })?;
                linked = true;
            }
        }
        path.extend(linked.then(|| links.to_path_buf()));
    }
    path.extend(environment.loader.into_iter().flat_map(split_paths));
    join_paths(path)
        .map(Some)
        .map_err(|error| format!("{FOLDERS}: {error}"))
}

/// `folder` itself and the places of libraries below it in the layouts of CUDA and of NVIDIA's wheels.
fn library_folders(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_path_buf()];
    let packages = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut below: Vec<PathBuf> = packages.map(|entry| entry.path().join("lib")).collect();
    below.sort();
    below.insert(0, folder.join("lib"));
    found.extend(below.into_iter().filter(|lib| lib.is_dir()));
    found
}

/// `folder/name` leads to `target`. Made beside and renamed, since several processes may start at once.
fn link(folder: &Path, name: &str, target: &Path) -> io::Result<()> {
    let at = folder.join(name);
    if std::fs::read_link(&at).is_ok_and(|now| now == target) {
        return Ok(());
    }
    std::fs::create_dir_all(folder)?;
    let part = folder.join(format!("{name}.{}.part", std::process::id()));
    std::os::unix::fs::symlink(target, &part)?;
    std::fs::rename(part, at)
}

/// Where compiled kernels and links are kept: `TTT_CACHE_DIR`, else the user's cache folder.
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    set("TTT_CACHE_DIR")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("ttt")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/ttt")))
}

/// The file of `library` (such as `libcudnn`) among `maps`, the text of `/proc/self/maps`.
pub fn loaded_from<'a>(library: &str, maps: &'a str) -> Option<&'a Path> {
    let files = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]));
    let mut files = files.map(Path::new);
    files.find(|file| {
        let name = file.file_name().and_then(OsStr::to_str).unwrap_or("");
        name.strip_prefix(library)
            .is_some_and(|rest| rest.starts_with(".so"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("ttt-libraries-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        folder.canonicalize().unwrap()
    }

    fn found(folders: &str, loader: Option<&str>, links: Option<&Path>) -> Vec<PathBuf> {
        let environment = Environment {
            folders: Some(folders.as_ref()),
            applied: None,
            loader: loader.map(OsStr::new),
        };
        let path = find(environment, links).unwrap().unwrap();
        split_paths(&path).collect()
    }

    #[test]
    fn named_folders_come_first_with_those_of_wheels_below_them() {
        let root = temporary("wheels");
        for package in ["cublas/lib", "cudnn/lib", "include"] {
            std::fs::create_dir_all(root.join(package)).unwrap();
        }
        let text = root.to_str().unwrap();
        let expected = [
            root.clone(),
            root.join("cublas/lib"),
            root.join("cudnn/lib"),
        ];
        assert_eq!(found(text, None, None), expected);
        let with_old = found(&format!(":{text}:"), Some("/old:/older"), None);
        assert_eq!(with_old[..3], expected);
        assert_eq!(with_old[3..], ["/old", "/older"].map(PathBuf::from));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn libraries_of_wheels_are_linked_under_the_names_that_are_asked_for() {
        let root = temporary("wheels");
        let (lib, links) = (root.join("lib"), root.join("links"));
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::write(lib.join("libnccl.so.2"), "").unwrap();
        std::fs::write(lib.join("libcudnn.so.9"), "").unwrap();
        for _ in 0..2 {
            let path = found(lib.to_str().unwrap(), Some("/old"), Some(&links));
            assert_eq!(path, [lib.clone(), links.clone(), PathBuf::from("/old")]);
            for (plain, versioned) in UNVERSIONED {
                let to = std::fs::read_link(links.join(plain)).unwrap();
                assert_eq!(to, lib.join(versioned));
            }
        }
        std::fs::write(lib.join("libnccl.so"), "").unwrap();
        std::fs::write(lib.join("libcudnn.so"), "").unwrap();
        assert_eq!(found(lib.to_str().unwrap(), None, Some(&links)), [lib]);
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn nothing_is_done_twice_or_without_being_asked() {
        let root = temporary("twice");
        let (folders, other) = (root.as_os_str(), OsStr::new("/other"));
        let ask = |folders, applied| {
            let loader = None;
            let environment = Environment {
                folders,
                applied,
                loader,
            };
            find(environment, None).unwrap().is_some()
        };
        assert!(!ask(None, None));
        assert!(!ask(Some(OsStr::new("")), None));
        assert!(!ask(Some(folders), Some(folders)));
        assert!(ask(Some(folders), Some(other)), "another value was applied");
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_folder_that_is_not_there_is_told() {
        let environment = Environment {
            folders: Some(OsStr::new("/no/such/folder")),
            ..Environment::default()
        };
        let error = find(environment, None).unwrap_err();
        assert_eq!(
            error,
            "TTT_CUDA_LIBS names /no/such/folder, which is no folder"
        );
    }

    #[test]
    fn the_file_of_a_library_is_read_from_the_maps() {
        let maps = "7f00-7f01 r--p 00000000 08:01 1  /usr/lib/libcudnn_graph.so.9\n\
                    7f02-7f03 r-xp 00000000 08:01 2  /opt/my libs/libcudnn.so.9\n\
                    7f04-7f05 rw-p 00000000 00:00 0  [heap]\n";
        let at = loaded_from("libcudnn", maps);
        assert_eq!(at, Some(Path::new("/opt/my libs/libcudnn.so.9")));
        assert_eq!(loaded_from("libnvrtc", maps), None);
    }
}
