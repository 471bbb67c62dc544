//! Plans of cuBLASLt: what a product of some shape needs, made once, with the fastest of the library's
//! proposals.

use std::ffi::c_void;

use burn::tensor::DType;
use cudarc::cublaslt::{result as lt, sys};
use cudarc::driver::result as driver;
use cudarc::driver::sys::{CUevent_flags, CUstream};

use crate::work::Work;

/// cuBLAS's advice for Hopper.
pub const WORKSPACE: usize = 32 << 20;

/// Algorithms that compete for a shape.
const CANDIDATES: usize = 8;

/// Runs of a candidate that are timed, after one that is not.
const TIMED: u32 = 3;

/// What a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: (usize, bool, usize, DType),
    pub b: (usize, bool, usize, DType),
    pub c: (usize, usize, DType),
    pub batch: usize,
    pub accumulates: bool,
    /// Addresses are multiples of 16: what the fast kernels want.
    pub aligned: bool,
}

impl Key {
    /// For a profile.
    pub fn described(&self) -> (String, Option<Work>) {
        let Self { m, n, k, batch, .. } = *self;
        let turned = |t: bool| if t { "ᵀ" } else { "" };
        let (a, b) = (turned(self.a.1), turned(self.b.1));
        let to = match self.c.2 {
            DType::BF16 => "",
            DType::F32 => " f32",
            _ => " ?",
        };
        let sum = if self.accumulates { " +=" } else { "" };
        let times = match batch {
            1 => String::new(),
            _ => format!("{batch} x "),
        };
        let flops = 2.0 * (batch * m) as f64 * (n * k) as f64;
        let name = format!("gemm {times}{m}x{k}x{n}, A{a} B{b} ->{sum}{to}");
        (name, Some(Work::Flops(flops)))
    }
}

pub struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
    /// The first is in use; the others wait for the race.
    pub algos: Vec<sys::cublasLtMatmulAlgo_t>,
}

/// The addresses of one product in cuBLASLt's order, and its factors.
#[derive(Clone, Copy)]
pub struct Operands {
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub d: u64,
    pub alpha: f32,
    pub beta: f32,
}

pub fn failed(what: &str) -> impl Fn(lt::CublasError) -> String + '_ {
    move |e| format!("cuBLASLt {what}: {e}")
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType, String> {
    match dtype {
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        other => Err(format!("no GEMM for {other:?}")),
    }
}

