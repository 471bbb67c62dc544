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

/// `own`, the values of queries, and their sums, with the values `[B, n, H, E]` and log-sum-exps `[B, H, n]`
/// that the first n of them have from other keys, `more`.
pub fn merged(
    own: Tensor<4>,
    sums: LogSumExp,
    more: (&Tensor<4>, &Tensor<3>),
) -> (Tensor<4>, LogSumExp) {
    #[cfg(feature = "cuda")]
    let (own, sums) = match crate::cuda::attention_merge::merge(own, sums, more) {
        (own, sums, true) => return (own, sums),
        (own, sums, false) => (own, sums),
    };
    let (second, of_second) = more;
    let [rows, count, _, _] = second.dims();
    let first = own.clone().slice([0..rows, 0..count]);
    let of_first = sums.first(count);
    let largest = of_first.clone().max_pair(of_second.clone());
    let part = |sums: &Tensor<3>| (sums.clone() - largest.clone()).exp();
    let of_both = (part(&of_first) + part(of_second)).log() + largest.clone();
    let share = |x: &Tensor<4>, of: &Tensor<3>| {
        // [B, n, H, 1]
        let share: Tensor<4> = (of.clone() - of_both.clone())
            .exp()
            .swap_dims(1, 2)
            .unsqueeze_dim(3);
        widen(x.clone()) * share
    };
    let both = share(&first, &of_first) + share(second, of_second);
    let output = own.slice_assign([0..rows, 0..count], cast(both, first.dtype()));
    (output, sums.with_first(of_both))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device};

    use super::*;
    use crate::testing::{normal, relative_error_of, values};

    fn seeded<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        normal(shape, 1.0, seed, &Device::flex(), DType::F64)
    }

    /// One softmax over all scores is that over two parts of them, merged, whatever the queries behind the
    /// first ones have; and a part that is out of reach leaves the other as it is, bit for bit.
    #[test]
    fn parts_of_a_softmax_make_the_whole() {
        let [rows, heads, n, keys, size, count] = [2, 3, 5, 8, 4, 3];
        // [B, H, N, S], [B, H, S, E]
        let scores = seeded([rows, heads, n, keys], 1).mul_scalar(3.0);
        let v = seeded([rows, heads, keys, size], 2);
        let softmax = |from: usize, len: usize| {
            let weights = scores.clone().narrow(3, from, len).exp();
            let sum = weights.clone().sum_dim(3);
            let values = weights.matmul(v.clone().narrow(2, from, len)) / sum.clone();
            let sums: Tensor<3> = sum.log().squeeze_dim(3);
            (values.swap_dims(1, 2), sums)
        };
        let sums = |values: &Tensor<3>, by_token: bool| LogSumExp {
            values: match by_token {
                true => values.clone().swap_dims(1, 2),
                false => values.clone(),
            },
            by_token,
        };
        let first = |x: &Tensor<4>| x.clone().narrow(1, 0, count);
        let (all, of_all) = softmax(0, keys);
        let (one, of_one) = softmax(0, 3);
        let (more, of_more) = softmax(3, keys - 3);
        let (more, of_more) = (first(&more), of_more.narrow(2, 0, count));
        // Those of all keys, then those of some.
        let expected = Tensor::cat(
            vec![first(&all), one.clone().narrow(1, count, n - count)],
            1,
        );
        let rest = of_one.clone().narrow(2, count, n - count);
        let of_expected = Tensor::cat(vec![of_all.narrow(2, 0, count), rest], 2);
        for by_token in [false, true] {
            let (both, of_both) = merged(one.clone(), sums(&of_one, by_token), (&more, &of_more));
            // A few roundings of f64.
            assert!(relative_error_of(&values(&both), &values(&expected)) < 1e-14);
            let of_both = values(&of_both.first(n));
            assert!(relative_error_of(&of_both, &values(&of_expected)) < 1e-14);
            let nothing = of_more.zeros_like().sub_scalar(1e30);
            let (same, of_same) = merged(one.clone(), sums(&of_one, by_token), (&more, &nothing));
            assert_eq!(values(&same), values(&one));
            assert_eq!(values(&of_same.first(n)), values(&of_one));
        }
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
        let swapped = by_token.values.clone().swap_dims(1, 2);
        assert_eq!(values(&swapped), values(&by_head.values));
    }
}
