//! The update: global-norm clipping, the policy on bad gradients, AdamW.
//!
//! Everything that decides about an update is a scalar on the device, so that the host never waits
//! for it: a bad step leaves weights and moments as they were, and the host hears of it when it
//! reads the metrics.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};
use glob::Pattern;
use ttt_kernels::memory;
use ttt_kernels::ops::adamw::{AdamW, Moments, adamw_step, square_sum};
use ttt_kernels::ops::flat::{Part, joined};
use ttt_kernels::ops::master::Master;
use ttt_parallel::{CommError, Mesh};

use crate::config::{OnBadGradient, OptimizerConfig};
use crate::sent;
use crate::units::UnitState;

/// How quickly the running gradient norm follows: the weight of the newest.
const NORM_FOLLOW: f64 = 0.05;

/// Steps before a spike can be told from the beginning of a run.
const SPIKE_WARMUP: u64 = 50;

/// Decides about updates and makes them.
#[derive(Debug)]
pub struct Updater {
    hyper: AdamW,
    grad_clip: f64,
    /// Learning-rate factors by name; the last that matches counts.
    overrides: Vec<(Pattern, f64)>,
    on_bad: OnBadGradient,
    spike_factor: Option<f64>,
    /// Running mean of the gradient norm over good steps: `[1]` f32; 0 before the first.
    pub mean_norm: Tensor<1>,
    /// 1, or 0 for ever once a step was bad under `abort`: `[1]` f32.
    running: Tensor<1>,
}

/// What an update did, not yet read from the device.
#[derive(Debug)]
pub struct UpdateOutput {
    /// The gradient's norm before clipping: `[1]` f32.
    pub grad_norm: Tensor<1>,
    /// 1 if weights were changed, 0 if the step was bad: `[1]` f32.
    pub applied: Tensor<1>,
}

impl Updater {
    /// An updater whose running norm is `mean_norm` (0 for a new run).
    pub fn new(
        config: &OptimizerConfig,
        on_bad: OnBadGradient,
        spike_factor: Option<f64>,
        mean_norm: f32,
        device: &Device,
    ) -> Self {
        Self {
            hyper: AdamW {
                beta1: config.beta1,
                beta2: config.beta2,
                eps: config.eps,
                weight_decay: config.weight_decay,
            },
            grad_clip: config.grad_clip,
            overrides: config
                .overrides
                .iter()
                .map(|entry| {
                    let pattern = Pattern::new(&entry.pattern);
                    (
                        pattern.expect("checked with the configuration"),
                        entry.lr_scale,
                    )
                })
                .collect(),
            on_bad,
            spike_factor,
            mean_norm: scalar(f64::from(mean_norm), device),
            running: scalar(1.0, device),
        }
    }

