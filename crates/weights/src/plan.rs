//! The files of a folder of weights before there is any data: names, headers, and where every
//! tensor will lie. A plan is a function of the tensors alone, so all who write one folder together
//! make the same.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::WeightsError;
use crate::header::bytes_of;
use crate::index::WeightIndex;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Type that its elements are stored as.
    pub dtype: Dtype,
}

/// What a folder of weights will hold.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) files: Vec<PlannedFile>,
    /// The index's name and content, where there are several files.
    pub(crate) index: Option<(String, String)>,
}

#[derive(Clone, Debug)]
pub(crate) struct PlannedFile {
    pub name: String,
    pub header: Vec<u8>,
    pub tensors: Vec<PlannedTensor>,
}

#[derive(Clone, Debug)]
pub(crate) struct PlannedTensor {
    pub name: String,
    pub dtype: Dtype,
    /// Where its data begins in the file.
    pub begin: u64,
    pub bytes: u64,
}

impl PlannedFile {
    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        let header = self.header.len() as u64;
        let last = self.tensors.last();
        last.map_or(header, |tensor| tensor.begin + tensor.bytes)
    }
}

impl Plan {
    /// Plans `tensors` into files of at most `max_file_bytes` of data (more only where a single
    /// tensor is larger) named `stem.safetensors` or `stem-0000i-of-0000n.safetensors`, with
    /// `metadata` in each header. `dir` is the folder that errors name.
    ///
    /// # Errors
    /// If a name repeats or a size does not fit.
    pub fn new(
        dir: &Path,
        stem: &str,
        tensors: Vec<TensorSpec>,
        max_file_bytes: u64,
        mut metadata: HashMap<String, String>,
    ) -> Result<Self, WeightsError> {
        // transformers refuses files that do not say which framework's layout they have.
        metadata
            .entry("format".into())
            .or_insert_with(|| "pt".into());
        let refuse = |problem| WeightsError::Plan {
            dir: dir.to_path_buf(),
            problem,
        };
        let mut groups: Vec<Vec<(TensorSpec, u64)>> = vec![vec![]];
        let mut group_bytes = 0;
        let mut total = 0;
        for spec in tensors {
            let bytes = bytes_of(spec.dtype, &spec.shape)
                .ok_or_else(|| refuse(format!("tensor {} has an impossible shape", spec.name)))?
                as u64;
            let last = groups.last_mut().expect("there is always a group");
            if !last.is_empty() && group_bytes + bytes > max_file_bytes {
                groups.push(vec![]);
                group_bytes = 0;
            }
            group_bytes += bytes;
            total += bytes;
            let last = groups.last_mut().expect("there is always a group");
            last.push((spec, bytes));
        }

        let count = groups.len();
        let mut weight_map = BTreeMap::new();
        let mut files = vec![];
        for (i, group) in groups.into_iter().enumerate() {
            let name = match count {
                1 => format!("{stem}.safetensors"),
                _ => format!("{stem}-{:05}-of-{count:05}.safetensors", i + 1),
            };
            for (spec, _) in &group {
                if weight_map.insert(spec.name.clone(), name.clone()).is_some() {
                    return Err(refuse(format!("tensor {} is planned twice", spec.name)));
                }
            }
            let header = header(&group, &metadata).map_err(refuse)?;
            let mut begin = header.len() as u64;
            let tensors = group.into_iter().map(|(spec, bytes)| {
                let tensor = PlannedTensor {
                    name: spec.name,
                    dtype: spec.dtype,
                    begin,
                    bytes,
                };
                begin += bytes;
                tensor
            });
            files.push(PlannedFile {
                name,
                tensors: tensors.collect(),
                header,
            });
        }
        let index = (count > 1).then(|| {
            let index = WeightIndex::from_map(weight_map).to_json(total);
            (format!("{stem}.safetensors.index.json"), index)
        });
        Ok(Self { files, index })
    }

    /// Names and sizes of the files that hold tensors, in order.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        let files = self.files.iter();
        files.map(|file| (file.name.as_str(), file.bytes()))
    }
}

/// Length and JSON, padded so that the data is aligned to 8 bytes.
fn header(
    tensors: &[(TensorSpec, u64)],
    metadata: &HashMap<String, String>,
) -> Result<Vec<u8>, String> {
    let mut begin = 0;
    let infos = tensors.iter().map(|(spec, bytes)| {
        let end = begin + *bytes as usize;
        let info = TensorInfo {
            dtype: spec.dtype,
            shape: spec.shape.clone(),
            data_offsets: (begin, end),
        };
        begin = end;
        (spec.name.clone(), info)
    });
    let described = Metadata::new(Some(metadata.clone()), infos.collect());
    let described = described.map_err(|error| error.to_string())?;
    let mut json = serde_json::to_vec(&described).map_err(|error| error.to_string())?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}
