//! Reading: a folder opened by its headers, its data mapped tensor by tensor.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Mmap, MmapOptions};
use safetensors::Dtype;

use crate::element_bytes;
use crate::error::WeightsError;
use crate::header::{self, Entry, Header, LENGTH_BYTES, MAX_HEADER_BYTES};
use crate::index::WeightIndex;

/// A folder of weights whose headers have been checked.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Name → shard and place.
    tensors: BTreeMap<String, (usize, Entry)>,
    metadata: HashMap<String, String>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    file_bytes: u64,
    data_start: u64,
}

/// Type and shape of a tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Type of its elements.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

/// Bytes of a file, mapped for as long as this lives.
#[derive(Debug)]
pub struct Bytes(Option<Mmap>);

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl Folder {
    /// Opens `dir`'s `model.safetensors`, or its shards and their index.
    ///
    /// # Errors
    /// If there are none, or one of them is not sound: every header is checked before this returns.
    pub fn open(dir: &Path) -> Result<Self, WeightsError> {
        Self::open_stem(dir, "model")
    }

    /// [`Folder::open`] with another file stem than `model`.
    ///
    /// # Errors
    /// As [`Folder::open`].
    pub fn open_stem(dir: &Path, stem: &str) -> Result<Self, WeightsError> {
        let root = Root::new(dir)?;
        let single = format!("{stem}.safetensors");
        let index = dir.join(format!("{stem}.safetensors.index.json"));
        // A dangling link counts as there, so that opening it says what is missing.
        let exists = |path: &Path| path.symlink_metadata().is_ok();
        match (exists(&dir.join(&single)), exists(&index)) {
            (true, true) => Err(WeightsError::Ambiguous {
                dir: dir.to_path_buf(),
                stem: stem.to_string(),
            }),
            (true, false) => Self::from_files(dir, &root, [single.as_str()], None),
            (false, true) => {
                let json = read_limited(&root.resolve(&index)?, MAX_HEADER_BYTES)?;
                let broken = |problem| WeightsError::Index {
                    path: index.clone(),
                    problem,
                };
                let listed = WeightIndex::parse(&json).map_err(broken)?;
                Self::from_files(dir, &root, listed.files(), Some((&index, &listed)))
            }
            (false, false) => Err(nothing_to_read(dir, stem)),
        }
    }

    fn from_files<'a>(
        dir: &Path,
        root: &Root,
        files: impl IntoIterator<Item = &'a str>,
        index: Option<(&Path, &WeightIndex)>,
    ) -> Result<Self, WeightsError> {
        let mut folder = Self {
            dir: dir.to_path_buf(),
            shards: vec![],
            tensors: BTreeMap::new(),
            metadata: HashMap::new(),
        };
        for file in files {
            let path = dir.join(file);
            if path.symlink_metadata().is_err() {
                return Err(WeightsError::MissingShard { path });
            }
            let (shard, header) = Shard::open(path, root)?;
            if folder.shards.is_empty() {
                folder.metadata = header.metadata;
            }
            for (name, entry) in header.tensors {
                if let Some((first, _)) = folder.tensors.get(&name) {
                    return Err(WeightsError::Duplicate {
                        other: folder.shards[*first].path.clone(),
                        path: shard.path,
                        name,
                    });
                }
                if let Some((path, index)) = index
                    && index.file_of(&name) != Some(file)
                {
                    return Err(WeightsError::Index {
                        path: path.to_path_buf(),
                        problem: format!("{file} holds tensor {name}, which is not listed there"),
                    });
                }
                folder.tensors.insert(name, (folder.shards.len(), entry));
            }
            folder.shards.push(shard);
        }
        if let Some((path, index)) = index {
            let absent = |(name, _): &(&str, &str)| !folder.tensors.contains_key(*name);
            if let Some((name, file)) = index.entries().find(absent) {
                return Err(WeightsError::Index {
                    path: path.to_path_buf(),
                    problem: format!("tensor {name} is said to be in {file}, it is not"),
                });
            }
        }
        Ok(folder)
    }

    /// The folder, as it was given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names of all tensors, ascending.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Type and shape of a tensor; `None` if there is none of that name.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        let (_, entry) = self.tensors.get(name)?;
        Some(TensorInfo {
            dtype: entry.dtype,
            shape: entry.shape.clone(),
        })
    }

    /// The strings of the first file's header.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// A tensor as it is stored, little-endian.
    ///
    /// # Errors
    /// If there is no such tensor, or its file can no longer be read.
    pub fn bytes(&self, name: &str) -> Result<Bytes, WeightsError> {
        let (shard, entry) = self.entry(name)?;
        shard.map(entry.begin..entry.end)
    }

    /// A whole tensor, converted to f32.
    ///
    /// # Errors
    /// If there is no such tensor, it is not of a floating-point type, or `out` has another number
    /// of elements.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<(), WeightsError> {
        let (_, entry) = self.entry(name)?;
        let elements = entry.elements();
        if out.len() != elements {
            let problem = format!("has {elements} elements, asked for {}", out.len());
            return Err(range_error(name, problem));
        }
        self.read_f32_range(name, 0..elements, out)
    }

    /// Elements `range` of a tensor in row-major order, converted to f32.
    ///
    /// # Errors
    /// As [`Folder::read_f32`].
    pub fn read_f32_range(
        &self,
        name: &str,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), WeightsError> {
        let (shard, entry) = self.entry(name)?;
        let elements = entry.elements();
        if range.start > range.end || range.end > elements {
            let problem = format!("elements {range:?} of {elements} asked for");
            return Err(range_error(name, problem));
        }
        if out.len() != range.len() {
            let problem = format!("{} elements do not fill {}", range.len(), out.len());
            return Err(range_error(name, problem));
        }
        let convert: fn(&[u8], &mut [f32]) = match entry.dtype {
            Dtype::F32 => |bytes, out| convert(bytes, out, f32::from_le_bytes),
            Dtype::F16 => |bytes, out| convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => |bytes, out| convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            found => {
                return Err(WeightsError::UnsupportedDtype {
                    dir: self.dir.clone(),
                    name: name.to_string(),
                    found,
                });
            }
        };
        let size = element_bytes(entry.dtype) as u64;
        let mut begin = entry.begin + range.start as u64 * size;
        // A slice at a time, so that the mapped pages stay few beside a large tensor's values.
        for part in out.chunks_mut(1 << 22) {
            let end = begin + part.len() as u64 * size;
            convert(&shard.map(begin..end)?, part);
            begin = end;
        }
        Ok(())
    }

    fn entry(&self, name: &str) -> Result<(&Shard, &Entry), WeightsError> {
        match self.tensors.get(name) {
            Some((shard, entry)) => Ok((&self.shards[*shard], entry)),
            None => Err(WeightsError::MissingTensor {
                dir: self.dir.clone(),
                name: name.to_string(),
            }),
        }
    }
}

