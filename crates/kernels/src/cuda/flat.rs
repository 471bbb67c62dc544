//! Gradients into one flat buffer.

use burn::tensor::{DType, Tensor};

use super::stream::{Arg, Buffer, on_stream};
use crate::ops::flat::Part;

/// See [`crate::ops::flat::accumulate`]; `sum` comes back where there is no form for the parts.
#[allow(clippy::result_large_err)] // what cannot be done here goes back by value, not cloned
pub fn accumulate(
    sum: Option<Tensor<1>>,
    parts: &[Part],
    len: usize,
) -> Result<Tensor<1>, Option<Tensor<1>>> {
    let buffers: Option<Vec<Option<Buffer>>> = parts
        .iter()
        .map(|part| match part {
            Part::Values(values) => Buffer::of(values)
                .filter(|b| matches!(b.dtype(), DType::F32 | DType::BF16))
                .map(Some),
            Part::Zeros(_) => Some(None),
        })
        .collect();
    let Some(buffers) = buffers else {
        return Err(sum);
    };
    let adds = sum.is_some();
    let old = match sum {
        None => None,
        Some(sum) => {
            let buffer = Buffer::of(&sum);
            match buffer.filter(|b| b.dtype() == DType::F32) {
                // The buffer is asked below whether it is the only reference.
                Some(buffer) => {
                    drop(sum);
                    Some(buffer)
                }
                None => return Err(Some(sum)),
            }
        }
    };
    let Some(like) = buffers.iter().flatten().next().or(old.as_ref()) else {
        return Err(None);
    };
    let out = match &old {
        Some(old) if old.is_ours() => old.clone(),
        _ => like.empty([len], DType::F32),
    };
    let mut reads: Vec<&Buffer> = buffers.iter().flatten().collect();
    reads.extend(&old);
    on_stream(&reads, &[&out], |cx, from, to| {
        if let (true, Some(&at)) = (adds, from.last())
            && at != to[0]
        {
            cx.copy(to[0], at, 4 * len)?;
        }
        let mut addresses = from.iter();
        let mut at = to[0];
        for (part, buffer) in parts.iter().zip(&buffers) {
            let n = part.len();
            match buffer {
                Some(buffer) => {
                    let source = addresses.next().ok_or("a part without an address")?;
                    let args = [
                        Arg::Ptr(at),
                        Arg::Ptr(*source),
                        Arg::Int(i32::from(buffer.dtype() == DType::F32)),
                        Arg::Int(i32::from(adds)),
                        Arg::Size(super::pointwise::vectors(n, &[at, *source])),
                        Arg::Size(n as u64),
                    ];
                    cx.launch_over("accumulate", (n as u64).div_ceil(8), &args)?;
                }
                None if adds => {}
                None => cx.zero(at, 4 * n)?,
            }
            at += 4 * n as u64;
        }
        Ok(())
    });
    Ok(out.tensor())
}
