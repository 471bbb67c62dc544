//! The header of a safetensors file: u64 length, JSON, then the data.
//!
//! The safetensors crate's own reader lets a repeated name win silently and overflows on extreme
//! offsets, so the checks are here, on its types, and name the tensor at fault.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::json::{UniqueMap, insert_new};

/// Bytes before the JSON.
pub(crate) const LENGTH_BYTES: u64 = 8;
/// The format's own limit.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor's place in the data that follows the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub begin: u64,
    pub end: u64,
}

/// A sound header.
#[derive(Debug)]
pub(crate) struct Header {
    pub tensors: BTreeMap<String, Entry>,
    pub metadata: HashMap<String, String>,
}

/// Length of the JSON, from the first bytes of a file of `file_bytes`.
pub(crate) fn json_bytes(first: [u8; 8], file_bytes: u64) -> Result<u64, String> {
    let length = u64::from_le_bytes(first);
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "its header claims {length} bytes, the limit is {MAX_HEADER_BYTES}"
        ));
    }
    let room = file_bytes.saturating_sub(LENGTH_BYTES);
    if length > room {
        return Err(format!(
            "its header claims {length} bytes, {room} follow: the file is truncated"
        ));
    }
    Ok(length)
}

/// Reads the JSON and checks that its tensors cover `data_bytes` without holes or overlaps.
pub(crate) fn parse(json: &[u8], data_bytes: u64) -> Result<Header, String> {
    let Listing { tensors, metadata } =
        serde_json::from_slice(json).map_err(|error| format!("its header: {error}"))?;
    let mut by_offset: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
    by_offset.sort_by_key(|(_, info)| info.data_offsets);
    let mut covered = 0;
    for (name, info) in by_offset {
        let (begin, end) = info.data_offsets;
        if end < begin || end as u64 > data_bytes {
            return Err(format!(
                "tensor {name} lies at {begin}..{end}, past the {data_bytes} bytes of data"
            ));
        }
        if begin != covered {
            return Err(format!(
                "tensor {name} begins at {begin} where {covered} is due: data overlaps or has a hole"
            ));
        }
        let bytes = bytes_of(info.dtype, &info.shape)
            .ok_or_else(|| format!("tensor {name} has the impossible shape {:?}", info.shape))?;
        if bytes != end - begin {
            return Err(format!(
                "tensor {name}, {} of shape {:?}, has {} bytes instead of {bytes}",
                info.dtype,
                info.shape,
                end - begin
            ));
        }
        covered = end;
    }
    if covered as u64 != data_bytes {
        return Err(format!(
            "its tensors take {covered} bytes, {data_bytes} are there"
        ));
    }
    let entry = |info: TensorInfo| Entry {
        dtype: info.dtype,
        shape: info.shape,
        begin: info.data_offsets.0 as u64,
        end: info.data_offsets.1 as u64,
    };
    Ok(Header {
        tensors: tensors
            .into_iter()
            .map(|(name, info)| (name, entry(info)))
            .collect(),
        metadata,
    })
}

/// Bytes that a tensor takes; `None` if that is no whole number or does not fit.
pub(crate) fn bytes_of(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(size));
    let bits = elements?.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The JSON's tensors and free-form strings.
struct Listing {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: HashMap<String, String>,
}

impl<'de> Deserialize<'de> for Listing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Listing;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Listing, A::Error> {
                let mut tensors = BTreeMap::new();
                let mut metadata: Option<UniqueMap<String>> = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key != "__metadata__" {
                        insert_new(&mut tensors, key, map.next_value()?)?;
                    } else if metadata.replace(map.next_value()?).is_some() {
                        return Err(serde::de::Error::custom("\"__metadata__\" appears twice"));
                    }
                }
                let metadata = metadata.map(|map| map.0).unwrap_or_default();
                Ok(Listing {
                    tensors,
                    metadata: metadata.into_iter().collect(),
                })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
