//! Writing by several processes into the same files, each its own ranges.
//!
//! Who writes which range is the callers' agreement; here each range is hashed while it is written,
//! so that the file as a whole needs no second reading. One process makes the files, and when all
//! can see them, each writes and flushes its part.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::element_bytes;
use crate::encode::{AT_ONCE, encode_f32};
use crate::error::WeightsError;
use crate::plan::Plan;

/// A range of a file that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenPiece {
    /// Name of the file inside the folder.
    pub file: String,
    /// Its bytes.
    pub range: Range<u64>,
    /// BLAKE3 of these bytes, in hexadecimal.
    pub blake3: String,
}

impl Plan {
    /// Makes all files in `dir` with their headers and their full length, the data being holes, and
    /// the index. What it wrote of them.
    ///
    /// # Errors
    /// If a file is there already or the disk refuses.
    pub fn make_files(&self, dir: &Path) -> Result<Vec<WrittenPiece>, WeightsError> {
        let make = |name: &str, content: &[u8], bytes: u64| {
            let path = dir.join(name);
            // Never over an existing file: somebody may have it mapped.
            let file = File::create_new(&path);
            let mut file = file.map_err(WeightsError::io(&path, "make the file"))?;
            file.write_all(content)
                .and_then(|()| file.set_len(bytes))
                .map_err(WeightsError::io(&path, "write"))?;
            Ok(WrittenPiece {
                file: name.to_string(),
                range: 0..content.len() as u64,
                blake3: blake3::hash(content).to_hex().to_string(),
            })
        };
        let mut pieces = vec![];
        for file in &self.files {
            pieces.push(make(&file.name, &file.header, file.bytes())?);
        }
        if let Some((name, index)) = &self.index {
            pieces.push(make(name, index.as_bytes(), index.len() as u64)?);
        }
        Ok(pieces)
    }
}

/// One of several writers of a folder's files.
#[derive(Debug)]
pub struct SharedWriter<'a> {
    dir: PathBuf,
    plan: &'a Plan,
    /// Tensor → its file and its number in there.
    places: HashMap<&'a str, (usize, usize)>,
    /// The files that this writer has written to.
    files: HashMap<usize, File>,
    open: Option<OpenPiece>,
    written: Vec<WrittenPiece>,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct OpenPiece {
    file: usize,
    range: Range<u64>,
    hasher: blake3::Hasher,
}

impl<'a> SharedWriter<'a> {
    /// A writer into the files that [`Plan::make_files`] made in `dir`.
    pub fn new(dir: &Path, plan: &'a Plan) -> Self {
        let files = plan.files.iter().enumerate();
        let places = files.flat_map(|(i, file)| {
            let tensors = file.tensors.iter().enumerate();
            tensors.map(move |(k, tensor)| (tensor.name.as_str(), (i, k)))
        });
        Self {
            dir: dir.to_path_buf(),
            plan,
            places: places.collect(),
            files: HashMap::new(),
            open: None,
            written: vec![],
            bytes: vec![],
        }
    }

    /// Writes `values` to tensor `name` from its element `first` on, converted to its type, to
    /// nearest even. What follows on what was written before makes one piece with it.
    ///
    /// # Errors
    /// If there is no such tensor, the values do not fit it, its type is not F32, F16 or BF16, or
    /// the disk refuses.
    pub fn write_f32(
        &mut self,
        name: &str,
        first: usize,
        values: &[f32],
    ) -> Result<(), WeightsError> {
        let Some(&(file, tensor)) = self.places.get(name) else {
            return Err(self.plan_error(format!("tensor {name} is not planned")));
        };
        let tensor = &self.plan.files[file].tensors[tensor];
        let size = element_bytes(tensor.dtype) as u64;
        let end = (first as u64).checked_add(values.len() as u64);
        if end.is_none_or(|end| end.saturating_mul(size) > tensor.bytes) {
            let problem = format!(
                "tensor {name} of {} bytes has no place for {} elements from {first} on",
                tensor.bytes,
                values.len()
            );
            return Err(self.plan_error(problem));
        }
        let (dtype, begin) = (tensor.dtype, tensor.begin + first as u64 * size);
        let mut bytes = std::mem::take(&mut self.bytes);
        let written = self.write_at(file, begin, (name, dtype), values, &mut bytes);
        self.bytes = bytes;
        written
    }

