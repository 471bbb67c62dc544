//! How ranks exchange tensors.
//!
//! The training step speaks to a [`Mesh`] of [`ProcessGroup`]s only, also on one rank, so that
//! more ranks change no line of it.

mod group;
mod mesh;
pub mod threads;

pub use group::{CommError, ProcessGroup, SingleRank};
pub use mesh::Mesh;
