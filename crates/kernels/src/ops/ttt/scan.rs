//! The running-state scan and its reversible backward (docs/in-place-ttt.md, section 5).

use std::ops::Range;

use burn::tensor::Tensor;

use super::carry::{Carry, Exchange, From};
use crate::context::{Context, Fault};
use crate::function::{Forward, Function, Value, apply_with_extra};
use crate::packing::{Packing, Piece};

mod reference;

pub use reference::{apply_state, outer_update};

/// How the fast weight learns.
#[derive(Clone, Debug)]
pub struct ScanSpec {
    /// Inner learning rate η.
    pub lr: f64,
    /// Tokens per chunk.
    pub chunk: usize,
    /// Largest Frobenius norm of one chunk's update, before η (the paper, appendix D.2). Inference only:
    /// the backward pass does not know it.
    pub clip: Option<f64>,
    /// The documents of the rows.
    pub packing: Packing,
    /// The ranks that have the other parts of the rows, if `packing` is a part.
    pub context: Option<Context>,
}

impl ScanSpec {
    /// Panics unless rows like `x` `[B, N, _]` can be scanned.
    pub(crate) fn check(&self, x: &Tensor<3>, tracked: bool) {
        assert!(
            self.clip.is_none() || !tracked,
            "clipped updates are for inference"
        );
        let [rows, length, _] = x.dims();
        assert_eq!(
            (self.packing.rows().len(), self.packing.length()),
            (rows, length),
            "a packing of other rows"
        );
        assert!(
            self.context.is_some() || self.packing.length() == self.packing.whole().length(),
            "a part of rows learns nothing of the other parts"
        );
    }
}

/// What a scan returns.
#[derive(Debug)]
pub struct Scan {
    /// `[B, N, D]`
    pub output: Tensor<3>,
    /// Largest ‖S‖_F at the end of a document, over all rows; 0 if no state was read: `[1]`. Of rows in
    /// parts, the documents that end on this rank.
    pub state_norm: Tensor<1>,
}

/// `O_i = Z_i (W_0 + η Σ_{j<i} V_jᵀ Z_j)ᵀ` per document: z `[B, N, F]`, v `[B, N, D]`,
/// w0 `[D, F]`.
///
/// # Panics
/// If a clip is set while gradients are tracked, or the packing does not fit z.
pub fn fast_weight_scan(z: Tensor<3>, v: Tensor<3>, w0: Tensor<2>, spec: ScanSpec) -> Scan {
    let tracked = [z.is_tracked(), v.is_tracked(), w0.is_tracked()];
    spec.check(&z, tracked.contains(&true));
    let (output, mut extra) =
        apply_with_extra(FastWeightScan { spec }, [z.into(), v.into(), w0.into()]);
    Scan {
        output: output.tensor(),
        state_norm: extra.swap_remove(0).tensor(),
    }
}

/// What a forward pass computes.
#[derive(Debug)]
pub struct Outcome {
    /// `[B, N, D]`
    pub output: Tensor<3>,
    /// Largest ‖S‖_F where a document ends, 0 where none has a state: `[1]`.
    pub norm: Tensor<1>,
    /// The state at the end of each row, if its last document had one.
    pub last: Vec<Option<Tensor<2>>>,
    /// The state that each row began with, if its first document has one.
    pub arrived: Vec<Option<Tensor<2>>>,
    /// The weights that the pieces of all rows read, where they are there together: `[pieces, D, F]`.
    #[cfg(feature = "cuda")]
    pub weights: Option<Tensor<3>>,
}

/// What a backward pass computes.
#[derive(Debug)]
pub struct Gradients {
    /// `[B, N, F]`; or of what made z.
    pub z: Tensor<3>,
    /// `[B, N, D]`
    pub v: Tensor<3>,
    /// `[D, F]`
    pub w0: Tensor<2>,
    /// Σ dOᵀZ of what reads a row's last document on the ranks behind.
    pub returned: Vec<Option<Tensor<2>>>,
}

