//! RMSNorm.

use burn::tensor::{DType, Tensor};

use super::stream::{Arg, Buffer, Context, on_stream};

/// Rows of the partial sums of the weight's gradient, per multiprocessor: fewer leave the memory
/// idle, more cost a longer second pass.
const GROUPS: usize = 8;

struct Shape {
    rows: usize,
    width: usize,
    threads: u32,
    warp: bool,
}

fn shape(x: &Buffer, weight: &Buffer) -> Option<Shape> {
    let dims = x.dims();
    let (rows, width) = (dims[0], dims[1]);
    let fits = width.is_multiple_of(8) && width <= 8192 && rows > 0;
    let types = x.dtype() == DType::BF16 && matches!(weight.dtype(), DType::BF16 | DType::F32);
    if !fits || !types {
        return None;
    }
    let warp = width <= 256;
    let threads = if warp { 128 } else { width.div_ceil(256) * 32 };
    Some(Shape {
        rows,
        width,
        threads: threads as u32,
        warp,
    })
}

/// Blocks for `per_processor` groups on each multiprocessor, and the groups in all.
fn grid(cx: &mut Context, s: &Shape, per_processor: usize) -> Result<(u32, usize), String> {
    let per_block = if s.warp { 4 } else { 1 };
    let most = cx.processors()? as usize * per_processor;
    let blocks = most.min(s.rows).div_ceil(per_block).max(1);
    Ok((blocks as u32, blocks * per_block))
}

fn gain_is_f32(weight: &Buffer) -> Arg {
    Arg::Int(i32::from(weight.dtype() == DType::F32))
}

/// x `[T, K]` bf16, weight `[K]`.
pub fn forward(x: &Tensor<2>, weight: &Tensor<1>, eps: f64) -> Option<Tensor<2>> {
    let (x, weight) = (Buffer::of(x)?, Buffer::of(weight)?);
    let s = shape(&x, &weight)?;
    let y = x.empty([s.rows, s.width], DType::BF16);
    on_stream(&[&x, &weight], &[&y], |cx, from, to| {
        let name = match s.warp {
            true => "rms_norm_forward_warp",
            false => "rms_norm_forward_block",
        };
        let (blocks, _) = grid(cx, &s, if s.warp { 64 } else { 32 })?;
        let args = [
            Arg::Ptr(to[0]),
            Arg::Ptr(from[0]),
            Arg::Ptr(from[1]),
            gain_is_f32(&weight),
            Arg::Int(s.rows as i32),
            Arg::Int(s.width as i32),
            Arg::Float(eps as f32),
        ];
        cx.launch(name, (blocks, 1, 1), s.threads, &args)
    });
    Some(y.tensor())
}

/// dx `[T, K]` bf16 and dw `[K]` f32.
pub fn backward(
    x: &Tensor<2>,
    weight: &Tensor<1>,
    dy: &Tensor<2>,
    eps: f64,
) -> Option<(Tensor<2>, Tensor<1>)> {
    let (x, weight, dy) = (Buffer::of(x)?, Buffer::of(weight)?, Buffer::of(dy)?);
    let s = shape(&x, &weight)?;
    if dy.dtype() != DType::BF16 {
        return None;
    }
    let dx = x.empty([s.rows, s.width], DType::BF16);
    let dw = x.empty([s.width], DType::F32);
    // The most groups that any GPU would use: the kernel's grid is known only on the device thread.
    let per_processor = if s.warp { 8 * GROUPS } else { GROUPS };
    let partial = x.empty([MOST_PROCESSORS * per_processor + 4, s.width], DType::F32);
    on_stream(
        &[&x, &weight, &dy],
        &[&dx, &dw, &partial],
        |cx, from, to| {
            let name = match s.warp {
                true => "rms_norm_backward_warp",
                false => "rms_norm_backward_block",
            };
            let (blocks, groups) = grid(cx, &s, per_processor)?;
            let args = [
                Arg::Ptr(to[0]),
                Arg::Ptr(to[2]),
                Arg::Ptr(from[0]),
                Arg::Ptr(from[1]),
                gain_is_f32(&weight),
                Arg::Ptr(from[2]),
                Arg::Int(s.rows as i32),
                Arg::Int(s.width as i32),
                Arg::Float(eps as f32),
            ];
            cx.launch(name, (blocks, 1, 1), s.threads, &args)?;
            sum_partials(cx, to[1], to[2], groups, s.width)
        },
    );
    Some((dx.tensor(), dw.tensor()))
}

/// No GPU has more multiprocessors; bounds the partial sums.
pub(super) const MOST_PROCESSORS: usize = 192;

/// out[c] = Σ_g partial[g, c], in a fixed order.
pub(super) fn sum_partials(
    cx: &mut Context,
    out: u64,
    partial: u64,
    groups: usize,
    columns: usize,
) -> Result<(), String> {
    let args = [
        Arg::Ptr(out),
        Arg::Ptr(partial),
        Arg::Int(groups as i32),
        Arg::Int(columns as i32),
    ];
    let blocks = columns.div_ceil(32) as u32;
    cx.launch("sum_partials", (blocks, 1, 1), 256, &args)
}
