//! The differentiable operations of an In-Place TTT decoder.
//!
//! Every operation is one file in [`ops`]: its contract, a plain reference form in Burn tensor
//! operations, and a hand-written backward ([`function::Function`]), so that a faster form can take
//! the place of the reference without a change in the model.
//!
//! | letter | dimension |
//! |---|---|
//! | B | rows of a batch |
//! | N | tokens of a row |
//! | D | hidden size |
//! | F | intermediate size |
//! | H, G, E | query heads, key-value heads, head size |
//! | V | vocabulary |
//! | C | tokens of a TTT chunk |

pub mod bench;
pub mod clock;
pub mod context;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod deterministic;
pub mod doctor;
pub mod dtype;
pub mod function;
pub mod fused;
pub mod libraries;
pub mod memory;
pub mod ops;
pub mod packing;
pub mod profile;
pub mod reference;
pub mod testing;
pub mod work;

pub use context::{Context, ContextSettings};
pub use ops::adamw::square_sum;
pub use ops::attention::{AttentionSpec, attention};
pub use ops::cross_entropy::{linear_cross_entropy, token_losses};
pub use ops::embedding::embedding;
pub use ops::linear::linear;
pub use ops::rms_norm::rms_norm;
pub use ops::rope::rope;
pub use ops::seed::backward_from;
pub use ops::swiglu::swiglu;
pub use ops::ttt;
pub use packing::Packing;
