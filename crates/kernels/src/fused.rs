//! Halves of a decoder block as one operation each, where the device has such a form.
//!
//! Composed of single operations, a block writes its norms, its rotated heads and every sum to memory
//! and keeps most of that for the backward pass. Here a half is one node of the tape: it keeps its
//! input and what a matrix product made, forms the rest again, and adds residuals and their gradients
//! on the way. Every function returns `None` where there is no such form (another device or precision,
//! odd sizes); the caller then composes the same maths from `crate`'s operations.

use burn::tensor::Tensor;

use crate::AttentionSpec;
use crate::ops::ttt::{Scan, ScanSpec};

/// The parameters of the attention half.
#[derive(Clone, Debug)]
pub struct AttentionWeights<'a> {
    /// Gain of the norm before it: `[D]`.
    pub norm: &'a Tensor<1>,
    /// `[H·E, D]`
    pub q: &'a Tensor<2>,
    /// `[G·E, D]`
    pub k: &'a Tensor<2>,
    /// `[G·E, D]`
    pub v: &'a Tensor<2>,
    /// `[D, H·E]`
    pub o: &'a Tensor<2>,
    /// Gains of queries and keys, where they are normalised per head: `[E]` each.
    pub qk_norm: Option<(&'a Tensor<1>, &'a Tensor<1>)>,
    /// E
    pub head_size: usize,
    /// Added to the mean square in every norm.
    pub eps: f64,
}

/// The parameters that make Z of the MLP half.
#[derive(Clone, Debug)]
pub struct GateWeights<'a> {
    /// Gain of the norm before it: `[D]`.
    pub norm: &'a Tensor<1>,
    /// `[F, D]`
    pub gate: &'a Tensor<2>,
    /// `[F, D]`
    pub up: &'a Tensor<2>,
    /// Added to the mean square in the norm.
    pub eps: f64,
}

/// `x + attention(rope(q), rope(k), v) W_oᵀ` with q, k, v the projections of `rms_norm(x)`:
/// x `[B, N, D]`; cos, sin `[N, E/2]` f32 → `[B, N, D]`.
pub fn attention_sublayer(
    x: &Tensor<3>,
    weights: &AttentionWeights,
    (cos, sin): (&Tensor<2>, &Tensor<2>),
    spec: &AttentionSpec,
) -> Option<Tensor<3>> {
    if spec.lacks_context() {
        return None; // refused by the operation that stands for it
    }
    #[cfg(feature = "cuda")]
    return crate::cuda::sublayer::attention(x, weights, (cos, sin), spec);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (x, weights, cos, sin, spec);
        None
    }
}

/// `x + swiglu(rms_norm(x)) W_downᵀ`: x `[B, N, D]`, down `[D, F]` → `[B, N, D]`.
pub fn mlp_sublayer(x: &Tensor<3>, weights: &GateWeights, down: &Tensor<2>) -> Option<Tensor<3>> {
    #[cfg(feature = "cuda")]
    return crate::cuda::sublayer::mlp(x, weights, down);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (x, weights, down);
        None
    }
}

/// `Z = silu(n W_gateᵀ) ∘ (n W_upᵀ)` with n = `rms_norm(x)`: x `[B, N, D]` → `[B, N, F]`.
pub fn gated(x: &Tensor<3>, weights: &GateWeights) -> Option<Tensor<3>> {
    #[cfg(feature = "cuda")]
    return crate::cuda::sublayer::gated(x, weights);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (x, weights);
        None
    }
}

/// `x + scan(Z, v, w0)` with Z as in [`gated`]: x, v `[B, N, D]`, w0 `[D, F]`. v is asked for where there is
/// such a form.
///
/// # Panics
/// If `spec` is not of x's rows.
pub fn ttt_sublayer(
    x: &Tensor<3>,
    weights: &GateWeights,
    v: impl FnOnce() -> Tensor<3>,
    w0: &Tensor<2>,
    spec: &ScanSpec,
) -> Option<Scan> {
    spec.check(x, x.is_tracked());
    #[cfg(feature = "cuda")]
    return crate::cuda::sublayer::ttt(x, weights, v, w0, spec);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (weights, v, w0);
        None
    }
}
