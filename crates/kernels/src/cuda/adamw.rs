//! The fused optimizer step and the sum of squares.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::norm::sum_partials;
use super::stream::{Arg, Buffer, on_stream};
use crate::ops::adamw::{AdamW, Moments};

fn f32(tensor: &Tensor<1>) -> Option<Buffer> {
    Buffer::of(tensor).filter(|b| b.dtype() == DType::F32)
}

/// `buffer` itself if nothing else refers to it, else fresh memory of its size.
fn target(buffer: &Buffer) -> Buffer {
    match buffer.is_ours() {
        true => buffer.clone(),
        false => buffer.empty([buffer.len()], DType::F32),
    }
}

/// See [`crate::ops::adamw::adamw_step`]. In place where the caller gave its only references. The third
/// result is the new weights in bf16, if they are asked for.
#[allow(clippy::too_many_arguments)] // the operands of one formula
#[allow(clippy::result_large_err)] // what cannot be done here goes back by value, not cloned
pub fn step(
    master: Tensor<1>,
    moments: Moments,
    grad: &Tensor<1>,
    decayed: &Range<usize>,
    lr: f64,
    step: u64,
    scale: &Tensor<1>,
    keep: &Tensor<1>,
    hyper: &AdamW,
    copied: bool,
) -> Result<(Tensor<1>, Moments, Option<Tensor<1>>), (Tensor<1>, Moments)> {
    let inputs = (|| Some([f32(grad)?, f32(scale)?, f32(keep)?]))();
    let on_gpu = f32(&master).is_some() && f32(&moments.first).is_some();
    let (Some([grad, scale, keep]), true) = (inputs, on_gpu) else {
        return Err((master, moments));
    };
    let n = master.dims()[0];
    // Each tensor is consumed before its buffer is asked whether it is the only reference.
    let own = |tensor: Tensor<1>| {
        let buffer = Buffer::of(&tensor);
        drop(tensor);
        buffer
    };
    let (Some(w), Some(m), Some(v)) = (own(master), own(moments.first), own(moments.second)) else {
        unreachable!("checked above")
    };
    let outputs = [target(&w), target(&m), target(&v)];
    let constants = [
        hyper.beta1,
        hyper.beta2,
        hyper.eps,
        lr,
        1.0 - lr * hyper.weight_decay,
        1.0 - hyper.beta1.powf(step as f64),
        1.0 - hyper.beta2.powf(step as f64),
    ]
    .map(|c| c as f32);
    let copy = copied.then(|| w.empty([n], DType::BF16));
    let mut writes = outputs.each_ref().to_vec();
    writes.extend(&copy);
    on_stream(
        &[&w, &m, &v, &grad, &scale, &keep],
        &writes,
        |cx, from, to| {
            let args = [
                Arg::Ptr(to[0]),
                Arg::Ptr(to[1]),
                Arg::Ptr(to[2]),
                Arg::Ptr(to.get(3).copied().unwrap_or(0)),
                Arg::Ptr(from[0]),
                Arg::Ptr(from[1]),
                Arg::Ptr(from[2]),
                Arg::Ptr(from[3]),
                Arg::Ptr(from[4]),
                Arg::Ptr(from[5]),
                Arg::Size(n as u64),
                Arg::Size(decayed.start as u64),
                Arg::Size(decayed.end as u64),
                Arg::Floats(constants),
            ];
            cx.launch_over("adamw", (n as u64).div_ceil(4), &args)
        },
    );
    let [w, first, second] = outputs.map(Buffer::tensor);
    Ok((w, Moments { first, second }, copy.map(Buffer::tensor)))
}

/// Blocks of the first pass.
const BLOCKS: usize = 1024;

/// Σ grad²: `[1]`.
pub fn square_sum(grad: &Tensor<1>) -> Option<Tensor<1>> {
    let grad = f32(grad)?;
    let n = grad.len() as u64;
    let out = grad.empty([1], DType::F32);
    let partial = grad.empty([BLOCKS], DType::F32);
    on_stream(&[&grad], &[&out, &partial], |cx, from, to| {
        let args = [Arg::Ptr(to[1]), Arg::Ptr(from[0]), Arg::Size(n)];
        cx.launch("square_sum", (BLOCKS as u32, 1, 1), 512, &args)?;
        sum_partials(cx, to[0], to[1], BLOCKS, 1)
    });
    Some(out.tensor())
}