impl Entry {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

fn range_error(name: &str, problem: String) -> WeightsError {
    WeightsError::Range {
        name: name.to_string(),
        problem,
    }
}

fn convert<const S: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; S]) -> f32) {
    let (elements, _) = bytes.as_chunks::<S>();
    for (value, &element) in out.iter_mut().zip(elements) {
        *value = decode(element);
    }
}

impl Shard {
    fn open(path: PathBuf, root: &Root) -> Result<(Self, Header), WeightsError> {
        let io = |action| WeightsError::io(&path, action);
        let mut file = File::open(root.resolve(&path)?).map_err(io("open the file"))?;
        let file_bytes = file.metadata().map_err(io("read its size"))?.len();
        let unsound = |problem| WeightsError::Header {
            path: path.clone(),
            problem,
        };
        if file_bytes < LENGTH_BYTES {
            return Err(unsound(format!("it has {file_bytes} bytes")));
        }
        let mut first = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut first).map_err(io("read its header"))?;
        let json_bytes = header::json_bytes(first, file_bytes).map_err(unsound)?;
        let mut json = vec![0; json_bytes as usize];
        file.read_exact(&mut json).map_err(io("read its header"))?;
        let data_start = LENGTH_BYTES + json_bytes;
        let header = header::parse(&json, file_bytes - data_start).map_err(unsound)?;
        let shard = Self {
            path,
            file,
            file_bytes,
            data_start,
        };
        Ok((shard, header))
    }

    /// Maps a range of the data. Mapping per tensor, not per file, keeps the process's memory at
    /// one tensor whatever the model's size.
    fn map(&self, range: Range<u64>) -> Result<Bytes, WeightsError> {
        if range.is_empty() {
            return Ok(Bytes(None));
        }
        let io = |action| WeightsError::io(&self.path, action);
        let now = self.file.metadata().map_err(io("read its size"))?.len();
        if now != self.file_bytes {
            let path = self.path.clone();
            return Err(WeightsError::Changed { path });
        }
        let mut options = MmapOptions::new();
        options
            .offset(self.data_start + range.start)
            .len((range.end - range.start) as usize);
        // SAFETY: the range lies inside the file, by the header's checks and the size just read.
        // Only bytes are read from the map, so a file that another process overwrites gives wrong
        // numbers; one that it truncates right now ends this process, as with every memory map.
        let map = unsafe { options.map(&self.file) }.map_err(io("map it into memory"))?;
        Ok(Bytes(Some(map)))
    }
}

