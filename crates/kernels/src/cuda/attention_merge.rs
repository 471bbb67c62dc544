//! Tokens turned round, and two parts of attention merged ([`crate::ops::attention`]'s `merge`).

use burn::tensor::{DType, Tensor};

use super::stream::{Arg, Buffer, on_stream};
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

/// x `[B, N, H, E]` bf16 with the last token first.
pub fn turned(x: &Tensor<4>) -> Option<Tensor<4>> {
    let [batch, count, heads, size] = x.dims();
    let (x, [row, token]) = tokens(x)?;
    let y = x.empty([batch, count, heads, size], DType::BF16);
    on_stream(&[&x], &[&y], |cx, from, to| {
        check(&[from[0], to[0]])?;
        let vectors = (batch * count * heads * size / 8) as u64;
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(from[0]),
            Arg::Size(vectors),
            Arg::Int(count as i32),
            Arg::Int((heads * size / 8) as i32),
            Arg::Size(row),
            Arg::Size(token),
        ];
        cx.launch_over("turned_tokens", vectors, &args)
    });
    Some(y.tensor())
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

/// Values `[B, N, H, E]` bf16 and log-sum-exps `[B, H, N]` f32 of two parts, the second with its tokens
/// turned round: those of all keys.
pub fn merged(
    (first, of_first): (&Tensor<4>, &Tensor<3>),
    (second, of_second): (&Tensor<4>, &Tensor<3>),
) -> Option<(Tensor<4>, Tensor<3>)> {
    let [batch, count, heads, size] = first.dims();
    let (first, [row, token]) = tokens(first)?;
    let second = Buffer::of(second).filter(|b| b.dtype() == DType::BF16)?;
    let sums = |x: &Tensor<3>| Buffer::of(x).filter(|b| b.dtype() == DType::F32);
    let (of_first, of_second) = (sums(of_first)?, sums(of_second)?);
    let y = first.empty([batch, count, heads, size], DType::BF16);
    let of_both = first.empty([batch, heads, count], DType::F32);
    let reads = [&first, &of_first, &second, &of_second];
    on_stream(&reads, &[&y, &of_both], |cx, from, to| {
        check(&[from[0], from[2], to[0]])?;
        let vectors = (batch * count * heads * size / 8) as u64;
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(to[1]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            Arg::Ptr(from[2]),
            Arg::Ptr(from[3]),
            Arg::Size(vectors),
            Arg::Int(count as i32),
            Arg::Int(heads as i32),
            Arg::Int(size as i32 / 8),
            Arg::Size(row),
            Arg::Size(token),
        ];
        cx.launch_over("attention_merged", vectors, &args)
    });
    Some((y.tensor(), of_both.tensor()))
}
