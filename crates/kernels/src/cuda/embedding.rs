//! Embedding rows and their gradient.

use burn::tensor::{DType, Int, Tensor};

use super::stream::{Arg, Buffer, on_stream};

/// Vocabulary rows that one block of the gradient kernel owns.
const OWNED: usize = 32;

fn ids_of(ids: &Tensor<1, Int>) -> Option<(Buffer, Arg)> {
    let ids = Buffer::of_ints(ids)?;
    match ids.dtype() {
        DType::I64 => Some((ids, Arg::Int(1))),
        DType::I32 => Some((ids, Arg::Int(0))),
        _ => None,
    }
}

/// Rows `ids` `[T]` of weight `[V, D]` as bf16 `[T, D]`.
pub fn forward(ids: &Tensor<1, Int>, weight: &Tensor<2>) -> Option<Tensor<2>> {
    let weight = Buffer::of(weight)?;
    let width = weight.dims()[1];
    let f32 = match weight.dtype() {
        DType::F32 => 1,
        DType::BF16 => 0,
        _ => return None,
    };
    let (ids, wide) = ids_of(ids)?;
    if !width.is_multiple_of(8) {
        return None;
    }
    let tokens = ids.len();
    let y = weight.empty([tokens, width], DType::BF16);
    on_stream(&[&ids, &weight], &[&y], |cx, from, to| {
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(from[0]),
            wide,
            Arg::Ptr(from[1]),
            Arg::Int(f32),
            Arg::Int(tokens as i32),
            Arg::Int(width as i32),
        ];
        cx.launch_over("embedding_forward", (tokens * width / 8) as u64, &args)
    });
    Some(y.tensor())
}

/// The gradient `[V, D]` f32 of dy `[T, D]` bf16, summed in token order.
pub fn backward(ids: &Tensor<1, Int>, dy: &Tensor<2>, vocab: usize) -> Option<Tensor<2>> {
    let dy = Buffer::of(dy).filter(|b| b.dtype() == DType::BF16)?;
    let (tokens, width) = (dy.dims()[0], dy.dims()[1]);
    let (ids, wide) = ids_of(ids)?;
    // Token numbers are packed with OWNED into 31 bits.
    if !width.is_multiple_of(8) || tokens >= i32::MAX as usize / OWNED {
        return None;
    }
    let dw = dy.empty([vocab, width], DType::F32);
    on_stream(&[&ids, &dy], &[&dw], |cx, from, to| {
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(from[0]),
            wide,
            Arg::Ptr(from[1]),
            Arg::Int(tokens as i32),
            Arg::Int(vocab as i32),
            Arg::Int(width as i32),
        ];
        let blocks = vocab.div_ceil(OWNED) as u32;
        cx.launch("embedding_backward", (blocks, 1, 1), 256, &args)
    });
    Some(dw.tensor())
}
