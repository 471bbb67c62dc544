//! Self-attention with rotary embeddings and grouped key-value heads.

use burn::tensor::Tensor;
use ttt_kernels::fused::{self, AttentionWeights};
use ttt_kernels::{AttentionSpec, attention, linear, rms_norm, rope};

use crate::config::ModelConfig;
use crate::model::Batch;
use crate::params::Params;
use crate::rope::RopeTable;

/// The attention half of a block.
#[derive(Clone, Debug)]
pub struct Attention {
    q_proj: Projection,
    k_proj: Projection,
    v_proj: Projection,
    o_proj: Tensor<2>,
    /// Per-head gains of queries and keys, if the family normalises them: `[E]` each.
    qk_norm: Option<(Tensor<1>, Tensor<1>)>,
    eps: f64,
    head_size: usize,
    window: Option<usize>,
}

/// A linear map with an optional bias.
#[derive(Clone, Debug)]
struct Projection {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
}

impl Projection {
    fn new(params: &Params, name: &str) -> Self {
        Self {
            weight: params.expect(&format!("self_attn.{name}.weight")),
            bias: params.get(&format!("self_attn.{name}.bias")),
        }
    }

    /// x: `[B, N, D]` → `[B, N, heads, E]`
    fn heads(&self, x: Tensor<3>, head_size: usize) -> Tensor<4> {
        let [batch, tokens, _] = x.dims();
        let mut y = linear(x, self.weight.clone());
        if let Some(bias) = &self.bias {
            y = y + bias.clone().unsqueeze();
        }
        let heads = y.dims()[2] / head_size;
        y.reshape([batch, tokens, heads, head_size])
    }
}

impl Attention {
    /// The attention of layer `layer`.
    pub fn new(config: &ModelConfig, layer: usize, params: &Params) -> Self {
        Self {
            q_proj: Projection::new(params, "q_proj"),
            k_proj: Projection::new(params, "k_proj"),
            v_proj: Projection::new(params, "v_proj"),
            o_proj: params.expect("self_attn.o_proj.weight"),
            qk_norm: config.qk_norm().then(|| {
                (
                    params.expect("self_attn.q_norm.weight"),
                    params.expect("self_attn.k_norm.weight"),
                )
            }),
            eps: config.rms_norm_eps,
            head_size: config.head_size(),
            window: config.window(layer),
        }
    }

    /// The window in tokens, `None` for full attention.
    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// Queries `[B, N, H, E]`, keys and values `[B, N, G, E]` of x `[B, N, D]`, rotated.
    pub fn project(&self, x: Tensor<3>, rope_table: &RopeTable) -> [Tensor<4>; 3] {
        let mut q = self.q_proj.heads(x.clone(), self.head_size);
        let mut k = self.k_proj.heads(x.clone(), self.head_size);
        let v = self.v_proj.heads(x, self.head_size);
        if let Some((q_gain, k_gain)) = &self.qk_norm {
            q = rms_norm(q, q_gain.clone(), self.eps);
            k = rms_norm(k, k_gain.clone(), self.eps);
        }
        let rotate = |t| rope(t, rope_table.cos.clone(), rope_table.sin.clone());
        [rotate(q), rotate(k), v]
    }

    /// x + attention(norm(x)) as one operation, where the device has it: x `[B, N, D]`, the norm's
    /// gain `[D]`.
    pub(crate) fn fused(
        &self,
        x: &Tensor<3>,
        gain: &Tensor<1>,
        batch: &Batch,
    ) -> Option<Tensor<3>> {
        let projections = [&self.q_proj, &self.k_proj, &self.v_proj];
        if projections.iter().any(|p| p.bias.is_some()) {
            return None;
        }
        let weights = AttentionWeights {
            norm: gain,
            q: &self.q_proj.weight,
            k: &self.k_proj.weight,
            v: &self.v_proj.weight,
            o: &self.o_proj,
            qk_norm: self.qk_norm.as_ref().map(|(q, k)| (q, k)),
            head_size: self.head_size,
            eps: self.eps,
        };
        let tables = (&batch.rope.cos, &batch.rope.sin);
        fused::attention_sublayer(x, &weights, tables, &self.spec_within(batch))
    }

    fn spec(&self, query_offset: usize) -> AttentionSpec {
        AttentionSpec {
            window: self.window,
            scale: (self.head_size as f64).powf(-0.5),
            query_offset,
            packing: None,
            context: None,
        }
    }

    fn spec_within(&self, batch: &Batch) -> AttentionSpec {
        AttentionSpec {
            packing: Some(batch.packing.clone()),
            context: batch.context.clone(),
            ..self.spec(0)
        }
    }

    /// The tokens of a batch against each other, each within its document, and the output projection:
    /// `[B, N, D]`.
    pub fn attend_within(&self, qkv: [Tensor<4>; 3], batch: &Batch) -> Tensor<3> {
        self.mix(qkv, self.spec_within(batch))
    }

    /// Queries from position `query_offset` on against all keys, and the output projection:
    /// `[B, N, D]`.
    pub fn attend(&self, qkv: [Tensor<4>; 3], query_offset: usize) -> Tensor<3> {
        self.mix(qkv, self.spec(query_offset))
    }

    fn mix(&self, [q, k, v]: [Tensor<4>; 3], spec: AttentionSpec) -> Tensor<3> {
        let [batch, tokens, heads, size] = q.dims();
        let mixed: Tensor<3> = attention(q, k, v, spec).reshape([batch, tokens, heads * size]);
        linear(mixed, self.o_proj.clone())
    }
}
