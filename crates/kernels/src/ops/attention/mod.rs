//! Causal attention: full or sliding window, grouped key-value heads, packed documents.

pub(crate) mod merge;
mod reference;
pub(crate) mod shared;

use burn::tensor::Tensor;

use crate::context::Context;
use crate::function::{Forward, Function, Value, apply};
use crate::packing::Packing;
use merge::LogSumExp;
use shared::SharedAttention;

pub use shared::heads_divide;

/// What a query may see.
#[derive(Clone, Debug)]
pub struct AttentionSpec {
    /// Keys i − window + 1 ..= i; `None`: all earlier keys.
    pub window: Option<usize>,
    /// Factor on the scores, usually E^−½.
    pub scale: f64,
    /// Position of the first query among the keys: 0 in training, the cache's length in decoding; that
    /// behind the last key where queries see none of their own.
    pub query_offset: usize,
    /// A query sees keys of its own document only. Positions are those of the keys; `None`: each
    /// row is one document.
    pub packing: Option<Packing>,
    /// The ranks that have the other parts of the rows, if `packing` is a part. Keys are then those of
    /// this rank's own tokens.
    pub context: Option<Context>,
}

impl AttentionSpec {
    fn is_part(&self) -> bool {
        let part = |p: &Packing| p.length() < p.whole().length();
        self.packing.as_ref().is_some_and(part)
    }

    /// Whether `queries` queries of whole rows stand behind all of `keys` keys, and each sees one.
    pub(crate) fn is_behind(&self, queries: usize, keys: usize) -> bool {
        let whole = self.packing.as_ref().is_none_or(Packing::is_whole_rows);
        let sees = |window| self.query_offset + queries < keys + window;
        whole && keys > 0 && self.query_offset >= keys && self.window.is_none_or(sees)
    }

    /// Whether other ranks have keys that these queries see, and nothing says which ranks.
    pub(crate) fn lacks_context(&self) -> bool {
        self.is_part() && self.context.is_none()
    }
}

/// Softmax attention: q `[B, N, H, E]`; k, v `[B, S, G, E]` → `[B, N, H, E]`.
///
/// Query head a uses key-value head ⌊a G / H⌋. Query i stands at key position `query_offset` + i and
/// sees keys at its own and earlier positions, within the window and its document. Scores and
/// softmax are taken in f32. Memory is linear in N: scores live for one tile of queries at a time.
///
/// # Panics
/// If H is not a multiple of G, some queries reach past the keys and others do not, one sees no key, or
/// rows are a part and there is no context.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, spec: AttentionSpec) -> Tensor<4> {
    let ([_, queries, heads, _], [_, keys, groups, _]) = (q.dims(), k.dims());
    assert_eq!(heads % groups, 0, "query heads in whole groups");
    assert!(
        spec.query_offset + queries <= keys || spec.is_behind(queries, keys),
        "{queries} queries from position {} do not fit {keys} keys",
        spec.query_offset
    );
    let inputs = [q.into(), k.into(), v.into()];
    if !spec.is_part() {
        return apply(Attention { spec }, inputs).tensor();
    }
    assert!(
        !spec.lacks_context(),
        "queries in a part of rows see nothing of the other parts"
    );
    assert_eq!(
        (spec.query_offset, queries),
        (0, keys),
        "this rank's own keys"
    );
    let shared = SharedAttention::new(&spec).expect("a part of rows, and ranks that share them");
    apply(shared, inputs).tensor()
}

#[derive(Debug)]
pub(crate) struct Attention {
    spec: AttentionSpec,
}

/// q, k, v, the output, and the log-sum-exp of each query's scores.
pub(crate) type Saved = (Tensor<4>, Tensor<4>, Tensor<4>, Tensor<4>, LogSumExp);

impl Function<3> for Attention {
    type Saved = Saved;

    fn forward(&self, [q, k, v]: [Value; 3]) -> Forward<Saved> {
        let (q, k, v) = (q.tensor(), k.tensor(), v.tensor());
        #[cfg(feature = "cuda")]
        if let Some((output, sums)) = crate::cuda::attention::forward(&q, &k, &v, &self.spec) {
            return Forward {
                output: output.clone().into(),
                extra: vec![],
                saved: (q, k, v, output, sums),
            };
        }
        let (output, values) = reference::forward(q.clone(), k.clone(), v.clone(), &self.spec);
        let sums = LogSumExp {
            values,
            by_token: false,
        };
        Forward {
            output: output.clone().into(),
            extra: vec![],
            saved: (q, k, v, output, sums),
        }
    }

    fn backward(self, saved: Saved, dy: Value, _: [bool; 3]) -> [Option<Value>; 3] {
        let (q, k, v, output, sums) = saved;
        let dy = dy.tensor();
        #[cfg(feature = "cuda")]
        if let Some(gradients) =
            crate::cuda::attention::backward([&q, &k, &v], &output, &sums.values, &dy, &self.spec)
        {
            return gradients.map(|g| Some(g.into()));
        }
        reference::backward(q, k, v, output, sums.values, dy, &self.spec).map(|g| Some(g.into()))
    }
}
