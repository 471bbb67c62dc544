//! Writing by one process: a plan first, then the data in its order, file after file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::encode::{AT_ONCE, encode_f32};
use crate::error::WeightsError;
use crate::plan::{Plan, PlannedFile, TensorSpec};

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
/// A file's header precedes its data and the number of files is part of their names, so the plan
/// comes first and the data follows in its order.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    /// Files not begun, last first.
    planned: Vec<PlannedFile>,
    open: Option<OpenFile>,
    /// Name and content.
    index: Option<(String, String)>,
    written: Vec<WrittenFile>,
}

#[derive(Debug)]
struct OpenFile {
    output: HashedFile,
    /// Tensors with the bytes they still need, last first.
    tensors: Vec<Due>,
}

/// A tensor that is not complete.
#[derive(Debug)]
struct Due {
    name: String,
    dtype: Dtype,
    left: u64,
}

impl Writer {
    /// Plans `tensors` as [`Plan::new`] does, and begins the first file. `dir` must hold none of
    /// them.
    ///
    /// # Errors
    /// If a name repeats, a size does not fit, or a file cannot be made.
    pub fn create(
        dir: &Path,
        stem: &str,
        tensors: Vec<TensorSpec>,
        max_file_bytes: u64,
        metadata: HashMap<String, String>,
    ) -> Result<Self, WeightsError> {
        let Plan { mut files, index } = Plan::new(dir, stem, tensors, max_file_bytes, metadata)?;
        files.reverse();
        std::fs::create_dir_all(dir).map_err(WeightsError::io(dir, "make the folder"))?;
        Ok(Self {
            dir: dir.to_path_buf(),
            planned: files,
            open: None,
            index,
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
        if values.is_empty() {
            return Ok(());
        }
        let dtype = self.due(name)?;
        let mut bytes = vec![];
        for part in values.chunks(AT_ONCE) {
            encode_f32(dtype, part, &mut bytes).map_err(|found| {
                WeightsError::UnsupportedDtype {
                    dir: self.dir.clone(),
                    name: name.to_string(),
                    found,
                }
            })?;
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
        let due = open.tensors.last_mut().expect("due() found the tensor");
        let (left, got) = (due.left, bytes.len());
        let Some(rest) = left.checked_sub(got as u64) else {
            let problem = format!("tensor {name} needs {left} more bytes, got {got}");
            return Err(self.plan_error(problem));
        };
        due.left = rest;
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
        if let Some((file, index)) = self.index.take() {
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
        Ok(open.expect("advance() found the tensor").dtype)
    }

    /// Passes over complete tensors and files; the name of the tensor that needs data.
    fn advance(&mut self) -> Result<Option<String>, WeightsError> {
        loop {
            if let Some(open) = &mut self.open {
                while let Some(due) = open.tensors.last() {
                    if due.left > 0 {
                        return Ok(Some(due.name.clone()));
                    }
                    open.tensors.pop();
                }
            }
            if let Some(done) = self.open.take() {
                self.written.push(done.output.finish()?);
            }
            let Some(file) = self.planned.pop() else {
                return Ok(None);
            };
            let mut output = HashedFile::create(&self.dir, file.name)?;
            output.write(&file.header)?;
            let tensors = file.tensors.into_iter().rev().map(|tensor| Due {
                name: tensor.name,
                dtype: tensor.dtype,
                left: tensor.bytes,
            });
            let tensors = tensors.collect();
            self.open = Some(OpenFile { output, tensors });
        }
    }

    fn plan_error(&self, problem: String) -> WeightsError {
        WeightsError::Plan {
            dir: self.dir.clone(),
            problem,
        }
    }
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
