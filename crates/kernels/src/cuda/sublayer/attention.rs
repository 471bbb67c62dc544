//! The attention half.

use burn::tensor::{DType, Tensor};

use super::edge::Edge;
use super::mlp::gradient;
use super::stacked::{Stacked, split, weight_gradient};
use crate::AttentionSpec;
use crate::cuda::attention::{Call, Extents};
use crate::cuda::gemm::Matrix;
use crate::cuda::heads::Heads;
use crate::cuda::norm::{BackwardAt, Norm};
use crate::cuda::stream::{Buffer, on_stream};
use crate::function::{Forward, Function, Value, apply};
use crate::fused::AttentionWeights;
use crate::ops::attention::merge::LogSumExp;
use crate::ops::attention::shared::{First, SharedAttention};

/// See [`crate::fused::attention_sublayer`].
pub fn attention(
    x: &Tensor<3>,
    w: &AttentionWeights,
    (cos, sin): (&Tensor<2>, &Tensor<2>),
    spec: &AttentionSpec,
) -> Option<Tensor<3>> {
    let like = Buffer::of(x)?;
    Norm::of(&like, &Buffer::of(w.norm)?, w.eps)?;
    let [batch, tokens, _] = x.dims();
    let angles = [tokens, w.head_size / 2];
    if [cos, sin]
        .iter()
        .any(|t| t.dtype() != DType::F32 || t.dims() != angles)
    {
        return None;
    }
    let matrices = [w.q, w.k, w.v, w.o];
    let bf16 = matrices.iter().all(|m| m.dtype() == DType::BF16);
    let half = Attention {
        eps: w.eps,
        size: w.head_size,
        qk_norm: w.qk_norm.is_some(),
        spec: spec.clone(),
        cos: cos.clone(),
        sin: sin.clone(),
    };
    let heads = half.heads(batch * tokens, w.q.dims()[0], w.k.dims()[0]);
    heads.check(w.qk_norm.is_some())?;
    let fits = |s: SharedAttention| s.is_own_but_for_the_first(heads.groups);
    if SharedAttention::new(spec).is_some_and(|shared| !fits(shared)) {
        return None;
    }
    // Both directions have the same forms, so one tells.
    Call::new(&heads.extents(tokens), spec, &like, false)?;
    let absent = || Tensor::zeros([1], (&x.device().without_autodiff(), DType::F32));
    let (q_gain, k_gain) = match w.qk_norm {
        Some((q, k)) => (q.clone(), k.clone()),
        None => (absent(), absent()),
    };
    let inputs = [
        x.clone().into(),
        w.norm.clone().into(),
        w.q.clone().into(),
        w.k.clone().into(),
        w.v.clone().into(),
        w.o.clone().into(),
        q_gain.into(),
        k_gain.into(),
    ];
    bf16.then(|| apply(half, inputs).tensor())
}

#[derive(Debug)]
struct Attention {
    eps: f64,
    /// E
    size: usize,
    qk_norm: bool,
    spec: AttentionSpec,
    cos: Tensor<2>,
    sin: Tensor<2>,
}

impl Attention {
    fn heads(&self, rows: usize, queries: usize, keys: usize) -> Heads {
        let packing = self.spec.packing.as_ref();
        Heads {
            rows,
            split: packing.is_some_and(|packing| !packing.is_whole_rows()),
            heads: queries / self.size,
            groups: keys / self.size,
            size: self.size,
            eps: self.eps as f32,
        }
    }
}

/// Everything the passes read, on the device.
pub(super) struct Inputs {
    pub x: Buffer,
    gain: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    o: Buffer,
    gains: [Buffer; 2],
    cos: Buffer,
    sin: Buffer,
    norm: Norm,
    pub heads: Heads,
    pub extents: Extents,
}

impl Inputs {
    fn new(half: &Attention, [x, gain, q, k, v, o, q_gain, k_gain]: [Value; 8]) -> Self {
        let of = "checked before the operation was chosen";
        let matrix = |m: Value| Buffer::of(&m.tensor::<2>()).expect(of);
        let vector = |m: Value| Buffer::of(&m.tensor::<1>()).expect(of);
        let x = Buffer::of(&x.tensor::<3>()).expect(of);
        let gain = vector(gain);
        let (q, k, v, o) = (matrix(q), matrix(k), matrix(v), matrix(o));
        let norm = Norm::of(&x, &gain, half.eps).expect(of);
        let heads = half.heads(norm.rows, q.dims()[0], k.dims()[0]);
        Self {
            norm,
            extents: heads.extents(x.dims()[1]),
            heads,
            x,
            gain,
            q,
            k,
            v,
            o,
            gains: [vector(q_gain), vector(k_gain)],
            cos: Buffer::of(&half.cos).expect(of),
            sin: Buffer::of(&half.sin).expect(of),
        }
    }

    /// In the order that [`at`] names.
    fn reads(&self) -> Vec<&Buffer> {
        let [q_gain, k_gain] = &self.gains;
        vec![
            &self.x, &self.gain, &self.q, &self.k, &self.v, &self.o, q_gain, k_gain, &self.cos,
            &self.sin,
        ]
    }

