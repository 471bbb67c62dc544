//! The trained state, unit by unit: flat buffers of master weights, moments and gradients.
//!
//! Each buffer is this rank's shard of the unit's parameters ([`FlatLayout`]); on one rank, all of
//! them. A unit is gathered when it runs and its gradient is scattered when it is known. Both can be
//! begun early and awaited late, so that they travel while another unit computes.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};
use ttt_kernels::memory;
use ttt_kernels::ops::adamw::Moments;
use ttt_kernels::ops::flat::{Part, accumulate, joined};
use ttt_kernels::ops::master::Master;
use ttt_model::{ModelConfig, ParamSpec, Params, Unit};
use ttt_parallel::{CommError, Mesh, Pending};

pub use crate::flat::{FlatLayout, Piece};
use crate::sent;

/// One unit of the model being trained.
#[derive(Debug)]
pub struct UnitState {
    /// Which part of the model.
    pub unit: Unit,
    /// Where its parameters lie.
    pub layout: FlatLayout,
    /// Master weights, f32: `[shard_len]`. Where the model computes in bf16, they are in halves but for
    /// those that it needs in f32.
    pub master: Master,
    /// AdamW's moments.
    pub moments: Moments,
    /// The gradient summed so far in this step, end to end: as the first backward pass left it, some of
    /// it in bf16, until there is something to add; then f32.
    gradient: Option<Vec<Part>>,
    /// The parameters as the model computes with them, until the next update.
    ready: Option<Params>,
    /// The sections of the parameters on their way to this rank.
    coming: Vec<Pending>,
    /// The sections of a gradient on their way to the ranks that hold them.
    returning: Vec<Pending>,
    /// The step adds nothing more to the gradient: it is summed over the replicas once it is here.
    last: bool,
    /// That sum, under way.
    summing: Option<Pending>,
}

impl UnitState {
    /// A unit whose parameters are `values(spec)`, moments zero, of a model that computes in `compute`.
    ///
    /// # Errors
    /// Whatever `values` returns.
    pub fn new<E>(
        config: &ModelConfig,
        unit: Unit,
        mesh: &Mesh,
        device: &Device,
        compute: DType,
        mut values: impl FnMut(&ParamSpec) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        Self::filled(config, unit, mesh, device, compute, |spec, range, out| {
            out.copy_from_slice(&values(spec)?[range]);
            Ok(())
        })
    }

    /// The same, where `fill(spec, range, out)` gives the elements `range` of a parameter: this rank's alone
    /// are asked for.
    ///
    /// # Errors
    /// Whatever `fill` returns.
    pub fn filled<E>(
        config: &ModelConfig,
        unit: Unit,
        mesh: &Mesh,
        device: &Device,
        compute: DType,
        fill: impl FnMut(&ParamSpec, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let layout = FlatLayout::new(config, unit, mesh.shard.size());
        let shard = layout.read_shard(mesh.shard.rank(), fill)?;
        Ok(Self::from_shard(unit, layout, shard, device, compute))
    }

    /// A unit of which this rank's shard, padded, is `master`; moments zero. The model computes in
    /// `compute`.
    pub fn from_shard(
        unit: Unit,
        layout: FlatLayout,
        master: Vec<f32>,
        device: &Device,
        compute: DType,
    ) -> Self {
        let len = master.len();
        let wide = match compute {
            DType::BF16 => layout.wide_len(),
            _ => len,
        };
        let zeros = || Tensor::<1>::zeros([len], (device, DType::F32));
        let (master, moments) = memory::lasting(device, master, |master| {
            let moments = Moments {
                first: zeros(),
                second: zeros(),
            };
            (Master::new(master, wide, device), moments)
        });
        Self {
            unit,
            master,
            moments,
            layout,
            gradient: None,
            ready: None,
            coming: vec![],
            returning: vec![],
            last: false,
            summing: None,
        }
    }

    /// Whether this rank holds all of the unit.
    fn is_whole(&self) -> bool {
        self.layout.shards() == 1
    }

    /// The parameters in the precision the model computes in, gathered from all shards.
    ///
    /// Where this rank holds all of them, they are views of the master weights; gathered anew each time
    /// otherwise, so that only units that run are whole.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn params(&mut self, compute: DType, mesh: &Mesh) -> Result<Params, CommError> {
        if let Some(ready) = &self.ready {
            return Ok(ready.clone());
        }
        self.start_gathering(compute, mesh)?;
        let coming = std::mem::take(&mut self.coming);
        let sections = self.layout.sections().iter().zip(coming);
        let mut flat = Vec::with_capacity(self.layout.specs.len());
        for (section, coming) in sections {
            let whole = coming.wait()?;
            let params = section.params.clone();
            let cut = params.map(|i| whole.clone().slice([section.range(&self.layout, i)]));
            flat.extend(cut);
        }
        let params = Params::new(self.layout.specs.clone(), flat);
        if self.is_whole() {
            self.ready = Some(params.clone());
        }
        Ok(params)
    }

