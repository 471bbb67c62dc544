//! The MLP half.

use burn::tensor::{DType, Tensor};

use super::stacked::{Stacked, split, weight_gradient};
use crate::cuda::gemm::Matrix;
use crate::cuda::hopper::gated_fits;
use crate::cuda::norm::{BackwardAt, Norm};
use crate::cuda::stream::{Arg, Buffer, Context, on_stream};
use crate::function::{Forward, Function, Value, apply};
use crate::fused::GateWeights;

/// `x + swiglu(rms_norm(x)) W_downᵀ`.
pub fn mlp(x: &Tensor<3>, w: &GateWeights, down: &Tensor<2>) -> Option<Tensor<3>> {
    let f = w.gate.dims()[0];
    let fits = fits(x, w)? && down.dtype() == DType::BF16 && down.dims() == [x.dims()[2], f];
    let half = Mlp { eps: w.eps };
    let inputs = [
        x.clone().into(),
        w.norm.clone().into(),
        w.gate.clone().into(),
        w.up.clone().into(),
        down.clone().into(),
    ];
    fits.then(|| apply(half, inputs).tensor())
}

/// `silu(n W_gateᵀ) ∘ (n W_upᵀ)` with n = `rms_norm(x)`.
pub fn gated(x: &Tensor<3>, w: &GateWeights) -> Option<Tensor<3>> {
    let inputs = [
        x.clone().into(),
        w.norm.clone().into(),
        w.gate.clone().into(),
        w.up.clone().into(),
    ];
    fits(x, w)?.then(|| apply(Gated { eps: w.eps }, inputs).tensor())
}

/// Whether there are kernels for these; `None` on another backend.
pub(super) fn fits(x: &Tensor<3>, w: &GateWeights) -> Option<bool> {
    let norm = Norm::of(&Buffer::of(x)?, &Buffer::of(w.norm)?, w.eps);
    let bf16 = [w.gate, w.up].iter().all(|m| m.dtype() == DType::BF16);
    let f = w.gate.dims()[0];
    Some(norm.is_some() && bf16 && f == w.up.dims()[0] && f.is_multiple_of(8))
}

/// x, the gain, gate and up matrices.
pub(super) struct Inputs {
    x: Buffer,
    gain: Buffer,
    gate: Buffer,
    up: Buffer,
    norm: Norm,
    /// F
    pub f: usize,
}

impl Inputs {
    pub fn new([x, gain, gate, up]: [Value; 4], eps: f64) -> Self {
        let of = "checked before the operation was chosen";
        let x = Buffer::of(&x.tensor::<3>()).expect(of);
        let gain = Buffer::of(&gain.tensor::<1>()).expect(of);
        let gate = Buffer::of(&gate.tensor::<2>()).expect(of);
        let up = Buffer::of(&up.tensor::<2>()).expect(of);
        let norm = Norm::of(&x, &gain, eps).expect(of);
        let f = gate.dims()[0];
        Self {
            x,
            gain,
            gate,
            up,
            norm,
            f,
        }
    }

    pub fn reads(&self) -> Vec<&Buffer> {
        vec![&self.x, &self.gain, &self.gate, &self.up]
    }

    fn bf16(&self, at: u64, columns: usize) -> Matrix {
        Matrix::new(at, self.norm.rows, columns, DType::BF16)
    }

    fn weights(&self, from: &[u64]) -> Stacked {
        Stacked::new(&from[2..4], &[self.f; 2], self.norm.width)
    }

    /// Gate and up side by side `[T, 2F]`, and Z `[T, F]`; `n` is scratch `[T, D]`. `pair` may be 0 where
    /// [`gated_fits`].
    fn forward(
        &self,
        cx: &mut Context,
        from: &[u64],
        (n, pair, z): (u64, u64, u64),
    ) -> Result<(), String> {
        self.norm.forward(cx, n, from[0], from[1])?;
        let (n, both) = (self.bf16(n, self.norm.width), self.bf16(pair, 2 * self.f));
        let matrix = |at| Matrix::new(at, self.f, self.norm.width, DType::BF16);
        if cx.gated_product(n, (matrix(from[2]), matrix(from[3])), (pair, z))? {
            return Ok(());
        }
        if pair == 0 {
            return Err("a product with SwiGLU was taken before and is not there now".into());
        }
        self.weights(from).forward(cx, n, &[(both, 0)])?;
        let vectors = (self.norm.rows * self.f / 8) as u64;
        let args = [
            Arg::Ptr(z),
            Arg::Ptr(pair),
            Arg::Size(vectors),
            Arg::Int(self.f as i32),
        ];
        cx.launch_over("swiglu_pair_forward", vectors, &args)
    }

    fn pair(&self) -> Buffer {
        self.x.empty([self.norm.rows, 2 * self.f], DType::BF16)
    }

    /// Memory for gate and up where there is no backward pass: none if they never leave the product.
    fn pair_to_pass(&self) -> Option<Buffer> {
        let inside = gated_fits(self.norm.width, self.f);
        (!inside).then(|| self.pair())
    }

