//! Comparing an operation with its reference.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// ‖a − b‖ / ‖b‖ over all elements, in f64; 0 for two zero tensors, infinite if only b is zero, NaN
/// if either holds a NaN.
pub fn relative_error<const R: usize>(a: &Tensor<R>, b: &Tensor<R>) -> f64 {
    assert_eq!(a.dims(), b.dims(), "tensors of different shapes");
    relative_error_of(&values(a), &values(b))
}

/// [`relative_error`] of two slices of equal length.
pub fn relative_error_of(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "slices of different lengths");
    let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    match (difference, norm(&mut b.iter().copied())) {
        (0.0, 0.0) => 0.0,
        (difference, scale) => difference / scale,
    }
}

/// The elements in row-major order, in f64.
pub fn values<const R: usize>(t: &Tensor<R>) -> Vec<f64> {
    t.to_data()
        .convert::<f64>()
        .try_into_vec()
        .expect("converted to f64")
}

/// Standard normal values from `seed`, times `scale`; the same on every device.
pub fn normal<const R: usize>(
    shape: [usize; R],
    scale: f64,
    seed: u64,
    device: &Device,
    dtype: DType,
) -> Tensor<R> {
    // splitmix64: enough for test inputs, and needs no generator state elsewhere.
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    // Mixed once more, since its streams from neighbouring seeds are one stream shifted.
    let mut state = mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15));
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        (mix(state) >> 11) as f64 / (1u64 << 53) as f64
    };
    let count = shape.iter().product();
    let data: Vec<f64> = (0..count)
        .map(|_| {
            let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
            scale * radius * (std::f64::consts::TAU * uniform()).cos()
        })
        .collect();
    Tensor::from_data(TensorData::new(data, shape), (device, dtype))
}
