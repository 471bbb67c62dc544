//! The chunk-local convolution of TTT targets, and its gradients.

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::norm::sum_partials;
use super::stream::{Arg, Buffer, on_stream};
use crate::packing::Packing;

/// Tokens of a thread; as in the source.
const RUN: usize = 32;

/// Warps of a block of the weight's gradient, each with tokens of its own, and its channels; as in the source.
const WARPS: usize = 8;
const CHANNELS: usize = 128;

struct Conv {
    batch: usize,
    tokens: usize,
    d: usize,
    /// Where each token's document begins: `[B, N]`; `None` where rows are one document.
    document: Option<Buffer>,
}

fn conv(x: &Buffer, weight: &Buffer, packing: &Packing) -> Option<Conv> {
    let (dims, w) = (x.dims(), weight.dims());
    let types = x.dtype() == DType::BF16 && matches!(weight.dtype(), DType::BF16 | DType::F32);
    if !types || w[2] != 5 || !dims[2].is_multiple_of(8) {
        return None;
    }
    let document = match packing.is_whole_rows() {
        true => None,
        false => {
            let device = x.clone().tensor::<3>().device();
            let all: Vec<i32> = (0..dims[0])
                .flat_map(|row| packing.document_start(row))
                .collect();
            let data = TensorData::new(all, [dims[0], dims[1]]);
            let starts = Tensor::<2, Int>::from_data(data, (&device, DType::I32));
            Some(Buffer::of_ints(&starts)?)
        }
    };
    Some(Conv {
        batch: dims[0],
        tokens: dims[1],
        d: dims[2],
        document,
    })
}

/// The convolution (`sign` 1) or its transpose (−1): x `[B, N, D]` bf16, weight `[D, 1, 5]`.
pub fn apply(
    x: &Tensor<3>,
    weight: &Tensor<3>,
    packing: &Packing,
    chunk: usize,
    sign: i32,
) -> Option<Tensor<3>> {
    let (x, weight) = (Buffer::of(x)?, Buffer::of(weight)?);
    let c = conv(&x, &weight, packing)?;
    let y = x.empty([c.batch, c.tokens, c.d], DType::BF16);
    let mut reads = vec![&x, &weight];
    reads.extend(&c.document);
    on_stream(&reads, &[&y], |cx, from, to| {
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            Arg::Int(i32::from(weight.dtype() == DType::F32)),
            Arg::Ptr(from.get(2).copied().unwrap_or(0)),
            Arg::Int(c.tokens as i32),
            Arg::Int(chunk as i32),
            Arg::Int(c.d as i32),
            Arg::Int(sign),
        ];
        let runs = c.tokens.div_ceil(RUN);
        let grid = (c.d.div_ceil(1024) as u32, runs as u32, c.batch as u32);
        cx.launch("conv_apply", grid, 128, &args)
    });
    Some(y.tensor())
}

/// The gradient of the weight, `[D, 1, 5]` f32.
pub fn weight_gradient(
    x: &Tensor<3>,
    weight: &Tensor<3>,
    du: &Tensor<3>,
    packing: &Packing,
    chunk: usize,
) -> Option<Tensor<3>> {
    let (x, weight, du) = (Buffer::of(x)?, Buffer::of(weight)?, Buffer::of(du)?);
    let c = conv(&x, &weight, packing)?;
    if du.dtype() != DType::BF16 {
        return None;
    }
    let runs = c.tokens.div_ceil(WARPS * RUN);
    let groups = runs * c.batch;
    let partial = x.empty([groups, c.d, 1, 5], DType::F32);
    let dw = x.empty([c.d, 1, 5], DType::F32);
    let mut reads = vec![&x, &du];
    reads.extend(&c.document);
    on_stream(&reads, &[&dw, &partial], |cx, from, to| {
        let args = [
            Arg::Ptr(to[1]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            Arg::Ptr(from.get(2).copied().unwrap_or(0)),
            Arg::Int(c.tokens as i32),
            Arg::Int(chunk as i32),
            Arg::Int(c.d as i32),
        ];
        let across = c.d.div_ceil(CHANNELS) as u32;
        let grid = (across, runs as u32, c.batch as u32);
        cx.launch("conv_weight_grad", grid, 32 * WARPS as u32, &args)?;
        sum_partials(cx, to[0], to[1], groups, c.d * 5)
    });
    Some(dw.tensor())
}