    /// Gate and up side by side, and Z `[B, N, F]`.
    pub fn pair_and_z(&self) -> (Buffer, Tensor<3>) {
        let pair = self.pair();
        let z = self.z(Some(&pair));
        (pair, z)
    }

    /// Z `[B, N, F]` alone.
    pub fn only_z(&self) -> Tensor<3> {
        self.z(self.pair_to_pass().as_ref())
    }

    fn z(&self, pair: Option<&Buffer>) -> Tensor<3> {
        let (t, d) = (self.norm.rows, self.norm.width);
        let [batch, tokens] = [self.x.dims()[0], self.x.dims()[1]];
        let n = self.x.empty([t, d], DType::BF16);
        let z = self.x.empty([batch, tokens, self.f], DType::BF16);
        let mut writes = vec![&n, &z];
        writes.extend(pair);
        on_stream(&self.reads(), &writes, |cx, from, to| {
            let pair = to.get(2).copied().unwrap_or(0);
            self.forward(cx, from, (to[0], pair, to[1]))
        });
        z.tensor()
    }

    /// x + Z W_downᵀ.
    fn through_down(&self, down: &Buffer, pair: Option<&Buffer>) -> Tensor<3> {
        let (t, d) = (self.norm.rows, self.norm.width);
        let y = self.x.empty(self.x.dims(), DType::BF16);
        let n = self.x.empty([t, d], DType::BF16);
        let z = self.x.empty([t, self.f], DType::BF16);
        let mut reads = self.reads();
        reads.push(down);
        let mut writes = vec![&y, &n, &z];
        writes.extend(pair);
        on_stream(&reads, &writes, |cx, from, to| {
            let pair = to.get(3).copied().unwrap_or(0);
            self.forward(cx, from, (to[1], pair, to[2]))?;
            let w = Matrix::new(from[4], d, self.f, DType::BF16);
            let (z, y) = (self.bf16(to[2], self.f), self.bf16(to[0], d));
            cx.gemm_onto(z, w.t(), y, from[0], 1.0, 1.0)
        });
        y.tensor()
    }

    /// From dZ in `at.dz` to the gradients of x, gain, and of gate and up one below the other.
    pub fn backward(&self, cx: &mut Context, from: &[u64], at: &GatedAt) -> Result<(), String> {
        let (width, both) = (self.norm.width, 2 * self.f);
        let dpair = self.bf16(at.dpair, both);
        let dn = self.bf16(at.dn, width);
        self.weights(from).input_gradient(cx, &[(dpair, 0)], dn)?;
        let norm = BackwardAt {
            x: from[0],
            weight: from[1],
            dy: at.dn,
            residual: at.residual,
            dx: at.dx,
            dw: at.dgain,
            y: at.n,
            partial: at.partial,
        };
        self.norm.backward(cx, &norm)?;
        weight_gradient(cx, &[(dpair, 0)], self.bf16(at.n, width), at.dw)
    }

    /// See [`through_swiglu`].
    pub fn through_swiglu(
        &self,
        cx: &mut Context,
        to: (u64, u64),
        from: (u64, u64),
    ) -> Result<(), String> {
        through_swiglu(cx, to, from, (self.norm.rows, self.f))
    }

    pub fn results(&self) -> Results {
        let both = [self.norm.rows, 2 * self.f];
        self.results_with(self.x.empty(both, DType::BF16))
    }

    /// The same with the gradients of gate and up, which may be known.
    pub fn results_with(&self, dpair: Buffer) -> Results {
        let (t, d) = (self.norm.rows, self.norm.width);
        Results {
            dx: self.x.empty(self.x.dims(), DType::BF16),
            dgain: self.x.empty([d], DType::F32),
            dw: self.x.empty([2 * self.f, d], DType::BF16),
            n: self.x.empty([t, d], DType::BF16),
            dn: self.x.empty([t, d], DType::BF16),
            dpair,
            partial: self.norm.partial(&self.x),
        }
    }
}

/// d(gate, up) from dZ, and Z itself into `z` unless that is 0; `extents`: T and F.
pub fn through_swiglu(
    cx: &mut Context,
    (dpair, z): (u64, u64),
    (pair, dz): (u64, u64),
    extents: (usize, usize),
) -> Result<(), String> {
    let vectors = (extents.0 * extents.1 / 8) as u64;
    let args = [
        Arg::Ptr(dpair),
        Arg::Ptr(z),
        Arg::Ptr(pair),
        Arg::Ptr(dz),
        Arg::Size(vectors),
        Arg::Int(extents.1 as i32),
    ];
    cx.launch_over("swiglu_pair_backward", vectors, &args)
}

/// What the backward pass of [`Inputs`] writes.
pub(super) struct Results {
    dx: Buffer,
    dgain: Buffer,
    dw: Buffer,
    n: Buffer,
    dn: Buffer,
    dpair: Buffer,
    partial: Buffer,
}

/// The addresses of [`Results`] and of what is added to dx (0: nothing).
pub(super) struct GatedAt {
    dx: u64,
    dgain: u64,
    dw: u64,
    n: u64,
    dn: u64,
    pub dpair: u64,
    partial: u64,
    residual: u64,
}

