//! Writing: a plan of names and shapes first, then the data in that order, shard after shard.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
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

/// A file that was written and flushed to disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenFile {
    /// Name inside the folder.
    pub file: String,
    /// Size.
    pub bytes: u64,
    /// BLAKE3 of the content, in hexadecimal.
    pub blake3: String,
}

/// Writes a folder of weights, holding no more than what it is handed.
///
/// A shard's header precedes its data and the number of shards is part of their names, so the plan
/// comes first and the data follows in its order.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    stem: String,
    /// Shards not begun, last first.
    planned: Vec<Shard>,
    open: Option<OpenShard>,
    index: Option<String>,
    written: Vec<WrittenFile>,
}

#[derive(Debug)]
struct Shard {
    file: String,
    header: Vec<u8>,
    /// Tensors with their bytes, last first.
    tensors: Vec<(TensorSpec, u64)>,
}

#[derive(Debug)]
struct OpenShard {
    output: HashedFile,
    /// Tensors with the bytes they still need, last first.
    tensors: Vec<(TensorSpec, u64)>,
}

impl Writer {
    /// Plans `tensors` into files of at most `max_shard_bytes` of data (more only where a single
    /// tensor is larger) named `stem.safetensors` or `stem-0000i-of-0000n.safetensors`, with
    /// `metadata` in each header, and begins the first. `dir` must hold none of them.
    ///
    /// # Errors
    /// If a name repeats, a size does not fit, or a file cannot be made.
    pub fn create(
        dir: &Path,
        stem: &str,
        tensors: Vec<TensorSpec>,
        max_shard_bytes: u64,
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
            if !last.is_empty() && group_bytes + bytes > max_shard_bytes {
                groups.push(vec![]);
                group_bytes = 0;
            }
            group_bytes += bytes;
            total += bytes;
            let last = groups.last_mut().expect("there is always a group");
            last.push((spec, bytes));
        }

