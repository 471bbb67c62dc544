//! Tensor maps: what the copy engine of Hopper GPUs needs to know of a matrix.

use burn::tensor::DType;
use cudarc::driver::sys;

use super::stream::Arg;

/// A tensor map of these extents, the innermost first, of `strides` bytes from the second on, in boxes of `part`, in
/// 128-byte swizzle.
///
/// # Errors
/// If the driver takes no such map.
pub fn map<const N: usize>(
    (at, dtype): (u64, DType),
    extents: [usize; N],
    strides: &[usize],
    part: [usize; N],
) -> Result<Arg, String> {
    use sys::{
        CUtensorMapDataType::*, CUtensorMapFloatOOBfill::*, CUtensorMapInterleave::*,
        CUtensorMapL2promotion::*, CUtensorMapSwizzle::*,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let element = match dtype {
        DType::F32 => CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        _ => CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let whole = extents.map(|n| n as u64);
    let strides: Vec<u64> = strides.iter().map(|&n| n as u64).collect();
    let (part, steps) = (part.map(|n| n as u32), [1; N]);
    assert_eq!(strides.len() + 1, N, "a stride from the second extent on");
    // SAFETY: the arrays have as many entries as the rank asks for; the address is one of a buffer that
    // the caller holds until the product is done.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            element,
            N as u32,
            at as *mut _,
            whole.as_ptr(),
            strides.as_ptr(),
            part.as_ptr(),
            steps.as_ptr(),
            CU_TENSOR_MAP_INTERLEAVE_NONE,
            CU_TENSOR_MAP_SWIZZLE_128B,
            CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|e| format!("tensor map of {extents:?} at {at:#x}: {e}"))?;
    Ok(Arg::Map(map.opaque))
}