/// Where a folder's files may lie.
struct Root {
    /// The folder, resolved; in a hub cache the model's own part of it, since its snapshots are
    /// links into `blobs`.
    allowed: Vec<PathBuf>,
}

impl Root {
    fn new(dir: &Path) -> Result<Self, WeightsError> {
        let resolved = dir
            .canonicalize()
            .map_err(WeightsError::io(dir, "open the folder"))?;
        // models--OWNER--NAME/snapshots/REVISION/ → models--OWNER--NAME/blobs/
        let snapshots = resolved.parent().filter(|p| p.ends_with("snapshots"));
        let blobs = snapshots
            .and_then(Path::parent)
            .map(|model| model.join("blobs"));
        Ok(Self {
            allowed: std::iter::once(resolved).chain(blobs).collect(),
        })
    }

    /// The regular file that `path` stands for, if it lies where it may.
    fn resolve(&self, path: &Path) -> Result<PathBuf, WeightsError> {
        let target = path
            .canonicalize()
            .map_err(WeightsError::io(path, "open the file"))?;
        if !self.allowed.iter().any(|root| target.starts_with(root)) {
            return Err(WeightsError::Escapes {
                path: path.to_path_buf(),
                target,
            });
        }
        // Opening a pipe would wait for ever.
        if !target.is_file() {
            return Err(WeightsError::Header {
                path: path.to_path_buf(),
                problem: "it is no regular file".into(),
            });
        }
        Ok(target)
    }
}

fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, WeightsError> {
    let io = |action| WeightsError::io(path, action);
    let file = File::open(path).map_err(io("open the file"))?;
    let mut bytes = vec![];
    let read = file.take(limit + 1).read_to_end(&mut bytes);
    if read.map_err(io("read the file"))? as u64 > limit {
        return Err(WeightsError::Index {
            path: path.to_path_buf(),
            problem: format!("it has more than {limit} bytes"),
        });
    }
    Ok(bytes)
}

/// Says why there is nothing to read, looking for weights in formats that are not read.
fn nothing_to_read(dir: &Path, stem: &str) -> WeightsError {
    let pickled = |path: &PathBuf| {
        let extension = path.extension().unwrap_or_default();
        ["bin", "pt", "pth", "ckpt", "pkl"]
            .map(Into::into)
            .contains(&extension.to_os_string())
    };
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    match entries.map(|entry| entry.path()).filter(pickled).min() {
        Some(path) => WeightsError::Pickled { path },
        None => WeightsError::NotFound {
            dir: dir.to_path_buf(),
            stem: stem.to_string(),
        },
    }
}
