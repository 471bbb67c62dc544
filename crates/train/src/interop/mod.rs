//! Weights of other programs in, ours out: folders as Hugging Face lays them out.
//!
//! Names and shapes are the same on both sides, so nothing is renamed and nothing transposed;
//! [`HfFolder`] checks what a folder claims, [`InitFrom`] says where every parameter of a model
//! comes from before anything big is read, [`import`] makes a checkpoint of a folder and
//! [`export`] a folder of a checkpoint. All of them hold a few megabytes or one tensor at a time,
//! never a model.

mod copy;
mod error;
mod export;
mod hf_folder;
mod import;
mod init_from;
mod side_files;

pub use error::InteropError;
pub use export::{ExportDtype, ExportOptions, Exported, export};
pub use hf_folder::{HfFolder, base_config};
pub use import::import;
pub use init_from::InitFrom;
pub use side_files::side_files;