    fn rows(&self) -> [usize; 3] {
        let (h, g) = (self.heads.heads, self.heads.groups);
        [h, g, g].map(|heads| heads * self.heads.size)
    }

    fn weights(&self, from: &[u64]) -> Stacked {
        Stacked::new(&from[at::Q..at::O], &self.rows(), self.norm.width)
    }

    fn bf16(&self, at: u64, columns: usize) -> Matrix {
        Matrix::new(at, self.norm.rows, columns, DType::BF16)
    }

    /// H·E
    fn mixed(&self) -> usize {
        self.heads.heads * self.heads.size
    }
}

/// Places in [`Inputs::reads`].
mod at {
    pub const X: usize = 0;
    pub const GAIN: usize = 1;
    pub const Q: usize = 2;
    pub const O: usize = 5;
    pub const Q_GAIN: usize = 6;
    pub const K_GAIN: usize = 7;
    pub const COS: usize = 8;
    pub const SIN: usize = 9;
    pub const END: usize = 10;
}

#[derive(Clone, Debug)]
struct Saved {
    /// Of the first queries, where they see keys of other ranks.
    first: Option<First>,
    inputs: [Value; 8],
    /// Queries, keys and values as attention saw them: T·S, laid out by [`Heads`].
    qkv: Buffer,
    /// The same before the norms of the heads, where there are such norms.
    raw: Option<Buffer>,
    /// `[T, H·E]`
    mixed: Buffer,
    log_sum_exp: LogSumExp,
}

impl Function<8> for Attention {
    type Saved = Saved;

    fn forward(&self, inputs: [Value; 8]) -> Forward<Saved> {
        let i = Inputs::new(self, inputs.clone());
        let (t, d, s) = (i.norm.rows, i.norm.width, i.heads.width());
        let call = Call::new(&i.extents, &self.spec, &i.x, false)
            .expect("checked before the operation was chosen");
        let y = i.x.empty(i.x.dims(), DType::BF16);
        let n = i.x.empty([t, d], DType::BF16);
        let qkv = i.x.empty([t, s], DType::BF16);
        let raw = self.qk_norm.then(|| i.x.empty([t, s], DType::BF16));
        let mixed = i.x.empty([t, i.mixed()], DType::BF16);
        let sums = i.x.empty(call.statistics(), DType::F32);
        let mut writes = vec![&n, &qkv];
        writes.extend(&raw);
        on_stream(&i.reads(), &writes, |cx, from, to| {
            i.norm.forward(cx, to[0], from[at::X], from[at::GAIN])?;
            let projected = to.get(2).copied().unwrap_or(to[1]);
            let n = i.bf16(to[0], d);
            let weights = i.weights(from);
            let tables = (from[at::COS], from[at::SIN]);
            if let (false, Some(w)) = (self.qk_norm, weights.whole())
                && i.heads
                    .project_rotated(cx, (n, w), to[1], &i.extents, tables)?
            {
                return Ok(());
            }
            weights.forward(cx, n, &i.heads.matrices(projected))?;
            let gains = (from[at::Q_GAIN], from[at::K_GAIN]);
            match self.qk_norm {
                false => i.heads.rotate(cx, to[1], &i.extents, tables, 1.0),
                true => i.heads.norm_rotate(
                    cx,
                    (to[1], projected),
                    &i.extents,
                    tables,
                    (gains, &i.gains[0]),
                ),
            }
        });
        // Keys travel while this rank's tokens attend to each other.
        let edge = SharedAttention::new(&self.spec).map(|shared| Edge::new(shared, &i));
        let strips = edge.as_ref().map(|edge| edge.begin(&qkv));
        let mut reads = vec![&qkv];
        reads.extend(&call.documents);
        on_stream(&reads, &[&mixed, &sums], |cx, from, to| {
            let [q, k, v] = i.heads.qkv(from[0]);
            let addresses = vec![q, k, v, to[0], to[1]];
            call.run(cx, addresses, from.get(1).copied())
        });
        let sums = call.log_sum_exp(sums);
        let (mixed, sums, first) = match edge.zip(strips) {
            None => (mixed, sums, None),
            Some((edge, strips)) => edge.forward(strips, &qkv, mixed, sums),
        };
        on_stream(&[&mixed, &i.o, &i.x], &[&y], |cx, from, to| {
            let w = Matrix::new(from[1], d, i.mixed(), DType::BF16);
            let (mixed, y) = (i.bf16(from[0], i.mixed()), i.bf16(to[0], d));
            cx.gemm_onto(mixed, w.t(), y, from[2], 1.0, 1.0)
        });
        Forward {
            output: y.tensor::<3>().into(),
            extra: vec![],
            saved: Saved {
                first,
                inputs,
                qkv,
                raw,
                mixed,
                log_sum_exp: sums,
            },
        }
    }

