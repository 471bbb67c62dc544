//! `ttt doctor` and `ttt bench`.

mod args;
mod bench;
mod doctor;

pub use args::BenchArgs;
pub use bench::bench;
pub use doctor::doctor;
