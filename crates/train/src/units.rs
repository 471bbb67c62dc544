//! The trained state, unit by unit: flat f32 buffers of master weights, moments and gradients.
//!
//! Each buffer is this rank's shard of the unit's parameters laid end to end; on one rank, all of
//! them. A unit is gathered when it runs and its gradient is scattered when it is known.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
use ttt_kernels::dtype::cast;
use ttt_kernels::ops::adamw::Moments;
use ttt_kernels::ops::flat::{Part, accumulate, joined};
use ttt_model::{ModelConfig, ParamSpec, Params, Unit};
use ttt_parallel::{CommError, Mesh};

/// Where a unit's parameters lie in its flat buffer.
#[derive(Clone, Debug)]
pub struct FlatLayout {
    /// The parameters in order; those that decay come first.
    pub specs: Vec<ParamSpec>,
    /// Where each begins, and the end of the last.
    offsets: Vec<usize>,
    /// Elements of one rank's shard; the last rank's is padded with zeros.
    shard_len: usize,
    shards: usize,
}

impl FlatLayout {
    /// The layout of `unit` over `shards` ranks.
    pub fn new(config: &ModelConfig, unit: Unit, shards: usize) -> Self {
        let mut specs = unit.params(config);
        specs.sort_by_key(|spec| !spec.decays()); // stable
        let mut offsets = vec![0];
        for spec in &specs {
            offsets.push(offsets[offsets.len() - 1] + spec.len());
        }
        let len = offsets[specs.len()];
        Self {
            specs,
            offsets,
            shard_len: len.div_ceil(shards),
            shards,
        }
    }

    /// Elements of all parameters.
    pub fn len(&self) -> usize {
        self.offsets[self.specs.len()]
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where parameter `i` lies.
    pub fn range(&self, i: usize) -> Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }

    /// What rank `rank`'s shard holds of the parameters, without padding.
    pub fn shard_range(&self, rank: usize) -> Range<usize> {
        let end = ((rank + 1) * self.shard_len).min(self.len());
        (rank * self.shard_len).min(end)..end
    }

    /// The parameters that lie in `flat`, by number, and which of their elements do.
    pub fn cut(&self, flat: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let parts = (0..self.specs.len()).map(move |i| {
            let Range { start, end } = self.range(i);
            let clamp = |at: usize| at.clamp(start, end) - start;
            (i, clamp(flat.start)..clamp(flat.end))
        });
        parts.filter(|(_, part)| !part.is_empty())
    }