    /// Begins to gather the parameters that [`UnitState::params`] will be asked for next, unless they
    /// are here or on their way.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn prefetch(&mut self, compute: DType, mesh: &Mesh) -> Result<(), CommError> {
        match self.is_whole() {
            true => Ok(()),
            false => self.start_gathering(compute, mesh),
        }
    }

    /// Parameters of the right shapes, without their values where these would have to be gathered.
    pub fn stand_in(&self, compute: DType) -> Params {
        if let Some(ready) = &self.ready {
            return ready.clone();
        }
        let device = self.moments.first.device();
        let sections = self.layout.sections().iter();
        let flat = sections.flat_map(|section| {
            let specs = &self.layout.specs[section.params.clone()];
            let like = (&device, section.precision(compute));
            specs
                .iter()
                .map(move |spec| Tensor::zeros([spec.len()], like))
        });
        Params::new(self.layout.specs.clone(), flat.collect())
    }

    fn start_gathering(&mut self, compute: DType, mesh: &Mesh) -> Result<(), CommError> {
        if !self.coming.is_empty() {
            return Ok(());
        }
        for section in self.layout.sections() {
            let (part, precision) = (section.part.clone(), section.precision(compute));
            let own = self.master.computed(part, precision);
            let coming = sent::of_unit(self.unit, sent::PARAMETERS, || {
                mesh.shard.start_all_gather(own)
            });
            self.coming.push(coming?);
        }
        Ok(())
    }

    /// Adds the gradients of one backward pass, in the layout's order; a parameter that none
    /// arrived for counts as zero. Where there are shards, the sum over the ranks is only begun:
    /// [`UnitState::settle`] ends it. `last`: the step adds no more, so that the sum over the replicas
    /// may follow.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn add_gradients(
        &mut self,
        gradients: Vec<Option<Tensor<1>>>,
        last: bool,
        mesh: &Mesh,
    ) -> Result<(), CommError> {
        self.settle(mesh)?;
        self.last = last;
        let parts = gradients.into_iter().zip(&self.layout.specs);
        let mut parts = parts.map(|(gradient, spec)| match gradient {
            Some(gradient) => Part::Values(gradient),
            None => Part::Zeros(spec.len()),
        });
        if self.is_whole() {
            let parts = parts.collect();
            self.sum(parts);
            return match last {
                true => self.start_sum(mesh),
                false => Ok(()),
            };
        }
        for section in self.layout.sections() {
            let mut parts: Vec<Part> = parts.by_ref().take(section.params.len()).collect();
            match section.padding(self.layout.shards()) {
                0 => {}
                padding => parts.push(Part::Zeros(padding)),
            }
            let all = accumulate(None, parts);
            let returning = sent::of_unit(self.unit, sent::GRADIENTS, || {
                mesh.shard.start_reduce_scatter_sum(all)
            });
            self.returning.push(returning?);
        }
        Ok(())
    }

    /// Brings one step further what [`UnitState::add_gradients`] began: its sum over the shards is added
    /// to this rank's gradient, and if that was the last, the sum over the replicas begins; or that
    /// ends. Asked for each time another unit is ready, both travel while others compute.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn settle(&mut self, mesh: &Mesh) -> Result<(), CommError> {
        if let Some(summing) = self.summing.take() {
            self.gradient = Some(vec![Part::Values(summing.wait()?)]);
            return Ok(());
        }
        if self.returning.is_empty() {
            return Ok(());
        }
        let mut parts = vec![];
        for section in self.returning.drain(..) {
            parts.push(Part::Values(section.wait()?));
        }
        self.sum(parts);
        match self.last {
            true => self.start_sum(mesh),
            false => Ok(()),
        }
    }

    /// Begins to sum the gradient over all that hold the same shard.
    fn start_sum(&mut self, mesh: &Mesh) -> Result<(), CommError> {
        if mesh.replicas.size() > 1 {
            let zeros = || vec![Part::Values(self.moments.first.zeros_like())];
            let own = joined(self.gradient.take().unwrap_or_else(zeros));
            let summing = sent::of_unit(self.unit, sent::SUMS, || {
                mesh.replicas.start_all_reduce_sum(own)
            });
            self.summing = Some(summing?);
        }
        Ok(())
    }

    fn sum(&mut self, parts: Vec<Part>) {
        self.gradient = Some(match self.gradient.take() {
            Some(sum) => vec![Part::Values(accumulate(Some(joined(sum)), parts))],
            None => parts,
        });
    }

    /// Takes the step's gradient, summed over all that hold it: the shard's elements, end to end.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn take_gradient(&mut self, mesh: &Mesh) -> Result<Vec<Part>, CommError> {
        self.settle(mesh)?;
        if !std::mem::take(&mut self.last) {
            self.start_sum(mesh)?;
        }
        self.settle(mesh)?;
        let zeros = || vec![Part::Values(self.moments.first.zeros_like())];
        Ok(self.gradient.take().unwrap_or_else(zeros))
    }

    /// Hands out weights and moments to be updated, so that they can be written in place; they come
    /// back by [`UnitState::update`]. The parameters that the model computed with are let go.
    ///
    /// # Panics
    /// If parameters are on their way: they would arrive as they were.
    pub fn take(&mut self) -> (Master, Moments) {
        assert!(
            self.coming.is_empty(),
            "{:?} is used before it changes",
            self.unit
        );
        self.ready = None;
        let none = Tensor::<1>::zeros([1], (&self.moments.first.device(), DType::F32));
        let master = std::mem::take(&mut self.master);
        let taken = Moments {
            first: none.clone(),
            second: none,
        };
        (master, std::mem::replace(&mut self.moments, taken))
    }

    /// Replaces weights and moments after an update.
    pub fn update(&mut self, master: Master, moments: Moments) {
        self.master = master;
        self.moments = moments;
        self.ready = None;
    }
}
