//! Parquet: one text column, read in batches of rows.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::decompress;
use super::discover::{Compression, InputFile};
use super::read::{Content, Event, RawDocument, ReadOptions, Sink};
use crate::guard::guarded;
use crate::{BadRecords, DataError};

/// Rows decoded at a time.
const BATCH_ROWS: usize = 256;

/// Hands out the rows of column `column` of `file`.
pub(super) fn read(
    file: &InputFile,
    column: &str,
    options: &ReadOptions,
    sink: &mut Sink<'_>,
) -> Result<bool, DataError> {
    let path: Arc<str> = file.path.to_string_lossy().into();
    let (mut batches, rows) = decoding(file, || open(file, column, options))??;
    let mut row = 0;
    while let Some(batch) = decoding(file, || batches.next())? {
        let batch: RecordBatch = batch.map_err(|error| unreadable(file, error))?;
        for text in strings(batch.column(0)) {
            row += 1;
            let event = match text {
                Some(text) => {
                    let content = Content::Text(text.to_string());
                    Event::Document(RawDocument {
                        content,
                        path: Arc::clone(&path),
                        line: row,
                    })
                }
                None if options.bad_records == BadRecords::Skip => Event::BadRecord,
                None => {
                    return Err(DataError::MissingText {
                        location: format!("{path}, row {row}"),
                        key: column.to_string(),
                        found: "it holds null".into(),
                    });
                }
            };
            if !sink(event)? {
                return Ok(false);
            }
        }
        let share = file.bytes as f64 * batch.num_rows() as f64 / rows.max(1) as f64;
        options
            .bytes_read
            .fetch_add(share as u64, Ordering::Relaxed);
    }
    Ok(true)
}

/// The decoder's batches of the one column, and the number of rows.
fn open(
    file: &InputFile,
    column: &str,
    options: &ReadOptions,
) -> Result<(ParquetRecordBatchReader, i64), DataError> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(plain_file(file, options)?)
        .map_err(|error| unreadable(file, error))?;
    let fields = builder.schema().fields();
    let missing = |found: String| DataError::MissingText {
        location: file.path.display().to_string(),
        key: column.to_string(),
        found,
    };
    let Some((index, field)) = fields.find(column) else {
        let names: Vec<_> = fields.iter().map(|field| field.name().as_str()).collect();
        return Err(missing(format!("the columns are {}", names.join(", "))));
    };
    if !is_text(field.data_type()) {
        return Err(missing(format!("the column holds {}", field.data_type())));
    }
    let rows = builder.metadata().file_metadata().num_rows();
    let mask = ProjectionMask::roots(builder.parquet_schema(), [index]);
    let batches = builder
        .with_projection(mask)
        .with_batch_size(BATCH_ROWS)
        .build()
        .map_err(|error| unreadable(file, error))?;
    Ok((batches, rows))
}

/// Parquet is read from its end, so a compressed file is unpacked to a temporary one first.
fn plain_file(file: &InputFile, options: &ReadOptions) -> Result<File, DataError> {
    if file.compression == Compression::None {
        return File::open(&file.path).map_err(DataError::io(&file.path, "open"));
    }
    let mut plain = tempfile::tempfile().map_err(DataError::io(
        &std::env::temp_dir(),
        "create a temporary file to unpack parquet",
    ))?;
    let unpack = ReadOptions {
        bytes_read: Default::default(),
        ..options.clone()
    };
    let mut packed = decompress::open(file, &unpack.bytes_read)?;
    std::io::copy(&mut packed, &mut plain)
        .map_err(DataError::io(&file.path, "unpack to a temporary file"))?;
    Ok(plain)
}

fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, value) => is_text(value),
        _ => false,
    }
}

/// The rows of a text column (`is_text` holds for its type).
fn strings(array: &ArrayRef) -> Vec<Option<String>> {
    let owned = |text: Option<&str>| text.map(str::to_string);
    match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().iter().map(owned).collect(),
        DataType::LargeUtf8 => array.as_string::<i64>().iter().map(owned).collect(),
        DataType::Utf8View => array.as_string_view().iter().map(owned).collect(),
        _ => {
            let dictionary = array.as_any_dictionary();
            let values = strings(dictionary.values());
            let keys = dictionary.normalized_keys();
            (0..array.len())
                .map(|row| {
                    if array.is_null(row) {
                        None
                    } else {
                        values.get(keys[row]).cloned().flatten()
                    }
                })
                .collect()
        }
    }
}

fn unreadable(file: &InputFile, error: impl std::fmt::Display) -> DataError {
    DataError::Parquet {
        path: file.path.clone(),
        reason: error.to_string(),
    }
}

/// Damaged files can make the decoder panic; here that is an error like any other.
fn decoding<T>(file: &InputFile, decode: impl FnOnce() -> T) -> Result<T, DataError> {
    guarded(decode).ok_or_else(|| unreadable(file, "the decoder gave up on damaged content"))
}