    /// Rank `rank`'s shard, padded, read parameter by parameter: `read` fills elements of one.
    ///
    /// # Errors
    /// Whatever `read` returns.
    pub fn read_shard<E>(
        &self,
        rank: usize,
        mut read: impl FnMut(&ParamSpec, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<Vec<f32>, E> {
        let mut shard = vec![0.0; self.shard_len];
        let mut rest = shard.as_mut_slice();
        for (i, part) in self.cut(self.shard_range(rank)) {
            let values;
            (values, rest) = rest.split_at_mut(part.len());
            read(&self.specs[i], part, values)?;
        }
        Ok(shard)
    }

    /// Elements of one rank's shard, padding included.
    pub fn shard_len(&self) -> usize {
        self.shard_len
    }

    /// What [`UnitState::params`] gathers from every shard: elements and their precision.
    pub fn gathers(&self, _compute: DType) -> impl Iterator<Item = (usize, DType)> {
        [(self.shard_len, DType::F32)].into_iter()
    }

    /// The part of rank `rank`'s shard that decays, in shard coordinates.
    pub fn decayed(&self, rank: usize) -> Range<usize> {
        let decaying = self.specs.iter().filter(|spec| spec.decays()).count();
        let begin = rank * self.shard_len;
        0..self.offsets[decaying].clamp(begin, begin + self.shard_len) - begin
    }

    /// Rank `rank`'s shard cut into stretches of one learning rate: `scale` of each parameter's
    /// name, neighbours of equal scale joined. The padding belongs to the last.
    pub fn stretches(&self, rank: usize, scale: impl Fn(&str) -> f64) -> Vec<(Range<usize>, f64)> {
        let begin = rank * self.shard_len;
        let mut stretches: Vec<(Range<usize>, f64)> = vec![];
        for (i, spec) in self.specs.iter().enumerate() {
            let clamp = |at: usize| at.clamp(begin, begin + self.shard_len) - begin;
            let (from, to) = (clamp(self.offsets[i]), clamp(self.offsets[i + 1]));
            let scale = scale(&spec.name);
            match stretches.last_mut() {
                Some((range, last)) if *last == scale => range.end = to.max(range.end),
                _ if from < to => stretches.push((from..to, scale)),
                _ => {}
            }
        }
        match stretches.last_mut() {
            Some((range, _)) => range.end = self.shard_len,
            None => stretches.push((0..self.shard_len, 1.0)),
        }
        stretches
    }

    /// Rank `rank`'s shard of values given flat, padded.
    pub fn shard_of(&self, full: &[f32], rank: usize) -> Vec<f32> {
        let begin = (rank * self.shard_len).min(full.len());
        let end = (begin + self.shard_len).min(full.len());
        let mut shard = full[begin..end].to_vec();
        shard.resize(self.shard_len, 0.0);
        shard
    }
}

/// One unit of the model being trained.
#[derive(Debug)]
pub struct UnitState {
    /// Which part of the model.
    pub unit: Unit,
    /// Where its parameters lie.
    pub layout: FlatLayout,
    /// Master weights, f32: `[shard_len]`.
    pub master: Tensor<1>,
    /// AdamW's moments.
    pub moments: Moments,
    /// The shard in the precision that the model computes in, if the update made it.
    copy: Option<Tensor<1>>,
    /// The gradient summed so far in this step, end to end: as the first backward pass left it, until
    /// there is something to add.
    gradient: Option<Vec<Part>>,
    /// The parameters as the model computes with them, until the next update.
    ready: Option<Params>,
}

impl UnitState {
    /// A unit whose parameters are `values(spec)`, moments zero.
    ///
    /// # Errors
    /// Whatever `values` returns.
    pub fn new<E>(
        config: &ModelConfig,
        unit: Unit,
        mesh: &Mesh,
        device: &Device,
        mut values: impl FnMut(&ParamSpec) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let layout = FlatLayout::new(config, unit, mesh.shard.size());
        let mut full = Vec::with_capacity(layout.len());
        for spec in &layout.specs {
            full.extend(values(spec)?);
        }
        let shard = layout.shard_of(&full, mesh.shard.rank());
        Ok(Self::from_shard(unit, layout, shard, device))
    }

    /// A unit of which this rank's shard, padded, is `master`; moments zero.
    pub fn from_shard(unit: Unit, layout: FlatLayout, master: Vec<f32>, device: &Device) -> Self {
        let len = master.len();
        let zeros = || Tensor::<1>::zeros([len], (device, DType::F32));
        Self {
            unit,
            master: Tensor::from_data(TensorData::new(master, [len]), (device, DType::F32)),
            moments: Moments {
                first: zeros(),
                second: zeros(),
            },
            layout,
            copy: None,
            gradient: None,
            ready: None,
        }
    }

    /// The parameters in the precision the model computes in, gathered from all shards.
    ///
    /// Made once per step where this rank holds all of them; gathered anew each time otherwise, so
    /// that only the unit that runs is whole.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn params(&mut self, compute: DType, mesh: &Mesh) -> Result<Params, CommError> {
        if let Some(ready) = &self.ready {
            return Ok(ready.clone());
        }
        let wide = match self.layout.specs.iter().any(|spec| spec.master_precision) {
            true => Some(mesh.shard.all_gather(self.master.clone())?),
            false => None,
        };
        let shard = match self.copy.take() {
            Some(copy) if copy.dtype() == compute => copy,
            _ => cast(self.master.clone(), compute),
        };
        let full = mesh.shard.all_gather(shard.clone())?;
        self.copy = Some(shard);
        let flat = self.layout.specs.iter().enumerate().map(|(i, spec)| {
            let whole = match (&wide, spec.master_precision) {
                (Some(wide), true) => wide,
                _ => &full,
            };
            whole.clone().slice([self.layout.range(i)])
        });
        let params = Params::new(self.layout.specs.clone(), flat.collect());
        if mesh.shard.size() == 1 {
            self.ready = Some(params.clone());
        }
        Ok(params)
    }

    /// Adds the gradients of one backward pass, in the layout's order; a parameter that none
    /// arrived for counts as zero.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn add_gradients(
        &mut self,
        gradients: Vec<Option<Tensor<1>>>,
        mesh: &Mesh,
    ) -> Result<(), CommError> {
        let parts = gradients.into_iter().zip(&self.layout.specs);
        let parts = parts.map(|(gradient, spec)| match gradient {
            Some(gradient) => Part::Values(gradient),
            None => Part::Zeros(spec.len()),
        });
        let mut parts: Vec<Part> = parts.collect();
        let padding = self.layout.shard_len * self.layout.shards - self.layout.len();
        if padding > 0 {
            parts.push(Part::Zeros(padding));
        }
        if self.layout.shards > 1 {
            let own = mesh.shard.reduce_scatter_sum(accumulate(None, parts))?;
            parts = vec![Part::Values(own)];
        }
        self.gradient = Some(match self.gradient.take() {
            Some(sum) => vec![Part::Values(accumulate(Some(joined(sum)), parts))],
            None => parts,
        });
        Ok(())
    }

    /// Takes the step's gradient, summed over all that hold it: the shard's elements, end to end.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn take_gradient(&mut self, mesh: &Mesh) -> Result<Vec<Part>, CommError> {
        let zeros = || vec![Part::Values(self.master.zeros_like())];
        let own = self.gradient.take().unwrap_or_else(zeros);
        match mesh.replicas.size() {
            1 => Ok(own),
            _ => {
                let sum = mesh.replicas.all_reduce_sum(joined(own))?;
                Ok(vec![Part::Values(sum)])
            }
        }
    }

    /// Hands out weights and moments to be updated, so that they can be written in place; they come
    /// back by [`UnitState::update`]. The parameters that the model computed with are let go.
    pub fn take(&mut self) -> (Tensor<1>, Moments) {
        self.ready = None;
        self.copy = None;
        let none = Tensor::<1>::zeros([1], (&self.master.device(), DType::F32));
        let master = std::mem::replace(&mut self.master, none.clone());
        let taken = Moments {
            first: none.clone(),
            second: none,
        };
        (master, std::mem::replace(&mut self.moments, taken))
    }

    /// Replaces weights and moments after an update; `copy`: the weights in the precision that the
    /// model computes in, where the update made them.
    pub fn update(&mut self, master: Tensor<1>, moments: Moments, copy: Option<Tensor<1>>) {
        self.master = master;
        self.moments = moments;
        self.copy = copy;
        self.ready = None;
    }
}
