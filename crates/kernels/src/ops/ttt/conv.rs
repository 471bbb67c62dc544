//! The depthwise convolution that mixes a token's neighbours into its target.

use burn::tensor::{Device, Tensor, TensorData};

use crate::dtype::{cast, widen};
use crate::function::{Forward, Function, Value, apply};
use crate::packing::Packing;

/// `U[t] = Σ_k κ[k] X[t + k − K/2]`, each channel with its own taps, taking only tokens of the same
/// document and chunk: x `[B, N, D]`, weight `[D, 1, K]` (K odd) → `[B, N, D]`.
///
/// Cut at chunk edges, because a tap that reaches into the next chunk would put a token's own label
/// into the weight that predicts it (docs/in-place-ttt.md, section 3).
pub fn chunk_conv(x: Tensor<3>, weight: Tensor<3>, packing: &Packing, chunk: usize) -> Tensor<3> {
    let conv = ChunkConv::new(packing, chunk);
    apply(conv, [x.into(), weight.into()]).tensor()
}

/// The next token of the same document and chunk in each place, zero where there is none:
/// x `[B, N, D]`. The target `V = X_{t+1}` without a learned convolution.
pub fn shift_targets(x: Tensor<3>, packing: &Packing, chunk: usize) -> Tensor<3> {
    let inside = same_piece(packing, chunk, 1, &x.device());
    let mask = cast(inside, x.dtype());
    shift(x, 1) * mask
}

fn offset(tap: usize, taps: usize) -> isize {
    tap as isize - (taps / 2) as isize
}

/// 1 where token t + `offset` lies in the same document and chunk as token t: `[B, N, 1]`.
fn same_piece(packing: &Packing, chunk: usize, offset: isize, device: &Device) -> Tensor<3> {
    let length = packing.length();
    let mut inside = vec![0f32; packing.rows().len() * length];
    for (row, mask) in inside.chunks_mut(length).enumerate() {
        for piece in packing.pieces(row, chunk) {
            for t in piece.range.clone() {
                let other = t.checked_add_signed(offset);
                mask[t] = f32::from(u8::from(other.is_some_and(|o| piece.range.contains(&o))));
            }
        }
    }
    let shape = [packing.rows().len(), length, 1];
    let device = device.clone().without_autodiff();
    Tensor::from_data(TensorData::new(inside, shape), &device)
}

/// `out[t] = x[t + offset]`, zero outside the row.
fn shift(x: Tensor<3>, offset: isize) -> Tensor<3> {
    let [batch, tokens, width] = x.dims();
    let by = offset.unsigned_abs().min(tokens);
    if by == 0 {
        return x;
    }
    let gap = Tensor::zeros([batch, by, width], (&x.device(), x.dtype()));
    match offset > 0 {
        true => Tensor::cat(vec![x.slice([0..batch, by..tokens]), gap], 1),
        false => Tensor::cat(vec![gap, x.slice([0..batch, 0..tokens - by])], 1),
    }
}

/// [`chunk_conv`] as a function.
#[derive(Debug)]
pub(super) struct ChunkConv {
    packing: Packing,
    chunk: usize,
}

impl ChunkConv {
    pub fn new(packing: &Packing, chunk: usize) -> Self {
        let packing = packing.clone();
        Self { packing, chunk }
    }

    /// One mask `[B, N, 1]` per tap.
    fn masks(&self, taps: usize, device: &Device) -> Vec<Tensor<3>> {
        (0..taps)
            .map(|k| same_piece(&self.packing, self.chunk, offset(k, taps), device))
            .collect()
    }
}

/// Tap k's token for each place, in f32: `[B, N, D]`.
fn tapped(x: &Tensor<3>, inside: &[Tensor<3>], k: usize) -> Tensor<3> {
    let mask = cast(inside[k].clone(), x.dtype());
    shift(x.clone(), offset(k, inside.len())) * mask
}

/// Tap k's weight: `[1, 1, D]`.
fn tap(weight: &Tensor<3>, k: usize) -> Tensor<3> {
    let channels = weight.dims()[0];
    weight
        .clone()
        .slice([0..channels, 0..1, k..k + 1])
        .reshape([1, 1, channels])
}

impl Function<2> for ChunkConv {
    type Saved = (Tensor<3>, Tensor<3>);

    fn forward(&self, [x, weight]: [Value; 2]) -> Forward<Self::Saved> {
        let (x, weight) = (x.tensor::<3>(), weight.tensor::<3>());
        #[cfg(feature = "cuda")]
        if let Some(u) = crate::cuda::conv::apply(&x, &weight, &self.packing, self.chunk, 1) {
            return Forward {
                output: u.into(),
                extra: vec![],
                saved: (x, weight),
            };
        }
        let inside = self.masks(weight.dims()[2], &x.device());
        let wide_x = widen(x.clone());
        let wide_weight = cast(weight.clone(), wide_x.dtype());
        let u = (0..inside.len())
            .map(|k| tapped(&wide_x, &inside, k) * tap(&wide_weight, k))
            .reduce(|a, b| a + b)
            .expect("at least one tap");
        Forward {
            output: cast(u, x.dtype()).into(),
            extra: vec![],
            saved: (x, weight),
        }
    }

    /// dκ[k] = Σ_t dU[t] X[t+k−K/2], dX[t+k−K/2] += κ[k] dU[t].
    fn backward(self, (x, weight): Self::Saved, du: Value, _: [bool; 2]) -> [Option<Value>; 2] {
        let dtypes = (x.dtype(), weight.dtype());
        let du = du.tensor::<3>();
        #[cfg(feature = "cuda")]
        {
            use crate::cuda::conv;
            let dw = conv::weight_gradient(&x, &weight, &du, &self.packing, self.chunk);
            let dx = conv::apply(&du, &weight, &self.packing, self.chunk, -1);
            if let (Some(dx), Some(dw)) = (dx, dw) {
                return [Some(dx.into()), Some(dw.into())];
            }
        }
        let taps = weight.dims()[2];
        let inside = self.masks(taps, &x.device());
        let (x, du) = (widen(x), widen(du));
        let weight = cast(weight, x.dtype());
        let mut dx = x.zeros_like();
        let mut dweight = vec![];
        for k in 0..taps {
            let mask = cast(inside[k].clone(), x.dtype());
            dx = dx + shift(du.clone() * mask * tap(&weight, k), -offset(k, taps));
            let sum = (du.clone() * tapped(&x, &inside, k)).sum_dims_squeeze::<1, _>(&[0, 1]);
            dweight.push(sum.reshape([-1, 1, 1]));
        }
        let dweight = Tensor::cat(dweight, 2);
        [
            Some(cast(dx, dtypes.0).into()),
            Some(cast(dweight, dtypes.1).into()),
        ]
    }
}
