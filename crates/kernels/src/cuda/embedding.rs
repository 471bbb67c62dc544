//! Embedding rows and their gradient.

use burn::tensor::{DType, Int, Tensor};

use super::stream::{Arg, Buffer, on_stream};

/// Tokens that a block puts in order.
const PIECE: usize = 1024;
/// Rows of the vocabulary, and columns, of a block that adds.
const ROWS: usize = 8;
const COLUMNS: usize = 256;

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

/// The gradient `[V, D]` f32 of dy `[T, D]` bf16; the same sums in the same order each time.
pub fn backward(ids: &Tensor<1, Int>, dy: &Tensor<2>, vocab: usize) -> Option<Tensor<2>> {
    let dy = Buffer::of(dy).filter(|b| b.dtype() == DType::BF16)?;
    let (tokens, width) = (dy.dims()[0], dy.dims()[1]);
    let (ids, wide) = ids_of(ids)?;
    if !width.is_multiple_of(8) || tokens > i32::MAX as usize {
        return None;
    }
    let dw = dy.empty([vocab, width], DType::F32);
    let pieces = tokens.div_ceil(PIECE);
    let counts = dy.empty([pieces, vocab], DType::I32);
    let [totals, starts, order] = [vocab, vocab + 1, tokens].map(|n| dy.empty([n], DType::I32));
    on_stream(
        &[&ids, &dy],
        &[&dw, &counts, &totals, &starts, &order],
        |cx, from, to| {
            let [ids, dy] = [0, 1].map(|i| Arg::Ptr(from[i]));
            let [dw, counts, totals, starts, order] = [0, 1, 2, 3, 4].map(|i| Arg::Ptr(to[i]));
            let int = |n: usize| Arg::Int(n as i32);
            let by_piece = (pieces as u32, 1, 1);
            let args = [counts, ids, wide, int(tokens), int(vocab)];
            cx.launch("embedding_count", by_piece, PIECE as u32, &args)?;
            let args = [counts, totals, int(pieces), int(vocab)];
            cx.launch(
                "embedding_before",
                (vocab.div_ceil(256) as u32, 1, 1),
                256,
                &args,
            )?;
            let args = [starts, totals, int(vocab)];
            cx.launch("embedding_starts", (1, 1, 1), 1024, &args)?;
            let args = [order, counts, starts, ids, wide, int(tokens), int(vocab)];
            cx.launch("embedding_order", by_piece, PIECE as u32, &args)?;
            let blocks = (
                vocab.div_ceil(ROWS) as u32,
                width.div_ceil(COLUMNS) as u32,
                1,
            );
            let args = [dw, order, starts, dy, int(vocab), int(width)];
            cx.launch("embedding_backward", blocks, 32 * ROWS as u32, &args)
        },
    );
    Some(dw.tensor())
}
