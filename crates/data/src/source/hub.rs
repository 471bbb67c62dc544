//! The Hugging Face hub, through its cache on this machine.
//!
//! A name is `hub:owner/name[@revision][/glob]`. Online, the revision is resolved to a commit and files that the cache
//! lacks are downloaded; offline (`HF_HUB_OFFLINE=1` or the setting) the cache alone is used. Either way the files come
//! from one commit, which the manifest records. The cache is the one that the Python tools share: `HF_HUB_CACHE`, else
//! `HF_HOME/hub`, else `~/.cache/huggingface/hub`.

mod model;

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::discover::{Format, listed_format};
use crate::DataError;

pub use model::{HubModel, ModelFiles, fetch_model};

/// What tells a hub name from a path.
pub(crate) const PREFIX: &str = "hub:";

const DATASET_FORM: &str = "hub:owner/dataset[@revision][/glob] (write a / in a revision as %2F)";
const MODEL_FORM: &str = "hub:owner/model[@revision]";

/// True when `HF_HUB_OFFLINE` asks for no network, as the Python tools read it.
pub fn offline_by_environment() -> bool {
    std::env::var("HF_HUB_OFFLINE")
        .is_ok_and(|value| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
}

/// Files of a dataset at one commit.
pub(crate) struct Snapshot {
    pub commit: String,
    /// Path on this machine and path in the repository, in the order of the latter.
    pub files: Vec<(PathBuf, String)>,
}

/// A parsed name, without the prefix.
#[derive(Debug, PartialEq, Eq)]
struct HubName {
    id: String,
    revision: String,
    glob: Option<String>,
}

impl HubName {
    fn parse(name: &str, form: &'static str) -> Result<Self, DataError> {
        let bad = || DataError::BadHubName {
            name: format!("{PREFIX}{name}"),
            expected: form,
        };
        let (owner, rest) = name.split_once('/').ok_or_else(bad)?;
        let (repository, glob) = match rest.split_once('/') {
            Some((repository, glob)) => (repository, Some(glob.to_string())),
            None => (rest, None),
        };
        let (repository, revision) = match repository.split_once('@') {
            Some((repository, revision)) => {
                (repository, revision.replace("%2F", "/").replace("%2f", "/"))
            }
            None => (repository, "main".to_string()),
        };
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let revision_plain = revision.split('/').all(plain);
        if !plain(owner) || !plain(repository) || !revision_plain || glob.as_deref() == Some("") {
            return Err(bad());
        }
        Ok(Self {
            id: format!("{owner}/{repository}"),
            revision,
            glob,
        })
    }

    fn repo(&self, kind: RepoType, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), kind, revision.to_string())
    }

    fn describe(&self, file: &str) -> String {
        format!(
            "{}@{}{}{file}",
            self.id,
            self.revision,
            if file.is_empty() { "" } else { "/" }
        )
    }
}

/// The files of dataset `name` (without prefix) that its glob selects; without a glob, its record and text files.
pub(crate) fn fetch_dataset(name: &str, offline: bool) -> Result<Snapshot, DataError> {
    fetch_dataset_into(&cache_folder()?, name, offline)
}

fn fetch_dataset_into(cache: &Path, name: &str, offline: bool) -> Result<Snapshot, DataError> {
    let name = HubName::parse(name, DATASET_FORM)?;
    let pattern = match &name.glob {
        Some(glob) => Some(
            glob::Pattern::new(glob).map_err(|error| DataError::BadPattern {
                name: name.id.clone(),
                input: glob.clone(),
                reason: error.to_string(),
            })?,
        ),
        None => None,
    };
    let selected = |file: &str| match &pattern {
        // As in paths: a star stays within one folder.
        Some(pattern) => pattern.matches_with(
            file,
            glob::MatchOptions {
                require_literal_separator: true,
                ..glob::MatchOptions::new()
            },
        ),
        // README.md and the like describe a dataset; they are not its text.
        None => match listed_format(Path::new(file)) {
            Some((Format::Text, _)) => file.contains(".txt"),
            Some(_) => true,
            None => false,
        },
    };
    if offline {
        return cached_files(cache, &name, &selected);
    }
    let hub = |error| hub_error(&name.describe(""), error);
    let api = api(cache).map_err(hub)?;
    let info = api
        .repo(name.repo(RepoType::Dataset, &name.revision))
        .info()
        .map_err(hub)?;
    note_commit(cache, &name, RepoType::Dataset, &info.sha)?;
    // From here on the commit is asked for, not the branch: it may move while files are being downloaded.
    let pinned = api.repo(name.repo(RepoType::Dataset, &info.sha));
    let mut labels: Vec<_> = info
        .siblings
        .into_iter()
        .map(|file| file.rfilename)
        .filter(|f| selected(f))
        .collect();
    labels.sort();
    let files = labels
        .into_iter()
        .map(|label| Ok((download(&pinned, &name, &label)?, label)))
        .collect::<Result<_, DataError>>()?;
    Ok(Snapshot {
        commit: info.sha,
        files,
    })
}

