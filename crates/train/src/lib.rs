//! The training program and what it is made of.
//!
//! Read [`run`] first: it is the program, from top to bottom. It calls [`step`] for one forward and
//! backward pass and [`optimizer`] for the update; [`units`] holds what is trained.

pub mod agree;
pub mod checkpoint;
pub mod config;
pub mod context;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod flat;
pub mod generate;
pub mod human;
pub mod init;
pub mod interop;
pub mod metrics;
pub mod open;
pub mod optimizer;
pub mod plan;
pub mod profile;
pub mod progress;
pub mod ranks;
mod rehearsal;
mod report;
pub mod run;
pub mod schedule;
pub mod sent;
pub mod signals;
pub mod start;
pub mod step;
pub mod units;

pub use error::TrainError;
