//! SwiGLU, rotary embedding and sums.

use burn::tensor::{DType, Tensor};

use super::stream::{Arg, Buffer, on_stream};

/// Vectors of eight that all addresses allow.
pub(super) fn vectors(n: usize, addresses: &[u64]) -> u64 {
    match addresses.iter().all(|at| at % 16 == 0) {
        true => n as u64 / 8,
        false => 0,
    }
}

fn bf16<const D: usize>(tensor: &Tensor<D>) -> Option<Buffer> {
    Buffer::of(tensor).filter(|b| b.dtype() == DType::BF16)
}

/// silu(gate) ∘ up: `[n]` bf16.
pub fn swiglu(gate: &Tensor<1>, up: &Tensor<1>) -> Option<Tensor<1>> {
    let (gate, up) = (bf16(gate)?, bf16(up)?);
    let n = gate.len();
    let z = gate.empty([n], DType::BF16);
    on_stream(&[&gate, &up], &[&z], |cx, from, to| {
        let n8 = vectors(n, &[from[0], from[1], to[0]]);
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            Arg::Size(n8),
            Arg::Size(n as u64),
        ];
        cx.launch_over("swiglu_forward", (n as u64).div_ceil(8), &args)
    });
    Some(z.tensor())
}

/// The gradients of gate and up.
pub fn swiglu_backward(
    gate: &Tensor<1>,
    up: &Tensor<1>,
    dz: &Tensor<1>,
) -> Option<(Tensor<1>, Tensor<1>)> {
    let (gate, up, dz) = (bf16(gate)?, bf16(up)?, bf16(dz)?);
    let n = gate.len();
    let (dgate, dup) = (gate.empty([n], DType::BF16), gate.empty([n], DType::BF16));
    on_stream(&[&gate, &up, &dz], &[&dgate, &dup], |cx, from, to| {
        let n8 = vectors(n, &[from[0], from[1], from[2], to[0], to[1]]);
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(to[1]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            Arg::Ptr(from[2]),
            Arg::Size(n8),
            Arg::Size(n as u64),
        ];
        cx.launch_over("swiglu_backward", (n as u64).div_ceil(8), &args)
    });
    Some((dgate.tensor(), dup.tensor()))
}

/// Rotation by `sign` times the tables' angle: x `[B, N, H, E]` bf16; cos, sin `[N, E/2]` f32.
pub fn rope(x: &Tensor<4>, cos: &Tensor<2>, sin: &Tensor<2>, sign: f64) -> Option<Tensor<4>> {
    let [batch, tokens, heads, size] = x.dims();
    let half = size / 2;
    if !half.is_multiple_of(8) || size % 2 != 0 {
        return None;
    }
    let (x, cos, sin) = (bf16(x)?, Buffer::of(cos)?, Buffer::of(sin)?);
    if cos.dtype() != DType::F32 || sin.dtype() != DType::F32 {
        return None;
    }
    let y = x.empty([batch, tokens, heads, size], DType::BF16);
    on_stream(&[&x, &cos, &sin], &[&y], |cx, from, to| {
        let items = (batch * tokens * heads * half / 8) as u64;
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            Arg::Ptr(from[2]),
            Arg::Size(items),
            Arg::Int(tokens as i32),
            Arg::Int(heads as i32),
            Arg::Int(half as i32),
            Arg::Int((heads * size) as i32),
            Arg::Float(sign as f32),
        ];
        cx.launch_over("rope", items, &args)
    });
    Some(y.tensor())
}