/// The scan as a function, for whoever makes it part of a larger one.
#[derive(Debug)]
pub struct FastWeightScan {
    pub spec: ScanSpec,
}

/// What the backward pass needs.
#[derive(Clone, Debug)]
pub struct Saved {
    /// `[B, N, F]`
    pub z: Tensor<3>,
    v: Tensor<3>,
    w0: Tensor<2>,
    /// The state at the end of each row, if its last document had one.
    last: Vec<Option<Tensor<2>>>,
    /// The state that each row began with, where the document it belongs to is not the last.
    first: Vec<Option<Tensor<2>>>,
    /// See [`Outcome::weights`].
    #[cfg(feature = "cuda")]
    weights: Option<Tensor<3>>,
}

impl FastWeightScan {
    fn pieces(&self, row: usize) -> Vec<Piece> {
        self.spec.packing.pieces(row, self.spec.chunk)
    }

    fn all_pieces(&self) -> Vec<Vec<Piece>> {
        let rows = self.spec.packing.rows().len();
        (0..rows).map(|row| self.pieces(row)).collect()
    }

    /// Begins to exchange the states that rows begin with, or what their gradients gather behind the rows.
    /// `own(row)`: what the document that is open at the end has written here; or Σ dOᵀZ of the one that was open
    /// at the beginning.
    fn exchange(
        &self,
        from: From,
        z: &Tensor<3>,
        w0: &Tensor<2>,
        own: impl FnMut(usize) -> Tensor<2>,
    ) -> Exchange<'_> {
        let Some(context) = &self.spec.context else {
            return Exchange::none(z.dims()[0]);
        };
        Carry::new(context, &self.spec.packing, from, w0.dims(), z).start(own)
    }

    /// What of `arrived` the backward pass has to know: it peels the state of a row's last document,
    /// and sums up that of an earlier one again.
    fn kept(&self, arrived: Vec<Option<Tensor<2>>>) -> Vec<Option<Tensor<2>>> {
        let rows = arrived.into_iter().enumerate();
        let ends = |row| self.pieces(row).last().is_some_and(|piece| !piece.carried);
        rows.map(|(row, state)| state.filter(|_| ends(row)))
            .collect()
    }
}

/// Rows `piece` of row `b`: `[B, N, X]` → `[T, X]`.
fn take(x: &Tensor<3>, b: usize, range: Range<usize>) -> Tensor<2> {
    x.clone().slice([b..b + 1, range]).squeeze_dim(0)
}

impl Function<3> for FastWeightScan {
    type Saved = Saved;

    fn forward(&self, [z, v, w0]: [Value; 3]) -> Forward<Saved> {
        let (output, norm, saved) = self.run(z.tensor(), v.tensor(), w0.tensor(), None);
        Forward {
            output: output.into(),
            extra: vec![norm.into()],
            saved,
        }
    }

    fn backward(self, saved: Saved, grad: Value, _: [bool; 3]) -> [Option<Value>; 3] {
        let done = self.differentiate(saved, grad.tensor());
        [
            Some(done.z.into()),
            Some(done.v.into()),
            Some(done.w0.into()),
        ]
    }
}

impl FastWeightScan {
    /// The output, added to `onto` if there is one, the largest norm and what to keep.
    pub fn run(
        &self,
        z: Tensor<3>,
        v: Tensor<3>,
        w0: Tensor<2>,
        onto: Option<&Tensor<3>>,
    ) -> (Tensor<3>, Tensor<1>, Saved) {
        let done = self.outcome([&z, &v], &w0, onto);
        let saved = Saved {
            z,
            v,
            w0,
            last: done.last,
            first: self.kept(done.arrived),
            #[cfg(feature = "cuda")]
            weights: done.weights,
        };
        (done.output, done.norm, saved)
    }

