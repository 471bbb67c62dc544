//! Gradients into one flat buffer.

use burn::tensor::{DType, Tensor};

use super::gradient::{Gradient, Table};
use super::stream::{Arg, Buffer, on_stream};
use crate::ops::flat::Part;
use crate::work::Work;

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
    let gradient = Gradient::of(parts);
    let mut reads: Vec<&Buffer> = buffers.iter().flatten().collect();
    reads.extend(&old);
    on_stream(&reads, &[&out], |cx, from, to| {
        if let (true, Some(&at)) = (adds, from.last())
            && at != to[0]
        {
            cx.copy(to[0], at, 4 * len)?;
        }
        // A launch for many parts where they can be read in vectors; else one each.
        if let Some(gradient) = &gradient {
            let tables = gradient.tables(from)?;
            if to[0].is_multiple_of(16) && tables.iter().all(Table::is_aligned) {
                for table in tables {
                    let count = table.count();
                    let args = [Arg::Ptr(to[0]), table.arg(), Arg::Int(i32::from(adds))];
                    let sums = if adds { 8.0 } else { 4.0 };
                    cx.doing(Work::Bytes(table.bytes() + sums * count as f64))
                        .launch_over("accumulate_parts", (count as u64).div_ceil(4), &args)?;
                }
                return Ok(());
            }
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
