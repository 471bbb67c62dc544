//! The head's product and the softmax cross-entropy, a slice of tokens at a time.

use burn::tensor::{DType, Int, Tensor};

use super::gemm::Matrix;
use super::stream::{Arg, Buffer, on_stream};
use crate::dtype::cast;

/// Elements of the logits held at a time (256 MiB).
const LOGITS: usize = 1 << 27;

/// Result of [`forward`].
pub struct Loss {
    /// Each token's loss, 0 without a label: `[T]` f32.
    pub losses: Tensor<1>,
    /// scale · Σ losses: `[1]`.
    pub total: Tensor<1>,
    /// Gradients of scale · Σ losses: dh `[T, D]` bf16, dW `[V, D]` f32.
    pub gradients: Option<(Tensor<2>, Tensor<2>)>,
}

/// h `[T, D]` bf16, weight `[V, D]`, labels `[T]`, negative where there is none.
pub fn forward(
    h: &Tensor<2>,
    weight: &Tensor<2>,
    labels: &Tensor<1, Int>,
    scale: f64,
    with_gradients: bool,
) -> Option<Loss> {
    if h.dtype() != DType::BF16 {
        return None;
    }
    let h = Buffer::of(h)?;
    let weight = Buffer::of(&cast(weight.clone(), DType::BF16))?;
    let labels = Buffer::of_ints(labels)?;
    let wide = match labels.dtype() {
        DType::I64 => true,
        DType::I32 => false,
        _ => return None,
    };
    let (tokens, width) = (h.dims()[0], h.dims()[1]);
    let vocab = weight.dims()[0];
    // Whole tiles of the product's rows.
    let step = (LOGITS / vocab / 128 * 128).max(128).min(tokens);
    let losses = h.empty([tokens], DType::F32);
    let total = h.empty([1], DType::F32);
    let logits = h.empty([step, vocab], DType::BF16);
    let gradients = with_gradients.then(|| {
        (
            h.empty([tokens, width], DType::BF16),
            h.empty([vocab, width], DType::F32),
        )
    });
    let mut writes = vec![&losses, &logits, &total];
    if let Some((dh, dw)) = &gradients {
        writes.extend([dh, dw]);
    }
    on_stream(&[&h, &weight, &labels], &writes, |cx, from, to| {
        let bf16 = |at, rows, columns| Matrix::new(at, rows, columns, DType::BF16);
        let w = bf16(from[1], vocab, width);
        for begin in (0..tokens).step_by(step) {
            let rows = step.min(tokens - begin);
            let rows_of_h = bf16(from[0] + (begin * width * 2) as u64, rows, width);
            let z = bf16(to[1], rows, vocab);
            cx.gemm(rows_of_h, w.t(), z, 1.0, 0.0)?;
            let label_size = if wide { 8 } else { 4 };
            let args = [
                Arg::Ptr(to[0] + (begin * 4) as u64),
                Arg::Ptr(to[1]),
                Arg::Ptr(from[2] + (begin * label_size) as u64),
                Arg::Int(i32::from(wide)),
                Arg::Int(vocab as i32),
                Arg::Float(scale as f32),
                Arg::Int(i32::from(with_gradients)),
            ];
            cx.launch("cross_entropy", (rows as u32, 1, 1), 512, &args)?;
            if with_gradients {
                let dh = bf16(to[3] + (begin * width * 2) as u64, rows, width);
                cx.gemm(z, w, dh, 1.0, 0.0)?;
                let dw = Matrix::new(to[4], vocab, width, DType::F32);
                let beta = if begin == 0 { 0.0 } else { 1.0 };
                cx.gemm(z.t(), rows_of_h, dw, 1.0, beta)?;
            }
        }
        let args = [
            Arg::Ptr(to[2]),
            Arg::Ptr(to[0]),
            Arg::Int(tokens as i32),
            Arg::Float(scale as f32),
        ];
        cx.launch("scaled_total", (1, 1, 1), 1024, &args)
    });
    Some(Loss {
        total: total.tensor(),
        losses: losses.tensor(),
        gradients: gradients.map(|(dh, dw)| (dh.tensor(), dw.tensor())),
    })
}