/// `file` of model repository `name` (without prefix).
pub(crate) fn fetch_model_file(
    name: &str,
    file: &str,
    offline: bool,
) -> Result<PathBuf, DataError> {
    let cache = cache_folder()?;
    let name = HubName::parse(name, MODEL_FORM)?;
    if name.glob.is_some() {
        return Err(DataError::BadHubName {
            name: format!("{PREFIX}{}", name.describe("...")),
            expected: MODEL_FORM,
        });
    }
    if offline {
        let (snapshot, _) = cached_snapshot(&cache, &name, RepoType::Model)?;
        let path = snapshot.join(file);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(DataError::NotCached {
                what: name.describe(file),
                cache,
            })
        };
    }
    let hub = |error| hub_error(&name.describe(file), error);
    let api = api(&cache).map_err(hub)?;
    let info = api
        .repo(name.repo(RepoType::Model, &name.revision))
        .info()
        .map_err(hub)?;
    note_commit(&cache, &name, RepoType::Model, &info.sha)?;
    let pinned = api.repo(name.repo(RepoType::Model, &info.sha));
    // It names the end-of-text token; not every repository has it.
    let config = "tokenizer_config.json";
    if info
        .siblings
        .iter()
        .any(|sibling| sibling.rfilename == config)
    {
        download(&pinned, &name, config)?;
    }
    download(&pinned, &name, file)
}

fn api(cache: &Path) -> Result<Api, ApiError> {
    let mut builder = ApiBuilder::from_env()
        .with_cache_dir(cache.to_path_buf())
        .with_retries(3);
    // The client itself looks only for the file that a login leaves in the cache.
    if let Some(token) = std::env::var("HF_TOKEN")
        .ok()
        .filter(|token| !token.is_empty())
    {
        builder = builder.with_token(Some(token));
    }
    builder.build()
}

/// Notes in the cache which commit the revision stands for, so that an offline run finds it by the same name.
fn note_commit(
    cache: &Path,
    name: &HubName,
    kind: RepoType,
    commit: &str,
) -> Result<(), DataError> {
    Cache::new(cache.to_path_buf())
        .repo(name.repo(kind, &name.revision))
        .create_ref(commit)
        .map_err(DataError::io(cache, "write to the hub cache"))
}

fn download(repo: &ApiRepo, name: &HubName, file: &str) -> Result<PathBuf, DataError> {
    repo.get(file)
        .map_err(|error| hub_error(&name.describe(file), error))
}

fn hub_error(what: &str, error: ApiError) -> DataError {
    DataError::Hub {
        what: what.to_string(),
        reason: error.to_string(),
    }
}

fn cache_folder() -> Result<PathBuf, DataError> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache/huggingface/hub")))
        .ok_or_else(|| {
            DataError::setting(
                "HF_HOME",
                "there is no home folder for the hub cache; set HF_HOME",
            )
        })
}

/// Folder of the cached snapshot that the name's revision stands for, and its commit.
fn cached_snapshot(
    cache: &Path,
    name: &HubName,
    kind: RepoType,
) -> Result<(PathBuf, String), DataError> {
    let not_cached = || DataError::NotCached {
        what: name.describe(""),
        cache: cache.to_path_buf(),
    };
    let repo = name.repo(kind, &name.revision);
    let reference = cache
        .join(repo.folder_name())
        .join("refs")
        .join(&name.revision);
    // A commit needs no reference: its snapshot carries its name.
    let commit = match std::fs::read_to_string(&reference) {
        Ok(commit) => commit.trim().to_string(),
        Err(_) => name.revision.clone(),
    };
    if commit.is_empty() || commit.contains(['/', '\\']) || commit.starts_with('.') {
        return Err(not_cached());
    }
    let snapshot = Cache::new(cache.to_path_buf())
        .repo(repo)
        .pointer_path(&commit);
    if snapshot.is_dir() {
        Ok((snapshot, commit))
    } else {
        Err(not_cached())
    }
}