fn set<T>(
    desc: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<(), String> {
    // SAFETY: the attribute's value has type T.
    unsafe {
        lt::set_matmul_desc_attribute(desc, attribute, (&raw const value).cast(), size_of::<T>())
    }
    .map_err(failed("descriptor"))
}

/// `batch` matrices of `rows` × `columns` elements in column-major terms.
fn layout(
    dtype: DType,
    (rows, columns): (usize, usize),
    ld: usize,
    batch: usize,
    stride: usize,
) -> Result<sys::cublasLtMatrixLayout_t, String> {
    use sys::cublasLtMatrixLayoutAttribute_t::*;
    let layout =
        lt::create_matrix_layout(data_type(dtype)?, rows as u64, columns as u64, ld as i64)
            .map_err(failed("layout"))?;
    if batch > 1 {
        let (batch, stride) = (batch as i32, stride as i64);
        // SAFETY: the attributes are an i32 and an i64.
        unsafe {
            lt::set_matrix_layout_attribute(
                layout,
                CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                (&raw const batch).cast(),
                4,
            )
            .map_err(failed("layout"))?;
            lt::set_matrix_layout_attribute(
                layout,
                CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                (&raw const stride).cast(),
                8,
            )
            .map_err(failed("layout"))?;
        }
    }
    Ok(layout)
}

/// cuBLASLt is column-major: row-major C = A B is its Cᵀ = Bᵀ Aᵀ, with B as first operand. `processors`:
/// multiprocessors to lay it out for, where that is not all of them.
pub fn new_plan(
    handle: sys::cublasLtHandle_t,
    key: Key,
    processors: Option<u32>,
) -> Result<Plan, String> {
    use sys::cublasLtMatmulDescAttributes_t::*;
    let desc = lt::create_matmul_desc(
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        sys::cudaDataType::CUDA_R_32F,
    )
    .map_err(failed("descriptor"))?;
    let (a_ld, a_t, a_stride, a_type) = key.a;
    let (b_ld, b_t, b_stride, b_type) = key.b;
    let (c_ld, c_stride, c_type) = key.c;
    set(desc, CUBLASLT_MATMUL_DESC_TRANSA, i32::from(b_t))?;
    set(desc, CUBLASLT_MATMUL_DESC_TRANSB, i32::from(a_t))?;
    if let Some(count) = processors {
        set(desc, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, count as i32)?;
    }
    let swap = |rows, columns, t: bool| if t { (columns, rows) } else { (rows, columns) };
    let first = layout(b_type, swap(key.n, key.k, b_t), b_ld, key.batch, b_stride)?;
    let second = layout(a_type, swap(key.k, key.m, a_t), a_ld, key.batch, a_stride)?;
    let out = layout(c_type, (key.n, key.m), c_ld, key.batch, c_stride)?;
    let preference = lt::create_matmul_pref().map_err(failed("preference"))?;
    let workspace = WORKSPACE;
    let alignment: u32 = if key.aligned { 16 } else { 2 };
    // Where k is split, its parts are added in f32, not in the narrower precision of the result.
    let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    use sys::cublasLtMatmulPreferenceAttributes_t::*;
    // SAFETY: the attributes are a usize and u32; the objects live.
    let found = unsafe {
        lt::set_matmul_pref_attribute(
            preference,
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<usize>(),
        )
        .map_err(failed("preference"))?;
        if c_type != DType::F32 {
            lt::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                (&raw const reductions).cast(),
                size_of::<u32>(),
            )
            .map_err(failed("preference"))?;
        }
        for which in [
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            lt::set_matmul_pref_attribute(preference, which, (&raw const alignment).cast(), 4)
                .map_err(failed("preference"))?;
        }
        let mut found = [std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>(); CANDIDATES];
        let mut count = 0;
        sys::cublasLtMatmulAlgoGetHeuristic(
            handle,
            desc,
            first,
            second,
            out,
            out,
            preference,
            CANDIDATES as i32,
            found.as_mut_ptr(),
            &mut count,
        )
        .result()
        .map(|()| found[..count as usize].to_vec())
    }
    .map_err(|e| format!("cuBLASLt heuristic for {}×{}×{}: {e}", key.m, key.n, key.k))?;
    // SAFETY: not used again.
    let _ = unsafe { lt::destroy_matmul_pref(preference) };
    let usable = found.iter().filter(|f| f.state.result().is_ok());
    let algos: Vec<_> = usable.map(|f| f.algo).collect();
    if algos.is_empty() {
        return Err(format!(
            "cuBLASLt has no algorithm for {}×{}×{} ({a_type:?}, {b_type:?} → {c_type:?})",
            key.m, key.n, key.k
        ));
    }
    Ok(Plan {
        desc,
        a: first,
        b: second,
        c: out,
        algos,
    })
}

impl Plan {
    pub fn run(
        &self,
        (handle, workspace): (sys::cublasLtHandle_t, u64),
        algo: &sys::cublasLtMatmulAlgo_t,
        o: &Operands,
        stream: CUstream,
    ) -> Result<(), String> {
        // SAFETY: the plan's objects live; the addresses belong to buffers that the caller holds and
        // whose extents the layouts describe; all work is on one stream, so the workspace is free.
        unsafe {
            lt::matmul(
                handle,
                self.desc,
                (&raw const o.alpha).cast(),
                (&raw const o.beta).cast(),
                o.a as *const c_void,
                self.a,
                o.b as *const c_void,
                self.b,
                o.c as *const c_void,
                self.c,
                o.d as *mut c_void,
                self.c,
                algo,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(failed("matmul"))
    }

    /// Leaves the fastest algorithm alone in the plan. The product is computed several times, so its
    /// result must not be an input.
    pub fn race(
        &mut self,
        opened: (sys::cublasLtHandle_t, u64),
        o: &Operands,
        stream: CUstream,
    ) -> Result<(), String> {
        let event = |e| format!("cuBLASLt race: {e}");
        let flags = CUevent_flags::CU_EVENT_DEFAULT;
        let (start, end) = (
            driver::event::create(flags).map_err(event)?,
            driver::event::create(flags).map_err(event)?,
        );
        let mut best = (f32::INFINITY, 0);
        for (i, algo) in self.algos.iter().enumerate() {
            self.run(opened, algo, o, stream)?;
            // SAFETY: the events and the stream live.
            unsafe { driver::event::record(start, stream) }.map_err(event)?;
            for _ in 0..TIMED {
                self.run(opened, algo, o, stream)?;
            }
            // SAFETY: as above.
            let took = unsafe {
                driver::event::record(end, stream).map_err(event)?;
                driver::event::synchronize(end).map_err(event)?;
                driver::event::elapsed(start, end).map_err(event)?
            };
            if took < best.0 {
                best = (took, i);
            }
        }
        // SAFETY: not used again.
        unsafe {
            driver::event::destroy(start).map_err(event)?;
            driver::event::destroy(end).map_err(event)?;
        }
        self.algos = vec![self.algos[best.1]];
        Ok(())
    }
}
