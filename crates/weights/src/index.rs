//! The index of a sharded folder: which file holds which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::json::UniqueMap;

/// A sound `*.safetensors.index.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightIndex {
    weight_map: BTreeMap<String, String>,
}

/// Keys beside `weight_map` are for people; `metadata.total_size` in particular is wrong in some
/// published folders and nobody reads it.
#[derive(Deserialize)]
struct IndexFile {
    weight_map: UniqueMap<String>,
}

#[derive(Serialize)]
struct IndexOut<'a> {
    metadata: BTreeMap<&'static str, u64>,
    weight_map: &'a BTreeMap<String, String>,
}

impl WeightIndex {
    /// Reads an index.
    ///
    /// # Errors
    /// A sentence on what is wrong: no index, a tensor listed twice, a file name that is not that
    /// of a safetensors file inside the folder.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let IndexFile { weight_map } =
            serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let weight_map = weight_map.0;
        if weight_map.is_empty() {
            return Err("weight_map lists no tensor".into());
        }
        for (name, file) in &weight_map {
            if !stays_inside(file) {
                return Err(format!(
                    "tensor {name} is said to be in {file:?}, which leaves the folder"
                ));
            }
            if !file.ends_with(".safetensors") {
                return Err(format!(
                    "tensor {name} is said to be in {file:?}, which is no safetensors file"
                ));
            }
        }
        Ok(Self { weight_map })
    }

    /// From pairs of tensor and file.
    pub(crate) fn from_map(weight_map: BTreeMap<String, String>) -> Self {
        Self { weight_map }
    }

    /// The file that holds `name`.
    pub fn file_of(&self, name: &str) -> Option<&str> {
        self.weight_map.get(name).map(String::as_str)
    }

    /// All tensors with their files, by name.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &str)> {
        let entries = self.weight_map.iter();
        entries.map(|(name, file)| (name.as_str(), file.as_str()))
    }

    /// The files, each once.
    pub fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }

    /// As a file, with the total size that other programs show.
    pub(crate) fn to_json(&self, total_bytes: u64) -> String {
        let out = IndexOut {
            metadata: BTreeMap::from([("total_size", total_bytes)]),
            weight_map: &self.weight_map,
        };
        serde_json::to_string_pretty(&out).expect("strings and numbers are JSON") + "\n"
    }
}

/// Whether a name is a path of plain components: not absolute, no `..`, no drive, not empty.
fn stays_inside(file: &str) -> bool {
    let plain = |part| matches!(part, Component::Normal(_));
    !file.is_empty() && !file.contains(['\\', '\0']) && Path::new(file).components().all(plain)
}
