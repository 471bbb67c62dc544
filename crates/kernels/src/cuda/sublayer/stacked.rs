//! Matrices that share their input, one below the other.

use burn::tensor::{DType, Tensor};

use crate::cuda::gemm::Matrix;
use crate::cuda::stream::{Buffer, Context};

/// Where the matrices `[M_i, D]` lie. Parameters of a unit are cut from one buffer, so they usually
/// follow each other and one product serves all; elsewhere each gets its own.
#[derive(Clone, Debug)]
pub struct Stacked {
    /// Address and rows of each.
    parts: Vec<(u64, usize)>,
    columns: usize,
}

const BF16: usize = 2;

impl Stacked {
    /// Matrices of `rows[i]` rows at `at[i]`, joined where they touch.
    pub fn new(at: &[u64], rows: &[usize], columns: usize) -> Self {
        let mut parts: Vec<(u64, usize)> = vec![];
        for (&at, &rows) in at.iter().zip(rows) {
            match parts.last_mut() {
                Some((begin, count)) if *begin + (*count * columns * BF16) as u64 == at => {
                    *count += rows;
                }
                _ => parts.push((at, rows)),
            }
        }
        Self { parts, columns }
    }

    /// All of them as one matrix `[Σ M, D]`, where they lie so.
    pub fn whole(&self) -> Option<Matrix> {
        match self.parts[..] {
            [(at, rows)] => Some(Matrix::new(at, rows, self.columns, DType::BF16)),
            _ => None,
        }
    }

    /// The matrices' rows `from .. from + count`, as they lie together, and where each begins.
    fn cut(&self, from: usize, count: usize) -> Vec<(Matrix, usize)> {
        let mut begin = 0;
        let mut found = vec![];
        for &(at, rows) in &self.parts {
            let (first, last) = (from.max(begin), (from + count).min(begin + rows));
            if first < last {
                let skipped = ((first - begin) * self.columns * BF16) as u64;
                let matrix = Matrix::new(at + skipped, last - first, self.columns, DType::BF16);
                found.push((matrix, first - from));
            }
            begin += rows;
        }
        found
    }

    /// y ← x Wᵀ: x `[T, D]`; y `[T, Σ M]`, each of its matrices with its first column.
    pub fn forward(
        &self,
        cx: &mut Context,
        x: Matrix,
        y: &[(Matrix, usize)],
    ) -> Result<(), String> {
        for (y, from) in y {
            for (w, begin) in self.cut(*from, y.columns) {
                cx.gemm(x, w.t(), y.cut_columns(begin, w.rows), 1.0, 0.0)?;
            }
        }
        Ok(())
    }

    /// dx ← dy W: dy `[T, Σ M]` as in [`Stacked::forward`], dx `[T, D]`.
    pub fn input_gradient(
        &self,
        cx: &mut Context,
        dy: &[(Matrix, usize)],
        dx: Matrix,
    ) -> Result<(), String> {
        let mut beta = 0.0;
        for (dy, from) in dy {
            for (w, begin) in self.cut(*from, dy.columns) {
                cx.gemm(dy.cut_columns(begin, w.rows), w, dx, 1.0, beta)?;
                beta = 1.0;
            }
        }
        Ok(())
    }
}

/// dw ← dyᵀ x: dw `[Σ M, D]` bf16 at an address, dy as in [`Stacked::forward`], x `[T, D]`.
pub fn weight_gradient(
    cx: &mut Context,
    dy: &[(Matrix, usize)],
    x: Matrix,
    dw: u64,
) -> Result<(), String> {
    for (dy, from) in dy {
        let at = dw + (from * x.columns * BF16) as u64;
        let dw = Matrix::new(at, dy.columns, x.columns, DType::BF16);
        cx.gemm(dy.t(), x, dw, 1.0, 0.0)?;
    }
    Ok(())
}

/// The rows of `gradient` `[Σ M, D]` that belong to each matrix.
pub fn split<const N: usize>(gradient: Buffer, rows: [usize; N]) -> [Tensor<2>; N] {
    let whole = gradient.tensor::<2>();
    let mut from = 0;
    rows.map(|count| {
        let part = whole.clone().narrow(0, from, count);
        from += count;
        part
    })
}
