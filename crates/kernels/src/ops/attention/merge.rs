//! Queries that see keys in two parts: the results of both, put together by the sums of their
//! exponentials.
//!
//! With o₁, o₂ the softmax over each part's scores alone and l₁, l₂ their log-sum-exps, that over all
//! keys is o = o₁ e^(l₁ − l) + o₂ e^(l₂ − l), l = log(e^l₁ + e^l₂). The backward pass of a part takes o and
//! l of the whole: P = exp(s − l) are then the weights among all keys, and δ = Σ_e dy o belongs to all.

use burn::tensor::Tensor;

use crate::dtype::{cast, widen};

/// The log-sum-exp of each query's scores.
#[derive(Clone, Debug)]
pub struct LogSumExp {
    /// `[B, H, N]`, or `[B, N, H]`
    pub values: Tensor<3>,
    /// Whether it is `[B, N, H]`.
    pub by_token: bool,
}

impl LogSumExp {
    /// Those of the first `count` queries: `[B, H, count]`.
    pub fn first(&self, count: usize) -> Tensor<3> {
        let [rows, heads, _] = self.values.dims();
        let values = self.values.clone();
        match self.by_token {
            true => values.slice([0..rows, 0..count]).swap_dims(1, 2),
            false => values.slice([0..rows, 0..heads, 0..count]),
        }
    }

    /// With others for the first queries: `[B, H, count]`.
    pub fn with_first(self, first: Tensor<3>) -> Self {
        let [rows, heads, count] = first.dims();
        let values = match self.by_token {
            true => {
                let first = first.swap_dims(1, 2);
                self.values.slice_assign([0..rows, 0..count], first)
            }
            false => {
                let range = [0..rows, 0..heads, 0..count];
                self.values.slice_assign(range, first)
            }
        };
        Self { values, ..self }
    }
}

/// x with its tokens turned round, the last one first: `[B, N, H, E]`.
pub fn turned(x: &Tensor<4>) -> Tensor<4> {
    #[cfg(feature = "cuda")]
    if let Some(turned) = crate::cuda::attention_merge::turned(x) {
        return turned;
    }
    x.clone().flip([1])
}

/// The values `[B, N, H, E]` and log-sum-exps `[B, H, N]` of two parts, the second with its tokens turned
/// round: those of all keys.
pub fn merged(
    (first, of_first): (&Tensor<4>, &Tensor<3>),
    (second, of_second): (&Tensor<4>, &Tensor<3>),
) -> (Tensor<4>, Tensor<3>) {
    #[cfg(feature = "cuda")]
    if let Some(merged) =
        crate::cuda::attention_merge::merged((first, of_first), (second, of_second))
    {
        return merged;
    }
    let of_second = of_second.clone().flip([2]);
    let largest = of_first.clone().max_pair(of_second.clone());
    let part = |sums: &Tensor<3>| (sums.clone() - largest.clone()).exp();
    let sums = (part(of_first) + part(&of_second)).log() + largest.clone();
    let share = |x: Tensor<4>, of: &Tensor<3>| {
        // [B, N, H, 1]
        let share: Tensor<4> = (of.clone() - sums.clone())
            .exp()
            .swap_dims(1, 2)
            .unsqueeze_dim(3);
        widen(x) * share
    };
    let values = share(first.clone(), of_first) + share(second.clone().flip([1]), &of_second);
    (cast(values, first.dtype()), sums)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device};

    use super::*;
    use crate::testing::{normal, relative_error_of, values};

    fn seeded<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        normal(shape, 1.0, seed, &Device::flex(), DType::F64)
    }

    /// One softmax over all scores is that over two parts of them, merged; and a part that is out of reach
    /// leaves the other as it is, bit for bit.
    #[test]
    fn parts_of_a_softmax_make_the_whole() {
        let [rows, heads, n, keys, size] = [2, 3, 5, 8, 4];
        // [B, H, N, S], [B, H, S, E]
        let scores = seeded([rows, heads, n, keys], 1).mul_scalar(3.0);
        let v = seeded([rows, heads, keys, size], 2);
        let softmax = |from: usize, count: usize| {
            let weights = scores.clone().narrow(3, from, count).exp();
            let sum = weights.clone().sum_dim(3);
            let values = weights.matmul(v.clone().narrow(2, from, count)) / sum.clone();
            let sums: Tensor<3> = sum.log().squeeze_dim(3);
            (values.swap_dims(1, 2), sums)
        };
        let (all, of_all) = softmax(0, keys);
        let (first, of_first) = softmax(0, 3);
        let (second, of_second) = softmax(3, keys - 3);
        let (second, of_second) = (turned(&second), of_second.flip([2]));
        let (both, of_both) = merged((&first, &of_first), (&second, &of_second));
        // A few roundings of f64.
        assert!(relative_error_of(&values(&both), &values(&all)) < 1e-14);
        assert!(relative_error_of(&values(&of_both), &values(&of_all)) < 1e-14);
        let nothing = of_second.zeros_like().sub_scalar(1e30);
        let (one, of_one) = merged((&first, &of_first), (&second, &nothing));
        assert_eq!(values(&one), values(&first));
        assert_eq!(values(&of_one), values(&of_first));
    }

    #[test]
    fn sums_by_token_are_sums_by_head() {
        let by_head = LogSumExp {
            values: seeded([2, 3, 5], 1),
            by_token: false,
        };
        let by_token = LogSumExp {
            values: by_head.values.clone().swap_dims(1, 2),
            by_token: true,
        };
        assert_eq!(values(&by_token.first(4)), values(&by_head.first(4)));
        let other = seeded([2, 3, 4], 2);
        let by_head = by_head.with_first(other.clone());
        let by_token = by_token.with_first(other.clone());
        assert_eq!(values(&by_head.first(4)), values(&other));
        let turned = by_token.values.clone().swap_dims(1, 2);
        assert_eq!(values(&turned), values(&by_head.values));
    }
}
