//! Rates of single operations, at the shapes of a 500M model (hidden 1024, intermediate 3072, heads of
//! 128, vocabulary 32000, 32768 tokens).
//!
//! Data is random; a result of every row is read back, so that work that did not run cannot count.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};

use crate::ops::seed::backward_from;
use crate::testing::values;
use crate::ttt::{ScanSpec, fast_weight_scan};
use crate::{
    AttentionSpec, Packing, attention, embedding, linear, linear_cross_entropy, rms_norm, rope,
    swiglu,
};

const TOKENS: usize = 32_768;
const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 3072;
const HEADS: usize = 8;
const HEAD_SIZE: usize = 128;
const VOCAB: usize = 32_000;
const WINDOW: usize = 2048;
const CHUNK: usize = 1024;

/// One measured operation.
#[derive(Clone, Debug)]
pub struct Row {
    /// The operation, as the PyTorch baseline names it where it has it.
    pub name: &'static str,
    /// Median milliseconds.
    pub ms: f64,
    /// What it does at least: floating-point operations, bytes moved.
    pub work: Work,
    /// Whether the result that was read back is finite.
    pub finite: bool,
}

/// The least that an operation does.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Floating-point operations.
    Flops(f64),
    /// Bytes read and written once.
    Bytes(f64),
}

impl Row {
    /// Achieved rate with its unit.
    pub fn rate(&self) -> (f64, &'static str) {
        match self.work {
            Work::Flops(flops) => (flops / self.ms / 1e9, "TFLOP/s"),
            Work::Bytes(bytes) => (bytes / self.ms / 1e6, "GB/s"),
        }
    }
}

/// Median time of `run` in ms, and whether what it returns is finite.
fn time(device: &Device, mut run: impl FnMut() -> Tensor<1>) -> (f64, bool) {
    const BATCH: usize = 5;
    let wait = || device.sync().is_ok();
    for _ in 0..3 {
        run();
    }
    let mut synced = wait();
    let mut times: Vec<f64> = (0..7)
        .map(|_| {
            // Several calls per wait, so that the queue stays full.
            let start = Instant::now();
            for _ in 0..BATCH {
                run();
            }
            synced &= wait();
            start.elapsed().as_secs_f64() * 1e3 / BATCH as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let finite = values(&run()).iter().all(|x| x.is_finite());
    (times[times.len() / 2], finite && synced)
}

fn random<const D: usize>(shape: [usize; D], scale: f64, device: &Device) -> Tensor<D> {
    let normal = Distribution::Normal(0.0, scale);
    Tensor::random(shape, normal, (device, DType::BF16))
}

/// A few elements of `x`, which say whether it was written.
fn probe<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let count = x.dims().iter().product::<usize>();
    let flat: Tensor<1> = x.reshape([count]);
    flat.narrow(0, count - 8, 8)
}

/// Measures every row on `device`, a plain (not autodiff) one.
pub fn micro(device: &Device, mut report: impl FnMut(&Row)) {
    let tracked = device.clone().autodiff();
    let mut row = |name, work, run: &mut dyn FnMut() -> Tensor<1>| {
        let (ms, finite) = time(device, run);
        report(&Row {
            name,
            ms,
            work,
            finite,
        });
    };
    {
        let x: Tensor<2> = random([8192, 8192], 1.0, device);
        let work = Work::Flops(2.0 * 8192f64.powi(3));
        row("matmul_bf16_8192", work, &mut || {
            probe(linear(x.clone(), x.clone()))
        });
    }
    for (name, backward, window) in [
        ("attn_full forward", false, None),
        ("attn_full forward+backward", true, None),
        ("attn_swa forward", false, Some(WINDOW)),
        ("attn_swa forward+backward", true, Some(WINDOW)),
    ] {
        let on = if backward { &tracked } else { device };
        let qkv = [(); 3].map(|()| {
            let x = random([1, TOKENS, HEADS, HEAD_SIZE], 1.0, on);
            if backward { x.require_grad() } else { x }
        });
        let dy: Tensor<4> = random([1, TOKENS, HEADS, HEAD_SIZE], 1.0, device);
        let n = TOKENS as f64;
        let visible = window.map_or((n + 1.0) / 2.0, |w| {
            let w = w as f64;
            w - w * (w - 1.0) / (2.0 * n)
        });
        let width = (HEADS * HEAD_SIZE) as f64;
        let flops = 4.0 * n * width * visible * if backward { 3.5 } else { 1.0 };
        row(name, Work::Flops(flops), &mut || {
            let [q, k, v] = qkv.clone();
            let spec = AttentionSpec {
                window,
                scale: (HEAD_SIZE as f64).powf(-0.5),
                query_offset: 0,
                packing: None,
            };
            let y = attention(q, k, v, spec);
            if !backward {
                return probe(y);
            }
            let gradients = backward_from(y, dy.clone());
            probe(
                qkv[0]
                    .grad(&gradients)
                    .unwrap_or_else(|| dy.clone() * f32::NAN),
            )
        });
    }
    {
        let h = random([TOKENS, HIDDEN], 1.0, &tracked).require_grad();
        let weight = random([VOCAB, HIDDEN], 0.02, &tracked).require_grad();
        let ids: Vec<i64> = (0..TOKENS as i64)
            .map(|i| i * 7919 % VOCAB as i64)
            .collect();
        let labels = Tensor::<1, Int>::from_data(TensorData::new(ids, [TOKENS]), device);
        let flops = 6.0 * (TOKENS * HIDDEN * VOCAB) as f64;
        row(
            "linear_ce forward+backward",
            Work::Flops(flops),
            &mut || {
                let scale = 1.0 / TOKENS as f64;
                linear_cross_entropy(h.clone(), weight.clone(), labels.clone(), scale).inner()
            },
        );
    }
    for (name, ttt) in [
        ("mlp_plain forward+backward", false),
        ("mlp_ttt forward+backward", true),
    ] {
        let x = random([1, TOKENS, HIDDEN], 1.0, &tracked).require_grad();
        let target = random([1, TOKENS, HIDDEN], 0.05, &tracked).require_grad();
        let up = [(); 2].map(|()| random([INTERMEDIATE, HIDDEN], 0.02, &tracked).require_grad());
        let down = random([HIDDEN, INTERMEDIATE], 0.02, &tracked).require_grad();
        let project = random([HIDDEN, HIDDEN], 0.02, &tracked).require_grad();
        let taps = random([HIDDEN, 1, 5], 0.5, &tracked).require_grad();
        let dy: Tensor<3> = random([1, TOKENS, HIDDEN], 1.0, device);
        let packing = Packing::whole_rows(1, TOKENS);
        let (n, d, f) = (TOKENS as f64, HIDDEN as f64, INTERMEDIATE as f64);
        let update = 2.0 * d * f * (1.0 - CHUNK as f64 / n) + 2.0 * d * d + 10.0 * d;
        let flops = 3.0 * n * (6.0 * d * f + if ttt { update } else { 0.0 });
        row(name, Work::Flops(flops), &mut || {
            let z = swiglu(
                linear(x.clone(), up[0].clone()),
                linear(x.clone(), up[1].clone()),
            );
            let y = match ttt {
                false => linear(z, down.clone()),
                true => {
                    let u = crate::ttt::chunk_conv(target.clone(), taps.clone(), &packing, CHUNK);
                    let v = linear(u, project.clone());
                    let spec = ScanSpec {
                        lr: 1e-3,
                        chunk: CHUNK,
                        clip: None,
                        packing: packing.clone(),
                    };
                    fast_weight_scan(z, v, down.clone(), spec).output
                }
            };
            let gradients = backward_from(y, dy.clone());
            probe(x.grad(&gradients).unwrap_or_else(|| dy.clone() * f32::NAN))
        });
    }
    elementwise(device, &mut row);
}

/// Takes a row's name, its work and what does it.
type Rows<'a> = dyn FnMut(&'static str, Work, &mut dyn FnMut() -> Tensor<1>) + 'a;

