//! The language-model head and its loss without the whole logits.

use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use crate::dtype::{cast, wide, widen};
use crate::function::{Forward, Function, Value, apply};

/// Elements of the logits held at a time: tokens per slice times V.
const LOGITS: usize = 1 << 25;

/// Label of a token that has no target.
pub const IGNORE: i64 = -1;

/// Σ over tokens with a label of `scale` · (−log softmax(h Wᵀ)\[label\]), f32 `[1]`: h `[T, D]`,
/// weight `[V, D]`, labels `[T]` with [`IGNORE`] where there is no target.
///
/// Both gradients are formed in the forward pass, a slice of tokens at a time, so the logits of one
/// slice are all that ever lives.
pub fn linear_cross_entropy(
    h: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    scale: f64,
) -> Tensor<1> {
    apply(
        LinearCrossEntropy { labels, scale },
        [h.into(), weight.into()],
    )
    .tensor()
}

/// −log softmax(h Wᵀ)\[label\] of each token, 0 where there is no label: `[T]` f32. No gradient.
pub fn token_losses(h: Tensor<2>, weight: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<1> {
    let (h, weight) = (h.inner(), weight.inner());
    #[cfg(feature = "cuda")]
    if let Some(done) = crate::cuda::cross_entropy::forward(&h, &weight, &labels, 1.0, false) {
        return done.losses;
    }
    let losses = slices(h.dims()[0], weight.dims()[0])
        .map(|range| {
            let labels = labels.clone().slice([range.clone()]);
            slice_loss(h.clone().slice([range]), &weight, labels).losses
        })
        .collect();
    Tensor::cat(losses, 0)
}

fn slices(tokens: usize, vocab: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let step = (LOGITS / vocab).clamp(1, tokens.max(1));
    (0..tokens)
        .step_by(step)
        .map(move |begin| begin..(begin + step).min(tokens))
}

struct SliceLoss {
    /// `[t]`
    losses: Tensor<1>,
    /// softmax of the logits: `[t, V]`
    probabilities: Tensor<2>,
    /// 1 where there is a label: `[t, 1]`
    labelled: Tensor<2>,
    /// Labels with 0 in place of IGNORE: `[t, 1]`
    index: Tensor<2, Int>,
}

fn slice_loss(h: Tensor<2>, weight: &Tensor<2>, labels: Tensor<1, Int>) -> SliceLoss {
    let logits = widen(
        h.clone()
            .matmul(cast(weight.clone(), h.dtype()).transpose()),
    );
    let labels = labels.unsqueeze_dim::<2>(1);
    let missing = labels.clone().equal_scalar(IGNORE);
    let index = labels.mask_fill(missing.clone(), 0);
    let labelled = Tensor::ones(index.dims(), (&logits.device(), wide(logits.dtype())))
        .mask_fill(missing, 0.0);
    let max = logits.clone().max_dim(1);
    let shifted = logits - max;
    let target = shifted.clone().gather(1, index.clone());
    let weights = shifted.exp();
    let total = weights.clone().sum_dim(1);
    let losses = (total.clone().log() - target) * labelled.clone();
    SliceLoss {
        losses: losses.squeeze_dim(1),
        probabilities: weights / total,
        labelled,
        index,
    }
}

#[derive(Debug)]
struct LinearCrossEntropy {
    labels: Tensor<1, Int>,
    scale: f64,
}

impl Function<2> for LinearCrossEntropy {
    /// dh and dW for an output gradient of 1.
    type Saved = (Tensor<2>, Tensor<2>);

    fn forward(&self, [h, weight]: [Value; 2]) -> Forward<Self::Saved> {
        let (h, weight) = (h.tensor::<2>(), weight.tensor::<2>());
        #[cfg(feature = "cuda")]
        if let Some(done) =
            crate::cuda::cross_entropy::forward(&h, &weight, &self.labels, self.scale, true)
            && let Some(gradients) = done.gradients
        {
            return Forward {
                output: done.total.into(),
                extra: vec![],
                saved: gradients,
            };
        }
        let device = h.device();
        let sum = wide(h.dtype());
        let mut loss = Tensor::<1>::zeros([1], (&device, sum));
        let mut dh = vec![];
        let mut dw = Tensor::<2>::zeros(weight.dims(), (&device, sum));
        for range in slices(h.dims()[0], weight.dims()[0]) {
            let h = h.clone().slice([range.clone()]);
            let part = slice_loss(h.clone(), &weight, self.labels.clone().slice([range]));
            loss = loss + part.losses.sum();
            let one = part.labelled.zeros_like().sub_scalar(1.0);
            let dlogits = part
                .probabilities
                .scatter(1, part.index, one, IndexingUpdateOp::Add)
                * part.labelled
                * self.scale;
            let dlogits = cast(dlogits, h.dtype());
            dh.push(dlogits.clone().matmul(cast(weight.clone(), h.dtype())));
            dw = dw + widen(dlogits.transpose().matmul(h));
        }
        Forward {
            output: loss.mul_scalar(self.scale).into(),
            extra: vec![],
            saved: (Tensor::cat(dh, 0), cast(dw, weight.dtype())),
        }
    }

    fn backward(self, (dh, dw): Self::Saved, grad: Value, _: [bool; 2]) -> [Option<Value>; 2] {
        let grad = grad.tensor::<1>().unsqueeze::<2>();
        let times = |t: Tensor<2>| {
            let factor = cast(grad.clone(), t.dtype());
            Some((t * factor).into())
        };
        [times(dh), times(dw)]
    }
}

/// Labels as a tensor, `None` for tokens without a target: `[T]`.
pub fn labels(labels: &[Option<u32>], device: &burn::tensor::Device) -> Tensor<1, Int> {
    let ids: Vec<i64> = labels
        .iter()
        .map(|label| label.map_or(IGNORE, i64::from))
        .collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}
