//! One file per operation: contract, reference form, backward.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod embedding;
pub mod flat;
pub mod linear;
pub mod master;
pub mod rms_norm;
pub mod rope;
pub mod seed;
pub mod swiglu;
pub mod ttt;