/// Operations that only move memory.
fn elementwise(device: &Device, row: &mut Rows<'_>) {
    let wide: Tensor<2> = random([TOKENS, INTERMEDIATE], 1.0, device);
    let x: Tensor<2> = random([TOKENS, HIDDEN], 1.0, device);
    let gain: Tensor<1> = random([HIDDEN], 1.0, device);
    let bytes = |elements: usize, passes: f64| Work::Bytes(2.0 * elements as f64 * passes);
    row(
        "swiglu forward",
        bytes(TOKENS * INTERMEDIATE, 3.0),
        &mut || probe(swiglu(wide.clone(), wide.clone())),
    );
    row("rms_norm forward", bytes(TOKENS * HIDDEN, 2.0), &mut || {
        probe(rms_norm(x.clone(), gain.clone(), 1e-6))
    });
    row("residual add", bytes(TOKENS * HIDDEN, 3.0), &mut || {
        probe(x.clone() + x.clone())
    });
    let table = Tensor::<2>::ones([TOKENS, HEAD_SIZE / 2], (device, DType::F32));
    let heads: Tensor<4> = x.clone().reshape([1, TOKENS, HEADS, HEAD_SIZE]);
    row("rope forward", bytes(TOKENS * HIDDEN, 2.25), &mut || {
        probe(rope(heads.clone(), table.clone(), table.clone()))
    });
    let rows: Tensor<2> = random([VOCAB, HIDDEN], 1.0, device);
    let ids: Vec<i64> = (0..TOKENS as i64)
        .map(|i| i * 7919 % VOCAB as i64)
        .collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, TOKENS]), device);
    row(
        "embedding forward",
        bytes(TOKENS * HIDDEN, 2.0),
        &mut || probe(embedding(ids.clone(), rows.clone(), DType::BF16)),
    );
}