impl Results {
    pub fn writes(&self) -> Vec<&Buffer> {
        vec![
            &self.dx,
            &self.dgain,
            &self.dw,
            &self.n,
            &self.dn,
            &self.dpair,
            &self.partial,
        ]
    }

    pub fn at(to: &[u64], residual: u64) -> GatedAt {
        GatedAt {
            dx: to[0],
            dgain: to[1],
            dw: to[2],
            n: to[3],
            dn: to[4],
            dpair: to[5],
            partial: to[6],
            residual,
        }
    }

    /// dx, dgain, dgate, dup.
    pub fn gradients(self, f: usize) -> [Value; 4] {
        let [dgate, dup] = split(self.dw, [f; 2]);
        [
            self.dx.tensor::<3>().into(),
            self.dgain.tensor::<1>().into(),
            dgate.into(),
            dup.into(),
        ]
    }
}

#[derive(Debug)]
struct Gated {
    eps: f64,
}

/// The inputs, and gate and up side by side.
type Saved<const N: usize> = ([Value; N], Buffer);

impl Function<4> for Gated {
    type Saved = Saved<4>;

    fn forward(&self, inputs: [Value; 4]) -> Forward<Self::Saved> {
        let (pair, z) = Inputs::new(inputs.clone(), self.eps).pair_and_z();
        Forward {
            output: z.into(),
            extra: vec![],
            saved: (inputs, pair),
        }
    }

    fn forward_only(&self, inputs: [Value; 4]) -> (Value, Vec<Value>) {
        let z = Inputs::new(inputs, self.eps).only_z();
        (z.into(), vec![])
    }

    fn backward(self, (inputs, pair): Self::Saved, dz: Value, _: [bool; 4]) -> [Option<Value>; 4] {
        let i = Inputs::new(inputs, self.eps);
        let dz = gradient(dz);
        let r = i.results();
        let mut reads = i.reads();
        reads.extend([&pair, &dz]);
        on_stream(&reads, &r.writes(), |cx, from, to| {
            let at = Results::at(to, 0);
            i.through_swiglu(cx, (at.dpair, 0), (from[4], from[5]))?;
            i.backward(cx, from, &at)
        });
        r.gradients(i.f).map(Some)
    }
}

#[derive(Debug)]
struct Mlp {
    eps: f64,
}

impl Function<5> for Mlp {
    type Saved = Saved<5>;

    fn forward(&self, inputs: [Value; 5]) -> Forward<Self::Saved> {
        let (i, down) = with_down(inputs.clone(), self.eps);
        let pair = i.pair();
        Forward {
            output: i.through_down(&down, Some(&pair)).into(),
            extra: vec![],
            saved: (inputs, pair),
        }
    }

    fn forward_only(&self, inputs: [Value; 5]) -> (Value, Vec<Value>) {
        let (i, down) = with_down(inputs, self.eps);
        let y = i.through_down(&down, i.pair_to_pass().as_ref());
        (y.into(), vec![])
    }

    fn backward(self, (inputs, pair): Self::Saved, dy: Value, _: [bool; 5]) -> [Option<Value>; 5] {
        let (i, down) = with_down(inputs, self.eps);
        let (t, d) = (i.norm.rows, i.norm.width);
        let dy = gradient(dy);
        let r = i.results();
        let ddown = i.x.empty([d, i.f], DType::BF16);
        // Z; where there is no fused product, dZ first.
        let z = i.x.empty([t, i.f], DType::BF16);
        let mut reads = i.reads();
        reads.extend([&down, &pair, &dy]);
        let mut writes = r.writes();
        writes.extend([&ddown, &z]);
        on_stream(&reads, &writes, |cx, from, to| {
            let at = Results::at(to, from[6]);
            let (dy, z) = (i.bf16(from[6], d), i.bf16(to[8], i.f));
            let w = Matrix::new(from[4], d, i.f, DType::BF16);
            if !cx.gated_product_backward(dy, w, from[5], (at.dpair, z.at))? {
                cx.gemm(dy, w, z, 1.0, 0.0)?;
                i.through_swiglu(cx, (at.dpair, z.at), (from[5], z.at))?;
            }
            let dw = Matrix::new(to[7], d, i.f, DType::BF16);
            cx.gemm(dy.t(), z, dw, 1.0, 0.0)?;
            i.backward(cx, from, &at)
        });
        let [dx, dgain, dgate, dup] = r.gradients(i.f);
        let ddown: Value = ddown.tensor::<2>().into();
        [dx, dgain, dgate, dup, ddown].map(Some)
    }
}

fn with_down([x, gain, gate, up, down]: [Value; 5], eps: f64) -> (Inputs, Buffer) {
    let down = Buffer::of(&down.tensor::<2>()).expect("checked before the operation was chosen");
    (Inputs::new([x, gain, gate, up], eps), down)
}

/// The incoming gradient, in bf16 as the result was.
pub(super) fn gradient(dy: Value) -> Buffer {
    let dy = crate::dtype::cast(dy.tensor::<3>(), DType::BF16);
    Buffer::of(&dy).expect("a gradient lives where its value does")
}
