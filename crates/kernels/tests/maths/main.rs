//! The maths of every operation, on the CPU and mostly in f64, where a formula that is right agrees
//! to rounding and one that is wrong does not.

mod attention;
mod cross_entropy;
mod pointwise;
mod support;
mod ttt_causality;
mod ttt_documents;
mod ttt_forms;
mod ttt_gradients;
mod ttt_precision;
mod ttt_targets;