    /// The gradients of z, v and w0, given that of the output.
    pub fn differentiate(&self, saved: Saved, dy: Tensor<3>) -> Gradients {
        let done = self.gradients(saved, dy);
        self.faulty(done)
    }

    /// The same, and on through the SwiGLU that made z of `pair`, gate and up side by side `[T, 2F]`: their
    /// gradients `[1, T, 2F]` in place of z's. `None` where there are no kernels.
    #[cfg(feature = "cuda")]
    pub fn differentiate_gated(
        &self,
        mut saved: Saved,
        dy: Tensor<3>,
        pair: &crate::cuda::stream::Buffer,
    ) -> Option<Gradients> {
        use crate::cuda::ttt;
        let shape = self.shape(&saved.w0);
        let kept = ttt::Kept {
            last: &mut saved.last,
            first: &saved.first,
            weights: saved.weights.as_ref(),
        };
        let mut scan = ttt::Backward::new([&saved.z, &saved.v], &saved.w0, kept, &dy, &shape)?;
        let exchange = self.exchange(From::Behind, &saved.z, &saved.w0, |row| scan.read(row));
        Some(self.faulty(scan.through(pair).run(exchange)))
    }

    /// With the fault that a test has planted.
    fn faulty(&self, mut done: Gradients) -> Gradients {
        if let Some(context) = &self.spec.context
            && context.planted(Fault::SuffixInWeightGradient)
        {
            let returned = done.returned.iter().flatten().cloned();
            done.w0 = returned.fold(done.w0, |a, b| a + b);
        }
        done
    }

    fn outcome(&self, zv: [&Tensor<3>; 2], w0: &Tensor<2>, onto: Option<&Tensor<3>>) -> Outcome {
        let ScanSpec { lr, clip, .. } = self.spec;
        #[cfg(feature = "cuda")]
        if clip.is_none() {
            let shape = self.shape(w0);
            if let Some(mut scan) = crate::cuda::ttt::Forward::new(zv, w0, onto, &shape) {
                let exchange = self.exchange(From::Before, zv[0], w0, |row| scan.written(row));
                return scan.run(exchange);
            }
        }
        let pieces = self.all_pieces();
        let written = |row: usize| reference::written(zv, row, clip, &pieces[row]);
        let exchange = self.exchange(From::Before, zv[0], w0, written);
        let mut done = reference::forward(zv, w0, (lr, clip), &pieces, exchange);
        if let Some(x) = onto {
            done.output = x.clone() + done.output;
        }
        done
    }

    #[cfg(feature = "cuda")]
    fn shape(&self, w0: &Tensor<2>) -> crate::cuda::ttt::Shape {
        let length = self.spec.packing.length();
        let shape = crate::cuda::ttt::Shape::new(self.all_pieces(), length, self.spec.lr);
        let [d, f] = w0.dims();
        match self.spec.context {
            None => shape.flattened(d, f),
            Some(_) => shape,
        }
    }

    fn gradients(&self, saved: Saved, dy: Tensor<3>) -> Gradients {
        #[cfg(feature = "cuda")]
        let saved = {
            use crate::cuda::ttt;
            let Saved {
                z,
                v,
                w0,
                mut last,
                first,
                weights,
            } = saved;
            let shape = self.shape(&w0);
            let kept = ttt::Kept {
                last: &mut last,
                first: &first,
                weights: weights.as_ref(),
            };
            if let Some(mut scan) = ttt::Backward::new([&z, &v], &w0, kept, &dy, &shape) {
                let exchange = self.exchange(From::Behind, &z, &w0, |row| scan.read(row));
                return scan.run(exchange);
            }
            Saved {
                z,
                v,
                w0,
                last,
                first,
                weights,
            }
        };
        let pieces = self.all_pieces();
        let read = |row: usize| reference::read(&saved.z, &dy, row, &pieces[row]);
        let exchange = self.exchange(From::Behind, &saved.z, &saved.w0, read);
        reference::backward(saved, dy, self.spec.lr, &pieces, exchange)
    }
}
