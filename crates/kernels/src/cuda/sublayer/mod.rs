//! Halves of a decoder block, fused: see [`crate::fused`] for what they compute.
//!
//! T = B·N tokens, S = (H + 2 G) E: queries, keys and values of a token lie in one row.

mod attention;
mod edge;
mod mlp;
mod stacked;
mod ttt;

pub use attention::attention;
pub(super) use mlp::through_swiglu;
pub use mlp::{gated, mlp};
pub use ttt::ttt;