    /// Updates all units from their gradients and forgets these. `normalizer` `[1]` multiplies
    /// every gradient; `step` counts from 0.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn update(
        &mut self,
        units: &mut [UnitState],
        normalizer: Tensor<1>,
        lr: f64,
        step: u64,
        mesh: &Mesh,
    ) -> Result<UpdateOutput, CommError> {
        let mut gradients = vec![];
        for unit in units.iter_mut() {
            come_to("the gradient", unit, mesh);
            gradients.push(unit.take_gradient(mesh)?);
        }
        // What is frozen has no part in the norm, as if it had no gradient.
        let rank = mesh.shard.rank();
        let mut squares = scalar(0.0, &self.mean_norm.device());
        for (unit, gradient) in units.iter().zip(&gradients) {
            come_to("the gradient's norm", unit, mesh);
            for (range, lr_scale) in self.stretches(unit, rank) {
                if lr_scale > 0.0 {
                    squares = squares + square_sum(&cut_parts(gradient, &range));
                }
            }
        }
        let squares = sent::of(sent::GRADIENT_NORM, || mesh.shard.all_reduce_sum(squares))?;
        let grad_norm = squares.sqrt() * normalizer.clone();

        let good = self.judge(&grad_norm, step);
        // A bad norm may be NaN: it must not reach the running mean or the clip factor.
        let finite = grad_norm
            .clone()
            .mask_fill(good.clone().equal_scalar(0.0), 0.0);
        let clip = match self.grad_clip > 0.0 {
            true => finite
                .clone()
                .add_scalar(1e-6)
                .recip()
                .mul_scalar(self.grad_clip)
                .clamp_max(1.0),
            false => finite.ones_like(),
        };
        let scale = clip * normalizer * good.clone();
        for (unit, gradient) in units.iter_mut().zip(gradients) {
            come_to("the update", unit, mesh);
            self.update_unit(unit, gradient, lr, step, (&scale, &good), rank);
        }
        self.follow(finite, &good);
        Ok(UpdateOutput {
            grad_norm,
            applied: good,
        })
    }

    /// Updates one unit, stretch by stretch where its parameters have learning rates of their own.
    fn update_unit(
        &self,
        unit: &mut UnitState,
        gradient: Vec<Part>,
        lr: f64,
        step: u64,
        (scale, good): (&Tensor<1>, &Tensor<1>),
        rank: usize,
    ) {
        let decayed = unit.layout.decayed(rank).end;
        let stretches = self.stretches(unit, rank);
        let (master, moments) = unit.take();
        let step = |master: Master, moments, range: &Range<usize>, lr_scale: f64| {
            adamw_step(
                master,
                moments,
                cut_parts(&gradient, range),
                0..decayed.clamp(range.start, range.end) - range.start,
                lr * lr_scale,
                step + 1,
                scale.clone(),
                good.clone(),
                &self.hyper,
            )
        };
        // The common case hands over the only references, which are then written in place.
        if let [(range, lr_scale)] = &stretches[..]
            && *lr_scale != 0.0
        {
            let (master, moments) = step(master, moments, range, *lr_scale);
            unit.update(master, moments);
            return;
        }
        let (mut masters, mut firsts, mut seconds) = (vec![], vec![], vec![]);
        for (range, lr_scale) in &stretches {
            let moments = Moments {
                first: cut(&moments.first, range),
                second: cut(&moments.second, range),
            };
            let master = master.slice(range.clone());
            let (master, moments) = match *lr_scale == 0.0 {
                true => (master, moments),
                false => step(master, moments, range, *lr_scale),
            };
            masters.push(master);
            firsts.push(moments.first);
            seconds.push(moments.second);
        }
        let device = scale.device();
        let (master, moments) = memory::lasting(&device, (masters, firsts, seconds), |all| {
            let (masters, firsts, seconds) = all;
            let moments = Moments {
                first: Tensor::cat(firsts, 0),
                second: Tensor::cat(seconds, 0),
            };
            (Master::cat(masters), moments)
        });
        unit.update(master, moments);
    }

    /// The stretches of a unit's shard that have one learning rate, and its factor.
    fn stretches(&self, unit: &UnitState, rank: usize) -> Vec<(Range<usize>, f64)> {
        unit.layout.stretches(rank, |name| self.lr_scale(name))
    }

    /// The factor on the learning rate of the parameter `name`.
    fn lr_scale(&self, name: &str) -> f64 {
        let matching = self
            .overrides
            .iter()
            .rev()
            .find(|(pattern, _)| pattern.matches(name));
        matching.map_or(1.0, |(_, scale)| *scale)
    }

    /// 1 if a gradient of this norm may be used, else 0: `[1]`.
    fn judge(&mut self, grad_norm: &Tensor<1>, step: u64) -> Tensor<1> {
        let mut good = grad_norm.clone().is_finite();
        if let Some(factor) = self.spike_factor
            && step >= SPIKE_WARMUP
        {
            let limit = self.mean_norm.clone().mul_scalar(factor);
            good = good.bool_and(grad_norm.clone().lower_equal(limit));
        }
        let good = good.float().cast(burn::tensor::FloatDType::F32) * self.running.clone();
        if self.on_bad == OnBadGradient::Abort {
            self.running = good.clone();
        }
        good
    }

    /// mean ← mean + follow · (norm − mean) on good steps; the first good norm is taken whole.
    fn follow(&mut self, norm: Tensor<1>, good: &Tensor<1>) {
        let first = self.mean_norm.clone().equal_scalar(0.0);
        let start = self.mean_norm.clone().mask_where(first, norm.clone());
        let moved = start.clone() + (norm - start).mul_scalar(NORM_FOLLOW);
        let keep = good.clone().equal_scalar(0.0);
        self.mean_norm = moved.mask_where(keep, self.mean_norm.clone());
    }
}

/// This rank moves, and has come to `what` of `unit`.
fn come_to(what: &str, unit: &UnitState, mesh: &Mesh) {
    let unit = unit.unit;
    mesh.activity.at(format_args!("{what} of {unit:?}"));
}

/// Elements `range` of parts that lie end to end.
fn cut_parts(parts: &[Part], range: &Range<usize>) -> Vec<Part> {
    let len: usize = parts.iter().map(Part::len).sum();
    match *range == (0..len) {
        true => parts.to_vec(),
        false => {
            let whole = joined(parts.to_vec());
            vec![Part::Values(cut(&whole, range))]
        }
    }
}

/// Elements `range`; the common case, all of them, must not copy.
fn cut(tensor: &Tensor<1>, range: &Range<usize>) -> Tensor<1> {
    match *range == (0..tensor.dims()[0]) {
        true => tensor.clone(),
        false => tensor.clone().slice([range.clone()]),
    }
}

/// `value` on the device: `[1]` f32.
pub fn scalar(value: f64, device: &Device) -> Tensor<1> {
    Tensor::full([1], value, (device, DType::F32))
}
