//! How ranks exchange tensors.
//!
//! The training step speaks to a [`Mesh`] of [`ProcessGroup`]s only, also on one rank, so that
//! more ranks change no line of it.

mod activity;
mod environment;
mod group;
mod host;
pub mod ledger;
mod mailbox;
mod mesh;
mod single;
pub mod tcp;
pub mod threads;
mod votes;

pub use activity::{Activity, Declared};
pub use environment::Place;
pub use group::{CommError, Pending, ProcessGroup, Receive, part_of};
pub use mesh::{Layout, Mesh};
pub use single::SingleRank;
pub use votes::Votes;
