//! An attention half, and the same maths composed.

use burn::tensor::Tensor;

use super::{EPS, composed};
use crate::doctor::cases::{CHAIN, angles, flat, middle, op};
use crate::doctor::compare::Op;
use crate::fused::{AttentionWeights, attention_sublayer};
use crate::{AttentionSpec, Packing, attention, linear, rms_norm, rope};

/// One attention half.
#[derive(Clone)]
pub(super) struct Half {
    pub batch: usize,
    pub tokens: usize,
    pub width: usize,
    pub heads: usize,
    pub groups: usize,
    pub size: usize,
    pub window: Option<usize>,
    pub packing: Option<Packing>,
    pub qk_norm: bool,
    /// Whether the projections lie in one buffer, as a unit's parameters do.
    pub joined: bool,
    /// Whether the rows are the part that a rank in the middle of three has of longer ones.
    pub shared: bool,
}

impl Half {
    pub fn attention(self, name: &str) -> Op {
        let Self {
            batch,
            tokens,
            width,
            heads,
            groups,
            size,
            ..
        } = self;
        let name =
            format!("attention half, {name}, {batch}×{tokens}×{width}, {heads}/{groups}×{size}");
        let (queries, keys) = (heads * size, groups * size);
        let scale = (width as f64).powf(-0.5);
        let projections = match self.joined {
            true => vec![((queries + 2 * keys) * width, scale)],
            false => [queries, keys, keys]
                .map(|rows| (rows * width, scale))
                .to_vec(),
        };
        let mut inputs = vec![(batch * tokens * width, 1.0), (width, 1.0)];
        inputs.push((width * queries, (queries as f64).powf(-0.5)));
        inputs.extend([(size, 1.0); 2].iter().filter(|_| self.qk_norm));
        inputs.extend(projections);
        op(&name, &inputs, CHAIN, move |x| self.run(x))
    }

    fn run(&self, inputs: &[Tensor<1>]) -> Tensor<1> {
        let (width, size) = (self.width, self.size);
        let (queries, keys) = (self.heads * size, self.groups * size);
        let x: Tensor<3> = inputs[0].clone().reshape([self.batch, self.tokens, width]);
        let norm = inputs[1].clone();
        let o: Tensor<2> = inputs[2].clone().reshape([width, queries]);
        let mut rest = inputs[3..].iter().cloned();
        let gains = self
            .qk_norm
            .then(|| [(); 2].map(|()| rest.next().expect("two gains")));
        let mut rows = [queries, keys, keys].into_iter();
        let whole = rest.clone().next().expect("projections");
        let mut from = 0;
        let mut matrix = || -> Tensor<2> {
            let count = rows.next().expect("three projections");
            let flat = match self.joined {
                true => whole.clone().narrow(0, from * width, count * width),
                false => rest.next().expect("three projections"),
            };
            from += count;
            flat.reshape([count, width])
        };
        let (q, k, v) = (matrix(), matrix(), matrix());
        let (cos, sin) = angles(&inputs[0], self.tokens, size);
        let (packing, context) = match self.shared {
            false => (self.packing.clone(), None),
            true => {
                let rows = || Packing::whole_rows(self.batch, 3 * self.tokens);
                let (part, context) = middle(&self.packing.clone().unwrap_or_else(rows));
                (Some(part), Some(context))
            }
        };
        let spec = AttentionSpec {
            window: self.window,
            scale: (size as f64).powf(-0.5),
            query_offset: 0,
            packing,
            context,
        };
        let weights = AttentionWeights {
            norm: &norm,
            q: &q,
            k: &k,
            v: &v,
            o: &o,
            qk_norm: gains.as_ref().map(|[q, k]| (q, k)),
            head_size: size,
            eps: EPS,
        };
        let fused = attention_sublayer(&x, &weights, (&cos, &sin), &spec);
        if let Some(y) = fused {
            return flat(y);
        }
        let normed = rms_norm(x.clone(), norm.clone(), EPS);
        let heads = |w: &Tensor<2>, count: usize| -> Tensor<4> {
            linear(normed.clone(), w.clone()).reshape([self.batch, self.tokens, count, size])
        };
        let (mut a, mut b, c) = (
            heads(&q, self.heads),
            heads(&k, self.groups),
            heads(&v, self.groups),
        );
        if let Some([q_gain, k_gain]) = gains {
            (a, b) = (rms_norm(a, q_gain, EPS), rms_norm(b, k_gain, EPS));
        }
        let a = rope(a, cos.clone(), sin.clone());
        let b = rope(b, cos, sin);
        let mixed: Tensor<3> = attention(a, b, c, spec).reshape([self.batch, self.tokens, queries]);
        composed(flat(x + linear(mixed, o)))
    }
}
