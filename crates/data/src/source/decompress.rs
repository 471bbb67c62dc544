//! Opens a file as a stream of plain bytes and counts what is read from disk.

use std::fs::File;
use std::io::{BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::discover::{Compression, InputFile};
use crate::DataError;

/// Bytes read from input files so far, as they lie on disk: what the progress bar shows.
pub(crate) type BytesRead = Arc<AtomicU64>;

struct Counting<R> {
    inner: R,
    read: BytesRead,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// The plain bytes of `file`.
pub(crate) fn open(file: &InputFile, read: &BytesRead) -> Result<Box<dyn Read + Send>, DataError> {
    let raw = File::open(&file.path).map_err(DataError::io(&file.path, "open"))?;
    let raw = Counting {
        inner: raw,
        read: Arc::clone(read),
    };
    Ok(match file.compression {
        Compression::None => Box::new(raw),
        // Files made by concatenation have several members; both decoders go on to the next.
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(
            BufReader::with_capacity(1 << 17, raw),
        )),
        Compression::Zstd => Box::new(
            zstd::Decoder::new(raw).map_err(DataError::io(&file.path, "start decompressing"))?,
        ),
    })
}
