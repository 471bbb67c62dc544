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

    /// The matrices with the column at which each one's outputs begin.
    fn each(&self) -> impl Iterator<Item = (Matrix, usize)> {
        let mut from = 0;
        self.parts.iter().map(move |&(at, rows)| {
            let matrix = Matrix::new(at, rows, self.columns, DType::BF16);
            let begin = from;
            from += rows;
            (matrix, begin)
        })
    }

    /// y ← x Wᵀ: x `[T, D]`, y `[T, Σ M]`.
    pub fn forward(&self, cx: &mut Context, x: Matrix, y: Matrix) -> Result<(), String> {
        for (w, from) in self.each() {
            cx.gemm(x, w.t(), y.cut_columns(from, w.rows), 1.0, 0.0)?;
        }
        Ok(())
    }

    /// dx ← dy W: dy `[T, Σ M]`, dx `[T, D]`.
    pub fn input_gradient(&self, cx: &mut Context, dy: Matrix, dx: Matrix) -> Result<(), String> {
        for (w, from) in self.each() {
            let beta = if from == 0 { 0.0 } else { 1.0 };
            cx.gemm(dy.cut_columns(from, w.rows), w, dx, 1.0, beta)?;
        }
        Ok(())
    }
}

/// The rows of `gradient` `[Σ M, D]` that belong to each matrix.
pub fn split<const N: usize>(gradient: Buffer, rows: [usize; N]) -> [Tensor<2>; N] {
    let whole = gradient.tensor::<2>();
    let mut from = 0;
    rows.map(|count| {
        let part = whole.clone().slice([from..from + count]);
        from += count;
        part
    })
}