    fn backward(self, saved: Saved, dy: Value, _: [bool; 8]) -> [Option<Value>; 8] {
        let i = Inputs::new(&self, saved.inputs);
        let (t, d, s, m) = (i.norm.rows, i.norm.width, i.heads.width(), i.mixed());
        let call = Call::new(&i.extents, &self.spec, &i.x, true)
            .expect("checked before the operation was chosen");
        let dy = gradient(dy);
        let dx = i.x.empty(i.x.dims(), DType::BF16);
        let dgain = i.x.empty([d], DType::F32);
        let dw = i.x.empty([s, d], DType::BF16);
        let dwo = i.x.empty([d, m], DType::BF16);
        let dqkv = i.x.empty([t, s], DType::BF16);
        // The gradient of the mixed values; of n.
        let dmixed = i.x.empty([t, m], DType::BF16);
        let dn = i.x.empty([t, d], DType::BF16);
        let n = i.x.empty([t, d], DType::BF16);
        let partial = i.norm.partial(&i.x);
        let head_gains = i.x.empty([2, self.size], DType::F32);
        let head_partial = i.heads.partial(&i.x);
        let scratch = call.scratch(&i.x);
        on_stream(
            &[&dy, &i.o, &saved.mixed],
            &[&dmixed, &dwo],
            |cx, from, to| {
                let dy = i.bf16(from[0], d);
                let wo = Matrix::new(from[1], d, m, DType::BF16);
                cx.gemm(dy, wo, i.bf16(to[0], m), 1.0, 0.0)?;
                let dwo = Matrix::new(to[1], d, m, DType::BF16);
                cx.gemm(dy.t(), i.bf16(from[2], m), dwo, 1.0, 0.0)
            },
        );
        let edge = SharedAttention::new(&self.spec).map(|shared| Edge::new(shared, &i));
        let (dmixed, of_edge) = match &edge {
            None => (dmixed, None),
            Some(edge) => {
                let of_forward = (&saved.qkv, &saved.mixed, &saved.log_sum_exp);
                edge.backward(saved.first, of_forward, dmixed)
            }
        };
        let sums = Buffer::of(&saved.log_sum_exp.values).expect("made on this device");
        let mut reads = vec![&saved.qkv, &saved.mixed, &sums, &dmixed];
        reads.extend(&call.documents);
        let mut writes = vec![&dqkv];
        writes.extend(&scratch);
        on_stream(&reads, &writes, |cx, from, to| {
            let [q, k, v] = i.heads.qkv(from[0]);
            let [dq, dk, dv] = i.heads.qkv(to[0]);
            let mut addresses = vec![q, k, v, from[1], from[2], from[3], dq, dk, dv];
            addresses.extend(&to[1..]);
            call.run(cx, addresses, from.get(4).copied())
        });
        let dqkv = match (&edge, of_edge) {
            (Some(edge), Some(gradients)) => edge.added(dqkv, gradients),
            _ => dqkv,
        };
        let mut reads = i.reads();
        reads.push(&dy);
        reads.extend(&saved.raw);
        // Rotated back where it lies.
        let writes = [
            &dx,
            &dgain,
            &dw,
            &dqkv,
            &dn,
            &n,
            &partial,
            &head_gains,
            &head_partial,
        ];
        on_stream(&reads, &writes, |cx, from, to| {
            let dy = from[at::END];
            let raw = from.get(at::END + 1).copied();
            let tables = (from[at::COS], from[at::SIN]);
            let gains = (from[at::Q_GAIN], from[at::K_GAIN]);
            match raw {
                None => i.heads.rotate(cx, to[3], &i.extents, tables, -1.0)?,
                Some(raw) => i.heads.norm_rotate_backward(
                    cx,
                    (to[3], raw),
                    &i.extents,
                    tables,
                    (gains, &i.gains[0]),
                    (to[7], to[8]),
                )?,
            }

            let dqkv = i.heads.matrices(to[3]);
            i.weights(from)
                .input_gradient(cx, &dqkv, i.bf16(to[4], d))?;
            let norm = BackwardAt {
                x: from[at::X],
                weight: from[at::GAIN],
                dy: to[4],
                residual: dy,
                dx: to[0],
                dw: to[1],
                y: to[5],
                partial: to[6],
            };
            i.norm.backward(cx, &norm)?;
            weight_gradient(cx, &dqkv, i.bf16(to[5], d), to[2])
        });
        let [dq, dk, dv] = split(dw, i.rows());
        let gains = head_gains.tensor::<2>();
        let head_gain = |which: usize| -> Option<Value> {
            let gain = gains.clone().narrow(0, which, 1);
            self.qk_norm.then(|| gain.reshape([self.size]).into())
        };
        [
            Some(dx.tensor::<3>().into()),
            Some(dgain.tensor::<1>().into()),
            Some(dq.into()),
            Some(dk.into()),
            Some(dv.into()),
            Some(dwo.tensor::<2>().into()),
            head_gain(0),
            head_gain(1),
        ]
    }
}
