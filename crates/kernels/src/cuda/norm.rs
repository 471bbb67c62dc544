//! RMSNorm.

use burn::tensor::{DType, Tensor};

use super::stream::{Arg, Buffer, Context, on_stream};

/// Rows of the partial sums of the weight's gradient, per multiprocessor: fewer leave the memory
/// idle, more cost a longer second pass.
const GROUPS: usize = 8;

/// A normalisation of rows whose memory is elsewhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    /// T
    pub rows: usize,
    /// K
    pub width: usize,
    eps: f32,
    gain_is_f32: bool,
}

/// Where the backward pass finds and leaves its tensors; 0 where it does without.
pub(super) struct BackwardAt {
    /// `[T, K]`
    pub x: u64,
    /// `[K]`
    pub weight: u64,
    /// `[T, K]`
    pub dy: u64,
    /// Added to dx: `[T, K]`, optional.
    pub residual: u64,
    /// `[T, K]`
    pub dx: u64,
    /// `[K]` f32
    pub dw: u64,
    /// The forward's result again: `[T, K]`, optional.
    pub y: u64,
    /// Memory of [`Norm::partial`].
    pub partial: u64,
}

impl Norm {
    /// The normalisation of x (rows of its last dimension) by `weight` `[K]`; `None` where the
    /// kernels have no form for it.
    pub fn of(x: &Buffer, weight: &Buffer, eps: f64) -> Option<Self> {
        let width = *x.dims().last()?;
        let rows = x.len() / width.max(1);
        let fits = width.is_multiple_of(8) && width <= 8192 && rows > 0 && weight.len() == width;
        let types = x.dtype() == DType::BF16 && matches!(weight.dtype(), DType::BF16 | DType::F32);
        (fits && types).then_some(Self {
            rows,
            width,
            eps: eps as f32,
            gain_is_f32: weight.dtype() == DType::F32,
        })
    }

    /// Whether a warp, not a block, takes a row.
    fn warp(&self) -> bool {
        self.width <= 256
    }

    fn threads(&self) -> u32 {
        let threads = if self.warp() {
            128
        } else {
            self.width.div_ceil(256) * 32
        };
        threads as u32
    }

    /// Blocks for `per_processor` groups on each multiprocessor, and the groups in all.
    fn grid(&self, cx: &mut Context, per_processor: usize) -> Result<(u32, usize), String> {
        let per_block = if self.warp() { 4 } else { 1 };
        let most = cx.processors()? as usize * per_processor;
        let blocks = most.min(self.rows).div_ceil(per_block).max(1);
        Ok((blocks as u32, blocks * per_block))
    }

    fn groups_per_processor(&self) -> usize {
        if self.warp() { 8 * GROUPS } else { GROUPS }
    }

    /// Room for the partial sums of the weight's gradient: as much as the GPU with the most
    /// multiprocessors would use, because this one's are known only on the device thread.
    pub fn partial(&self, like: &Buffer) -> Buffer {
        let groups = MOST_PROCESSORS * self.groups_per_processor() + 4;
        like.empty([groups, self.width], DType::F32)
    }

    /// y ← w ∘ x / rms(x).
    pub fn forward(&self, cx: &mut Context, y: u64, x: u64, weight: u64) -> Result<(), String> {
        let name = match self.warp() {
            true => "rms_norm_forward_warp",
            false => "rms_norm_forward_block",
        };
        let (blocks, _) = self.grid(cx, if self.warp() { 64 } else { 32 })?;
        let args = [
            Arg::Ptr(y),
            Arg::Ptr(x),
            Arg::Ptr(weight),
            Arg::Int(i32::from(self.gain_is_f32)),
            Arg::Int(self.rows as i32),
            Arg::Int(self.width as i32),
            Arg::Float(self.eps),
        ];
        cx.launch(name, (blocks, 1, 1), self.threads(), &args)
    }

    /// The gradients of x and weight.
    pub fn backward(&self, cx: &mut Context, at: &BackwardAt) -> Result<(), String> {
        let name = match (self.warp(), self.threads()) {
            (true, _) => "rms_norm_backward_warp",
            (_, ..=512) => "rms_norm_backward_block",
            _ => "rms_norm_backward_wide",
        };
        let (blocks, groups) = self.grid(cx, self.groups_per_processor())?;
        let args = [
            Arg::Ptr(at.dx),
            Arg::Ptr(at.y),
            Arg::Ptr(at.partial),
            Arg::Ptr(at.x),
            Arg::Ptr(at.weight),
            Arg::Int(i32::from(self.gain_is_f32)),
            Arg::Ptr(at.dy),
            Arg::Ptr(at.residual),
            Arg::Int(self.rows as i32),
            Arg::Int(self.width as i32),
            Arg::Float(self.eps),
        ];
        cx.launch(name, (blocks, 1, 1), self.threads(), &args)?;
        sum_partials(cx, at.dw, at.partial, groups, self.width)
    }
}

/// x `[T, K]` bf16, weight `[K]`.
pub fn forward(x: &Tensor<2>, weight: &Tensor<1>, eps: f64) -> Option<Tensor<2>> {
    let (x, weight) = (Buffer::of(x)?, Buffer::of(weight)?);
    let norm = Norm::of(&x, &weight, eps)?;
    let y = x.empty([norm.rows, norm.width], DType::BF16);
    on_stream(&[&x, &weight], &[&y], |cx, from, to| {
        norm.forward(cx, to[0], from[0], from[1])
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
    if dy.dtype() != DType::BF16 {
        return None;
    }
    let norm = Norm::of(&x, &weight, eps)?;
    let dx = x.empty([norm.rows, norm.width], DType::BF16);
    let dw = x.empty([norm.width], DType::F32);
    let partial = norm.partial(&x);
    on_stream(
        &[&x, &weight, &dy],
        &[&dx, &dw, &partial],
        |cx, from, to| {
            let at = BackwardAt {
                x: from[0],
                weight: from[1],
                dy: from[2],
                residual: 0,
                dx: to[0],
                dw: to[1],
                y: 0,
                partial: to[2],
            };
            norm.backward(cx, &at)
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
    // A warp serves 32 columns; of fewer, most of its lanes would have nothing to add.
    if columns < 16 {
        return cx.launch("sum_few_partials", (columns as u32, 1, 1), 1024, &args);
    }
    let blocks = columns.div_ceil(32) as u32;
    cx.launch("sum_partials", (blocks, 1, 1), 256, &args)
}
