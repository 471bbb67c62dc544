//! Named tensors in folders of safetensors files, as Hugging Face lays them out.
//!
//! [`Folder`] reads one: `model.safetensors`, or several shards and their index. Everything it is
//! given is untrusted: headers, offsets and file names are checked when it opens, before any data
//! is touched. [`Writer`] writes one, a tensor (or a part of one) in memory at a time;
//! [`SharedWriter`] is one of several that write one together. [`atomic_folder`] makes a folder
//! appear whole or not at all.

mod atomic;
mod encode;
mod error;
mod folder;
mod header;
mod index;
mod json;
mod plan;
mod shared;
mod writer;

pub use atomic::{PARTIAL_SUFFIX, Staging, atomic_folder};
pub use error::WeightsError;
pub use folder::{Bytes, Folder, TensorInfo};
pub use index::WeightIndex;
pub use plan::{Plan, TensorSpec};
pub use safetensors::Dtype;
pub use shared::{SharedWriter, WrittenPiece, hash_piece};
pub use writer::{Writer, WrittenFile};

/// Bytes of one element, 0 for types below a byte, which this crate neither reads nor writes.
pub(crate) fn element_bytes(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}