        let shards = groups.len();
        let mut weight_map = BTreeMap::new();
        let mut planned = vec![];
        for (i, group) in groups.into_iter().enumerate() {
            let file = match shards {
                1 => format!("{stem}.safetensors"),
                _ => format!("{stem}-{:05}-of-{shards:05}.safetensors", i + 1),
            };
            for (spec, _) in &group {
                if weight_map.insert(spec.name.clone(), file.clone()).is_some() {
                    return Err(refuse(format!("tensor {} is planned twice", spec.name)));
                }
            }
            planned.push(Shard {
                header: header(&group, &metadata).map_err(refuse)?,
                file,
                tensors: group.into_iter().rev().collect(),
            });
        }
        planned.reverse();
        std::fs::create_dir_all(dir).map_err(WeightsError::io(dir, "make the folder"))?;
        Ok(Self {
            dir: dir.to_path_buf(),
            stem: stem.to_string(),
            planned,
            open: None,
            index: (shards > 1).then(|| WeightIndex::from_map(weight_map).to_json(total)),
            written: vec![],
        })
    }

    /// Adds values to tensor `name`, converted to its type, to nearest even: the whole tensor, or
    /// its next part.
    ///
    /// # Errors
    /// If another tensor is due, the values are more than it needs, its type is not F32, F16 or
    /// BF16, or the disk refuses.
    pub fn append_f32(&mut self, name: &str, values: &[f32]) -> Result<(), WeightsError> {
        const AT_ONCE: usize = 1 << 16;
        if values.is_empty() {
            return Ok(());
        }
        let encode: fn(&[f32], &mut Vec<u8>) = match self.due(name)? {
            Dtype::F32 => |values, out| encode(values, out, f32::to_le_bytes),
            Dtype::F16 => |values, out| encode(values, out, |x| f16::from_f32(x).to_le_bytes()),
            Dtype::BF16 => |values, out| encode(values, out, |x| bf16::from_f32(x).to_le_bytes()),
            found => {
                return Err(WeightsError::UnsupportedDtype {
                    dir: self.dir.clone(),
                    name: name.to_string(),
                    found,
                });
            }
        };
        let mut bytes = Vec::with_capacity(values.len().min(AT_ONCE) * 4);
        for part in values.chunks(AT_ONCE) {
            bytes.clear();
            encode(part, &mut bytes);
            self.append_bytes(name, &bytes)?;
        }
        Ok(())
    }

    /// Adds little-endian bytes to tensor `name`, as they are.
    ///
    /// # Errors
    /// As [`Writer::append_f32`], for any type.
    pub fn append_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), WeightsError> {
        if bytes.is_empty() {
            return Ok(()); // tensors without elements never come due
        }
        self.due(name)?;
        let open = self.open.as_mut().expect("due() opened the shard");
        let (_, left) = open.tensors.last_mut().expect("due() found the tensor");
        let Some(rest) = left.checked_sub(bytes.len() as u64) else {
            let problem = format!("tensor {name} needs {left} more bytes, got {}", bytes.len());
            return Err(self.plan_error(problem));
        };
        *left = rest;
        open.output.write(bytes)
    }

    /// Ends the last file, writes the index if there are several, and flushes all to disk. The
    /// files in order, the index last.
    ///
    /// # Errors
    /// If data is missing or the disk refuses.
    pub fn finish(mut self) -> Result<Vec<WrittenFile>, WeightsError> {
        if let Some(name) = self.advance()? {
            return Err(self.plan_error(format!("the data of tensor {name} is missing")));
        }
        if let Some(index) = self.index.take() {
            let file = format!("{}.safetensors.index.json", self.stem);
            let mut output = HashedFile::create(&self.dir, file)?;
            output.write(index.as_bytes())?;
            self.written.push(output.finish()?);
        }
        Ok(self.written)
    }

    /// Checks that `name` is the tensor that comes now; its type.
    fn due(&mut self, name: &str) -> Result<Dtype, WeightsError> {
        match self.advance()? {
            Some(due) if due == name => {}
            Some(due) => {
                return Err(self.plan_error(format!("tensor {due} comes now, got {name}")));
            }
            None => return Err(self.plan_error(format!("all is written, got {name}"))),
        }
        let open = self.open.as_ref().and_then(|open| open.tensors.last());
        let (spec, _) = open.expect("advance() found the tensor");
        Ok(spec.dtype)
    }

    /// Passes over complete tensors and shards; the name of the tensor that needs data.
    fn advance(&mut self) -> Result<Option<String>, WeightsError> {
        loop {
            if let Some(open) = &mut self.open {
                while let Some((spec, left)) = open.tensors.last() {
                    if *left > 0 {
                        return Ok(Some(spec.name.clone()));
                    }
                    open.tensors.pop();
                }
            }
            if let Some(done) = self.open.take() {
                self.written.push(done.output.finish()?);
            }
            let Some(shard) = self.planned.pop() else {
                return Ok(None);
            };
            let mut output = HashedFile::create(&self.dir, shard.file)?;
            output.write(&shard.header)?;
            let tensors = shard.tensors;
            self.open = Some(OpenShard { output, tensors });
        }
    }

    fn plan_error(&self, problem: String) -> WeightsError {
        WeightsError::Plan {
            dir: self.dir.clone(),
            problem,
        }
    }
}

fn encode<const S: usize>(values: &[f32], out: &mut Vec<u8>, bytes_of: impl Fn(f32) -> [u8; S]) {
    out.extend(values.iter().flat_map(|&value| bytes_of(value)));
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

/// A file that hashes what goes through it.
#[derive(Debug)]
struct HashedFile {
    path: PathBuf,
    file: String,
    output: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl HashedFile {
    fn create(dir: &Path, file: String) -> Result<Self, WeightsError> {
        let path = dir.join(&file);
        // Never over an existing file: somebody may have it mapped.
        let output = File::create_new(&path).map_err(WeightsError::io(&path, "make the file"))?;
        Ok(Self {
            path,
            file,
            output: BufWriter::with_capacity(1 << 20, output),
            hasher: blake3::Hasher::new(),
            bytes: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WeightsError> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        let written = self.output.write_all(bytes);
        written.map_err(WeightsError::io(&self.path, "write"))
    }

    fn finish(self) -> Result<WrittenFile, WeightsError> {
        let io = |action| WeightsError::io(&self.path, action);
        let file = self.output.into_inner();
        let file = file.map_err(|error| io("write")(error.into_error()))?;
        file.sync_all().map_err(io("flush to disk"))?;
        Ok(WrittenFile {
            file: self.file,
            bytes: self.bytes,
            blake3: self.hasher.finalize().to_hex().to_string(),
        })
    }
}
