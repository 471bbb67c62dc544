//! In-Place TTT decoders in the LLaMA / Qwen3 family: the maths, and nothing else.
//!
//! Read in this order: [`config`], [`params`], [`rope`], [`attention`], [`ttt`], [`mlp`], [`block`],
//! [`model`], then [`decode`] for generation. [`hf`] is the one place that knows Hugging Face's
//! `config.json`; parameter names are Hugging Face's everywhere.
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

pub mod attention;
pub mod block;
pub mod config;
pub mod decode;
pub mod flops;
pub mod hf;
pub mod mlp;
pub mod model;
pub mod params;
pub mod rope;
pub mod ttt;

pub use block::Block;
pub use config::{ConfigError, LayerType, ModelConfig, ModelType, RopeScaling, Target, TttConfig};
pub use model::{Batch, Embedding, Head};
pub use params::{Init, ParamGroup, ParamSpec, Params, Unit};
