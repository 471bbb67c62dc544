//! f32 values as the bytes of a file.

use half::{bf16, f16};
use safetensors::Dtype;

/// Values that are encoded at a time.
pub(crate) const AT_ONCE: usize = 1 << 20;

/// Replaces `out` by `values` as `dtype`, little-endian, rounded to nearest even.
///
/// # Errors
/// `dtype` itself, if it is not F32, F16 or BF16.
pub(crate) fn encode_f32(dtype: Dtype, values: &[f32], out: &mut Vec<u8>) -> Result<(), Dtype> {
    match dtype {
        Dtype::F32 => encode(values, out, f32::to_le_bytes),
        Dtype::F16 => encode(values, out, |x| f16::from_f32(x).to_le_bytes()),
        Dtype::BF16 => encode(values, out, |x| bf16::from_f32(x).to_le_bytes()),
        other => return Err(other),
    }
    Ok(())
}

fn encode<const S: usize>(values: &[f32], out: &mut Vec<u8>, bytes_of: impl Fn(f32) -> [u8; S]) {
    out.resize(values.len() * S, 0);
    let (places, _) = out.as_chunks_mut::<S>();
    for (place, &value) in places.iter_mut().zip(values) {
        *place = bytes_of(value);
    }
}
