//! Matrix products through cuBLASLt.
//!
//! cuBLASLt proposes several algorithms for a shape, and its first is not always its fastest. So the
//! first call of a shape times them on its own operands, a few milliseconds in all, and the choice is
//! kept for good.

use std::collections::HashMap;

use burn::tensor::{DType, Tensor};
use cudarc::cublaslt::{result as lt, sys};

use super::gemm_plan::{Key, Operands, Plan, WORKSPACE, failed, new_plan};
use super::stream::{Buffer, Context};
use super::{profile, scratch};
use crate::deterministic;
use crate::libraries;

/// Row-major `[rows, columns]` at a device address, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Address of the first element.
    pub at: u64,
    /// Rows, as used.
    pub rows: usize,
    /// Columns, as used.
    pub columns: usize,
    /// Elements between neighbouring rows (columns, if transposed) in memory.
    pub ld: usize,
    /// Whether memory holds the transpose.
    pub transposed: bool,
    /// bf16 or f32.
    pub dtype: DType,
    /// Number of such matrices, and the elements from one to the next.
    pub batch: (usize, usize),
}

impl Matrix {
    /// A dense matrix at `at`.
    pub fn new(at: u64, rows: usize, columns: usize, dtype: DType) -> Self {
        Self {
            at,
            rows,
            columns,
            ld: columns,
            transposed: false,
            dtype,
            batch: (1, 0),
        }
    }

    /// The transpose, without a copy.
    pub fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            transposed: !self.transposed,
            ..self
        }
    }

    /// Columns `from .. from + count`; not of a transpose.
    pub fn cut_columns(self, from: usize, count: usize) -> Self {
        debug_assert!(!self.transposed && from + count <= self.columns);
        Self {
            at: self.at + (from * self.dtype.size()) as u64,
            columns: count,
            ..self
        }
    }

    /// `count` matrices, `stride` elements apart.
    pub fn batched(self, count: usize, stride: usize) -> Self {
        Self {
            batch: (count, stride),
            ..self
        }
    }
}

/// A tensor as a matrix whose address is not known yet.
#[derive(Clone, Debug)]
pub struct Operand {
    /// The memory.
    pub buffer: Buffer,
    rows: usize,
    columns: usize,
    ld: usize,
    transposed: bool,
}

impl Operand {
    /// `tensor` `[rows, columns]`, transposed views as they lie; `None` on another backend.
    pub fn of(tensor: &Tensor<2>) -> Option<Self> {
        let buffer = Buffer::strided(tensor)?;
        let (dims, strides) = (buffer.dims(), buffer.strides());
        let (rows, columns) = (dims[0], dims[1]);
        let (ld, transposed) = match (strides[0], strides[1]) {
            (ld, 1) if ld >= columns => (ld, false),
            (1, ld) if ld >= rows => (ld, true),
            _ => {
                let buffer = Buffer::of(tensor)?;
                return Some(Self {
                    buffer,
                    rows,
                    columns,
                    ld: columns,
                    transposed: false,
                });
            }
        };
        Some(Self {
            buffer,
            rows,
            columns,
            ld,
            transposed,
        })
    }

    /// The matrix at its address.
    pub fn at(&self, at: u64) -> Matrix {
        Matrix {
            at,
            rows: self.rows,
            columns: self.columns,
            ld: self.ld,
            transposed: self.transposed,
            dtype: self.buffer.dtype(),
            batch: (1, 0),
        }
    }
}

/// The library handle, the workspace and the plans of the device thread.
#[derive(Default)]
pub struct Gemms {
    opened: Option<(sys::cublasLtHandle_t, u64)>,
    /// By product and the multiprocessors it is laid out for, where that is not all.
    plans: HashMap<(Key, Option<u32>), Plan>,
}

impl Gemms {
    fn opened(&mut self) -> Result<(sys::cublasLtHandle_t, u64), String> {
        if let Some(opened) = self.opened {
            return Ok(opened);
        }
        // SAFETY: only asks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            let (package, wheel) = ("libcublas-13-0", "nvidia-cublas");
            return Err(libraries::missing("libcublasLt", package, wheel));
        }
        let handle = lt::create_handle().map_err(failed("create"))?;
        let workspace = scratch::allocate(WORKSPACE, "cuBLASLt")?; // kept for good
        Ok(*self.opened.insert((handle, workspace)))
    }

    fn plan(
        &mut self,
        handle: sys::cublasLtHandle_t,
        key: Key,
        processors: Option<u32>,
    ) -> Result<&mut Plan, String> {
        use std::collections::hash_map::Entry;
        match self.plans.entry((key, processors)) {
            Entry::Occupied(found) => Ok(found.into_mut()),
            Entry::Vacant(free) => Ok(free.insert(new_plan(handle, key, processors)?)),
        }
    }
}

impl Context<'_> {
    /// C ← alpha · A B + beta · C, sums in f32: `[m, k] · [k, n] → [m, n]`. C must not be transposed.
    pub fn gemm(
        &mut self,
        a: Matrix,
        b: Matrix,
        c: Matrix,
        alpha: f32,
        beta: f32,
    ) -> Result<(), String> {
        self.gemm_onto(a, b, c, c.at, alpha, beta)
    }

    /// D ← alpha · A B + beta · C, where `c` lies as D does, elsewhere or in the same place.
    pub fn gemm_onto(
        &mut self,
        a: Matrix,
        b: Matrix,
        d: Matrix,
        c: u64,
        alpha: f32,
        beta: f32,
    ) -> Result<(), String> {
        if a.columns != b.rows || (d.rows, d.columns) != (a.rows, b.columns) || d.transposed {
            return Err(format!("GEMM of unfit matrices: {a:?} · {b:?} → {d:?}"));
        }
        let key = Key {
            m: a.rows,
            n: b.columns,
            k: a.columns,
            a: (a.ld, a.transposed, a.batch.1, a.dtype),
            b: (b.ld, b.transposed, b.batch.1, b.dtype),
            c: (d.ld, d.batch.1, d.dtype),
            batch: d.batch.0,
            accumulates: beta != 0.0,
            aligned: [a.at, b.at, c, d.at].iter().all(|at| at % 16 == 0),
        };
        // Row-major D = A B is column-major Dᵀ = Bᵀ Aᵀ.
        let operands = Operands {
            a: b.at,
            b: a.at,
            c,
            d: d.at,
            alpha,
            beta,
        };
        let opened = self.gemms.opened()?;
        let stream = self.stream;
        let processors = self.processors_beside_exchanges()?;
        let plan = self.gemms.plan(opened.0, key, processors)?;
        let repeatable = beta == 0.0 || c != d.at;
        // Which one wins differs from run to run, and so do its roundings.
        if plan.algos.len() > 1 && repeatable && !deterministic::is_on() {
            plan.race(opened, &operands, stream)?;
        }
        profile::timed(
            stream,
            || key.described(),
            || plan.run(opened, &plan.algos[0], &operands, stream),
        )
    }
}
