//! CUDA forms of the operations, on the very stream that Burn uses.
//!
//! [`stream`] is the one file that names CubeCL's internals. GEMM is cuBLASLt's, attention cuDNN's, the
//! rest are kernels of our own in CUDA C++ (`source/`), compiled for the present GPU at run time and
//! cached. Every function here returns `None` where it has no form for the given tensors (another
//! backend, another precision, an odd width); the caller then takes the reference form.

pub mod adamw;
pub mod attention;
mod attention_dq;
mod attention_graph;
pub mod attention_merge;
pub mod compile;
pub mod conv;
pub mod cross_entropy;
pub mod cudnn;
pub mod cudnn_plan;
pub mod embedding;
pub mod event;
pub mod flat;
pub mod gemm;
mod gemm_plan;
mod gradient;
mod heads;
mod hopper;
mod hopper_scan;
pub mod linear;
pub mod nccl;
pub mod nccl_group;
pub mod norm;
pub mod pointwise;
pub mod profile;
pub mod scratch;
mod share;
pub mod stream;
pub mod sublayer;
mod tensor_map;
pub mod ttt;

pub use stream::{Arg, Buffer, Context, on_stream};