    fn write_at(
        &mut self,
        file: usize,
        begin: u64,
        (name, dtype): (&str, Dtype),
        values: &[f32],
        bytes: &mut Vec<u8>,
    ) -> Result<(), WeightsError> {
        if values.is_empty() {
            return Ok(());
        }
        let follows = |open: &OpenPiece| open.file == file && open.range.end == begin;
        if !self.open.as_ref().is_some_and(follows) {
            self.close();
            self.seek(file, begin)?;
            self.open = Some(OpenPiece {
                file,
                range: begin..begin,
                hasher: blake3::Hasher::new(),
            });
        }
        for part in values.chunks(AT_ONCE) {
            encode_f32(dtype, part, bytes).map_err(|found| WeightsError::UnsupportedDtype {
                dir: self.dir.clone(),
                name: name.to_string(),
                found,
            })?;
            let output = self.files.get_mut(&file).expect("seek() opened it");
            let written = output.write_all(bytes);
            written.map_err(WeightsError::io(&self.path(file), "write"))?;
            let open = self.open.as_mut().expect("opened above");
            open.hasher.update_rayon(bytes);
            open.range.end += bytes.len() as u64;
        }
        Ok(())
    }

    /// Flushes to disk what was written. The pieces in the order they were written. `each` hears every
    /// file before it is flushed, which may take minutes.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn finish(mut self, each: impl Fn(&str)) -> Result<Vec<WrittenPiece>, WeightsError> {
        self.close();
        for (file, output) in &self.files {
            each(&self.plan.files[*file].name);
            let flushed = output.sync_all();
            flushed.map_err(WeightsError::io(&self.path(*file), "flush to disk"))?;
        }
        Ok(self.written)
    }

    fn close(&mut self) {
        if let Some(open) = self.open.take() {
            self.written.push(WrittenPiece {
                file: self.plan.files[open.file].name.clone(),
                range: open.range,
                blake3: open.hasher.finalize().to_hex().to_string(),
            });
        }
    }

    /// Opens file `file`, if it is not, and goes to byte `at`.
    fn seek(&mut self, file: usize, at: u64) -> Result<(), WeightsError> {
        let path = self.path(file);
        let output = match self.files.entry(file) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(place) => {
                let opened = OpenOptions::new().write(true).open(&path);
                place.insert(opened.map_err(WeightsError::io(&path, "open the file"))?)
            }
        };
        let sought = output.seek(SeekFrom::Start(at));
        sought.map(drop).map_err(WeightsError::io(&path, "write"))
    }

    fn path(&self, file: usize) -> PathBuf {
        self.dir.join(&self.plan.files[file].name)
    }

    fn plan_error(&self, problem: String) -> WeightsError {
        WeightsError::Plan {
            dir: self.dir.clone(),
            problem,
        }
    }
}

/// BLAKE3 of a range of a file, in hexadecimal.
///
/// # Errors
/// If the file is shorter or cannot be read.
pub fn hash_piece(path: &Path, range: Range<u64>) -> Result<String, WeightsError> {
    const AT_ONCE: u64 = 1 << 23;
    let io = |action| WeightsError::io(path, action);
    let mut file = File::open(path).map_err(io("open the file"))?;
    file.seek(SeekFrom::Start(range.start))
        .map_err(io("read the file"))?;
    let mut hasher = blake3::Hasher::new();
    let mut left = range.end.saturating_sub(range.start);
    let mut buffer = vec![0; left.min(AT_ONCE) as usize];
    while left > 0 {
        let part = &mut buffer[..left.min(AT_ONCE) as usize];
        file.read_exact(part).map_err(io("read the file"))?;
        hasher.update_rayon(part);
        left -= part.len() as u64;
    }
    Ok(hasher.finalize().to_hex().to_string())
}