fn cached_files(
    cache: &Path,
    name: &HubName,
    selected: &dyn Fn(&str) -> bool,
) -> Result<Snapshot, DataError> {
    let (snapshot, commit) = cached_snapshot(cache, name, RepoType::Dataset)?;
    let mut files = Vec::new();
    let mut folders = vec![snapshot.clone()];
    while let Some(folder) = folders.pop() {
        for entry in
            std::fs::read_dir(&folder).map_err(DataError::io(&folder, "list the folder"))?
        {
            let path = entry
                .map_err(DataError::io(&folder, "list the folder"))?
                .path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(label) = path.strip_prefix(&snapshot) {
                let label = label.to_string_lossy().into_owned();
                if selected(&label) {
                    files.push((path, label));
                }
            }
        }
    }
    files.sort_by(|a, b| a.1.cmp(&b.1));
    if files.is_empty() {
        return Err(DataError::NotCached {
            what: name.describe(name.glob.as_deref().unwrap_or("")),
            cache: cache.to_path_buf(),
        });
    }
    Ok(Snapshot { commit, files })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache_with(files: &[&str]) -> tempfile::TempDir {
        let cache = tempfile::tempdir().unwrap();
        let repo = cache.path().join("datasets--owner--name");
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
        for file in files {
            let path = repo.join("snapshots").join(COMMIT).join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        cache
    }

    fn labels(cache: &tempfile::TempDir, name: &str) -> Result<Vec<String>, DataError> {
        fetch_dataset_into(cache.path(), name, true)
            .map(|s| s.files.into_iter().map(|f| f.1).collect())
    }

    #[test]
    fn names_parse_into_repository_revision_and_glob() {
        let parse = |name| HubName::parse(name, DATASET_FORM);
        let name = parse("owner/name@refs%2Fconvert%2Fparquet/default/*.parquet").unwrap();
        assert_eq!(name.id, "owner/name");
        assert_eq!(name.revision, "refs/convert/parquet");
        assert_eq!(name.glob.as_deref(), Some("default/*.parquet"));
        assert_eq!(parse("owner/name").unwrap().revision, "main");
        for bad in [
            "name",
            "owner/",
            "/name",
            "owner/name@",
            "owner/name/",
            "../name",
            "owner/na me",
            "o/n@..",
        ] {
            assert!(
                matches!(parse(bad), Err(DataError::BadHubName { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn offline_lists_the_cached_snapshot_and_its_commit() {
        let cache = cache_with(&[
            "README.md",
            "data/b.parquet",
            "data/a.jsonl.gz",
            "notes.txt",
            "image.png",
        ]);
        assert_eq!(
            labels(&cache, "owner/name").unwrap(),
            ["data/a.jsonl.gz", "data/b.parquet", "notes.txt"]
        );
        assert_eq!(
            labels(&cache, "owner/name/data/*.parquet").unwrap(),
            ["data/b.parquet"]
        );
        let by_commit =
            fetch_dataset_into(cache.path(), &format!("owner/name@{COMMIT}"), true).unwrap();
        assert_eq!(
            (by_commit.commit.as_str(), by_commit.files.len()),
            (COMMIT, 3)
        );
    }

    #[test]
    fn offline_without_the_files_says_what_and_where() {
        let cache = cache_with(&["a.parquet"]);
        for missing in ["owner/other", "owner/name@v2", "owner/name/*.jsonl"] {
            let error = labels(&cache, missing).unwrap_err();
            assert!(matches!(error, DataError::NotCached { .. }), "{error}");
            let text = error.to_string();
            assert!(
                text.contains("HF_HOME") && text.contains(&*cache.path().to_string_lossy()),
                "{text}"
            );
        }
    }
}
