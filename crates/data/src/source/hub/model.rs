//! A model repository of the hub as a folder of this machine.

use std::path::PathBuf;

use hf_hub::RepoType;

use super::{
    HubName, MODEL_FORM, PREFIX, api, cache_folder, cached_snapshot, download, hub_error,
    note_commit,
};
use crate::DataError;

/// A model's files at one commit, in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    /// The folder of the snapshot.
    pub dir: PathBuf,
    /// The commit that the revision stood for.
    pub commit: String,
}

/// What is fetched of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelFiles {
    /// Configuration and tokenizer.
    Small,
    /// These and the safetensors.
    All,
}

/// Fetches `hub:owner/model[@revision]`; `revision` is given here or there, and `main` without.
/// Files that the cache has are not downloaded again.
///
/// # Errors
/// If the name is none, the hub does not answer, or, offline, the cache lacks the revision.
pub fn fetch_model(
    name: &str,
    revision: Option<&str>,
    files: ModelFiles,
    offline: bool,
) -> Result<HubModel, DataError> {
    let bad = || DataError::BadHubName {
        name: name.to_string(),
        expected: MODEL_FORM,
    };
    let plain = name.strip_prefix(PREFIX).ok_or_else(bad)?;
    let full = match revision {
        Some(_) if plain.contains('@') => return Err(bad()),
        Some(revision) => format!("{plain}@{}", revision.replace('/', "%2F")),
        None => plain.to_string(),
    };
    let name = HubName::parse(&full, MODEL_FORM)?;
    if name.glob.is_some() {
        return Err(bad());
    }
    let cache = cache_folder()?;
    if offline {
        let (dir, commit) = cached_snapshot(&cache, &name, RepoType::Model)?;
        return Ok(HubModel { dir, commit });
    }
    let hub = |error| hub_error(&name.describe(""), error);
    let api = api(&cache).map_err(hub)?;
    let repo = api.repo(name.repo(RepoType::Model, &name.revision));
    let info = repo.info().map_err(hub)?;
    note_commit(&cache, &name, RepoType::Model, &info.sha)?;
    // From here on the commit is asked for: a branch may move meanwhile.
    let pinned = api.repo(name.repo(RepoType::Model, &info.sha));
    for file in info.siblings.iter().map(|file| &file.rfilename) {
        if wanted(file, files) {
            download(&pinned, &name, file)?;
        }
    }
    let (dir, commit) = cached_snapshot(&cache, &name, RepoType::Model)?;
    Ok(HubModel { dir, commit })
}

/// Whether a model needs the file: those of its first folder, never pickled weights or code.
fn wanted(file: &str, files: ModelFiles) -> bool {
    let small = [".json", ".txt", ".jinja", "tokenizer.model"];
    let is = |kinds: &[&str]| kinds.iter().any(|kind| file.ends_with(kind));
    let weights = is(&[".safetensors", ".safetensors.index.json"]);
    !file.contains('/') && (is(&small) || weights) && (files == ModelFiles::All || !weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_model_needs_is_fetched() {
        for file in [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "merges.txt",
            "chat_template.jinja",
            "tokenizer.model",
        ] {
            assert!(wanted(file, ModelFiles::All), "{file}");
        }
        for file in [
            "pytorch_model.bin",
            "modeling_x.py",
            "original/model.safetensors",
            "README.md",
        ] {
            assert!(!wanted(file, ModelFiles::All), "{file}");
        }
        assert!(wanted("config.json", ModelFiles::Small));
        assert!(!wanted("model.safetensors", ModelFiles::Small));
        assert!(!wanted("model.safetensors.index.json", ModelFiles::Small));
    }

    #[test]
    fn a_name_has_one_revision() {
        for (name, revision) in [
            ("owner/model", None),
            ("hub:owner/model@a", Some("b")),
            ("hub:owner/model/file", None),
            ("hub:owner/model", Some("..")),
        ] {
            let fetched = fetch_model(name, revision, ModelFiles::All, true);
            assert!(
                matches!(fetched, Err(DataError::BadHubName { .. })),
                "{name} {revision:?}"
            );
        }
    }
}
