//! Two parts of attention merged ([`crate::ops::attention`]'s `merge`), and gradients added where they lie.

use burn::tensor::{DType, Tensor};

use super::stream::{Arg, Buffer, on_stream};
use crate::ops::attention::merge::LogSumExp;
use crate::work::Work;

/// Tokens whose heads lie one behind the other, and the elements between neighbouring rows and tokens:
/// `[B, N, H, E]` bf16. Such a view is read as it lies, another one copied.
fn tokens(x: &Tensor<4>) -> Option<(Buffer, [u64; 2])> {
    let size = x.dims()[3];
    let lies = Buffer::strided(x)?;
    if lies.dtype() != DType::BF16 || !size.is_multiple_of(8) {
        return None;
    }
    let strides = |b: &Buffer| -> [usize; 4] {
        let strides = b.strides();
        std::array::from_fn(|i| strides[i])
    };
    let by_token = |[row, token, head, element]: [usize; 4]| {
        let whole = [row, token].iter().all(|s| s.is_multiple_of(8));
        (whole && [head, element] == [size, 1]).then_some([row as u64, token as u64])
    };
    if let Some(steps) = by_token(strides(&lies)) {
        return Some((lies, steps));
    }
    let dense = Buffer::of(x)?;
    let heads = x.dims()[2] * size;
    Some((dense, [(x.dims()[1] * heads) as u64, heads as u64]))
}

/// Vectors of eight are read from `addresses`.
fn check(addresses: &[u64]) -> Result<(), String> {
    match addresses.iter().all(|at| at % 16 == 0) {
        true => Ok(()),
        false => Err("attention: tokens that do not begin at a multiple of 16 bytes".into()),
    }
}

/// Where tokens lie in a buffer: the first element, and the elements between neighbouring rows and tokens.
#[derive(Clone, Copy, Debug)]
pub struct Lies {
    pub first: usize,
    pub row: usize,
    pub token: usize,
}

/// Adds `part` `[B, N, H, E]` bf16 to the tokens that lie in `x`, which nobody else reads. Whether it could be.
pub fn add(x: &Buffer, lies: Lies, part: &Tensor<4>) -> bool {
    let [batch, count, heads, size] = part.dims();
    let Some((part, [part_row, part_token])) = tokens(part) else {
        return false;
    };
    let vectors = (batch * count * heads * size / 8) as u64;
    on_stream(&[&part], &[x], |cx, from, to| {
        let first = to[0] + 2 * lies.first as u64;
        check(&[first, from[0]])?;
        let args = [
            Arg::Ptr(first),
            Arg::Ptr(from[0]),
            Arg::Size(vectors),
            Arg::Int(count as i32),
            Arg::Int((heads * size / 8) as i32),
            Arg::Size(lies.row as u64),
            Arg::Size(lies.token as u64),
            Arg::Size(part_row),
            Arg::Size(part_token),
        ];
        // Both are read and one is written, in vectors of 16 bytes.
        cx.doing(Work::Bytes(3.0 * 16.0 * vectors as f64))
            .launch_over("added_tokens", vectors, &args)
    });
    true
}

/// Puts `more`, the values `[B, n, H, E]` bf16 and log-sum-exps `[B, H, n]` f32 that the first n queries have
/// from other keys, into `own` and `sums` where these lie. Whether it could be: not into what somebody else
/// holds, too.
pub fn merge(
    own: Tensor<4>,
    sums: LogSumExp,
    (more, of_more): (&Tensor<4>, &Tensor<3>),
) -> (Tensor<4>, LogSumExp, bool) {
    let ([_, tokens, ..], [batch, count, heads, size]) = (own.dims(), more.dims());
    let LogSumExp { values, by_token } = sums;
    let lie = (Buffer::strided(&own), Buffer::strided(&values));
    let parts = (Buffer::of(more), Buffer::of(of_more));
    let ((Some(to), Some(of_to)), (Some(more), Some(of_more))) = (lie, parts) else {
        return (own, LogSumExp { values, by_token }, false);
    };
    // These two hold them, too.
    drop((own, values));
    // Elements between rows, heads and tokens of the sums.
    let [row, head, token] = match by_token {
        true => [tokens * heads, 1, heads],
        false => [heads * tokens, tokens, 1],
    };
    let dense = to.strides() == [tokens * heads * size, heads * size, size, 1]
        && of_to.strides() == [row, head.max(token), 1];
    let bf16 = [&to, &more].iter().all(|b| b.dtype() == DType::BF16);
    let f32 = [&of_to, &of_more].iter().all(|b| b.dtype() == DType::F32);
    let fits = size.is_multiple_of(8) && size <= MOST_SIZE;
    let done = dense && bf16 && f32 && fits && to.is_ours() && of_to.is_ours();
    if done {
        on_stream(&[&more, &of_more], &[&to, &of_to], |cx, from, at| {
            check(&[from[0], at[0]])?;
            let places = (batch * count * heads) as u64;
            let lanes = (size / 8).next_power_of_two();
            let args = [
                Arg::Ptr(at[0]),
                Arg::Ptr(at[1]),
                Arg::Ptr(from[0]),
                Arg::Ptr(from[1]),
                Arg::Size(places),
                Arg::Int(count as i32),
                Arg::Int(heads as i32),
                Arg::Int(size as i32 / 8),
                Arg::Int(lanes as i32),
                Arg::Size((tokens * heads * size) as u64),
                Arg::Size(row as u64),
                Arg::Size(head as u64),
                Arg::Size(token as u64),
            ];
            // Both are read and one is written.
            cx.doing(Work::Bytes(3.0 * 2.0 * size as f64 * places as f64))
                .launch_over("merged_tokens", places * lanes as u64, &args)
        });
    }
    let values = of_to.tensor();
    (to.tensor(), LogSumExp { values, by_token }, done)
}

/// A warp has a lane for every eight elements of a head.
const MOST_SIZE: usize = 256;
