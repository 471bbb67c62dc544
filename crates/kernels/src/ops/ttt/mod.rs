//! In-Place TTT: the down projection whose weight learns while the model reads.
//!
//! Over the chunks i of a document, `W_i = W_0 + η Σ_{j<i} V_jᵀ Z_j` and `O_i = Z_i W_iᵀ`
//! (`docs/in-place-ttt.md`, section 1; section 3.4 of the paper with the exclusive sum of its text, not the inclusive
//! one of its algorithm 1). `V = conv(X) W_t`, the convolution cut at chunk and document edges.
//! The state `S = Σ V_jᵀ Z_j` is kept in f32 and the weight is rounded once per chunk; the
//! backward pass peels the same sums off again, so that two D×F buffers serve any number of chunks.

pub mod carry;
mod conv;
pub mod oracle;
mod scan;
mod targets;

pub use conv::{chunk_conv, shift_targets};
#[cfg(feature = "cuda")]
pub(crate) use scan::{FastWeightScan, Gradients, Outcome, Saved};
pub use scan::{Scan, ScanSpec, apply_state, fast_weight_scan, outer_update};
pub use targets::targets;
