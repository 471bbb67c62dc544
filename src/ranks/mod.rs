//! `ttt launch` and `ttt doctor --ranks`, and what a rank of several does before it trains.

mod args;
mod exchanges;
mod launch;
mod ways;

pub use args::{DoctorArgs, LaunchArgs};
pub use exchanges::check;
pub use launch::{end_with_launcher, launch};
