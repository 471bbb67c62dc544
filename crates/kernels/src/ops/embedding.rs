//! Looking up rows of the embedding matrix.

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};

use crate::dtype::{cast, wide};
use crate::function::{Forward, Function, Value, apply};

/// Rows `ids` of `weight`, in precision `dtype`: ids `[B, N]`, weight `[V, D]` → `[B, N, D]`.
///
/// Ids must be below V; they are checked where tokens enter the program.
pub fn embedding(ids: Tensor<2, Int>, weight: Tensor<2>, dtype: DType) -> Tensor<3> {
    let [batch, tokens] = ids.dims();
    let width = weight.dims()[1];
    let ids = ids.reshape([batch * tokens]);
    apply(Embedding { ids, dtype }, [weight.into()])
        .tensor::<2>()
        .reshape([batch, tokens, width])
}

#[derive(Debug)]
struct Embedding {
    ids: Tensor<1, Int>,
    dtype: DType,
}

impl Function<1> for Embedding {
    type Saved = ([usize; 2], DType);

    fn forward(&self, [weight]: [Value; 1]) -> Forward<Self::Saved> {
        let weight = weight.tensor::<2>();
        let saved = (weight.dims(), weight.dtype());
        #[cfg(feature = "cuda")]
        if self.dtype == DType::BF16
            && let Some(rows) = crate::cuda::embedding::forward(&self.ids, &weight)
        {
            return Forward {
                output: rows.into(),
                extra: vec![],
                saved,
            };
        }
        let rows = weight.select(0, self.ids.clone());
        Forward {
            output: cast(rows, self.dtype).into(),
            extra: vec![],
            saved,
        }
    }

    /// The gradients of a row's tokens are summed in f32, in the same order each time.
    fn backward(self, (shape, dtype): Self::Saved, dy: Value, _: [bool; 1]) -> [Option<Value>; 1] {
        let dy = dy.tensor::<2>();
        #[cfg(feature = "cuda")]
        if let Some(dw) = crate::cuda::embedding::backward(&self.ids, &dy, shape[0]) {
            return [Some(dw.into())];
        }
        let sum = wide(dtype);
        let dw = Tensor::<2>::zeros(shape, (&dy.device(), sum)).select_assign(
            0,
            self.ids,
            cast(dy, sum),
            IndexingUpdateOp::Add,
        );
        [Some(cast(dw, dtype).into())]
    }
}
