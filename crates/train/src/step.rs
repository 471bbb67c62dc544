//! One forward and backward pass, block by block.
//!
//! Every block runs on a small autodiff graph of its own, from a leaf that holds the block's input.
//! In the backward pass the graph of block l is continued from block l + 1's input gradient. With
//! `activations = "keep"` the graphs of all blocks wait; with `"recompute"` only the inputs do, and
//! a block's forward runs again when its turn comes. The same seam is where parameters are
//! gathered and gradients are scattered.

use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use ttt_data::{IGNORE, Row};
use ttt_kernels::{Context, ContextSettings, Packing, backward_from};
use ttt_model::rope::RopeTable;
use ttt_model::{Batch, Block, Embedding, Head, ModelConfig, Params, Target, Unit};
use ttt_parallel::{CommError, Mesh};

use crate::config::Activations;
use crate::context;
use crate::error::TrainError;
use crate::sent;
use crate::units::UnitState;

/// The model being trained and where it runs.
#[derive(Debug)]
pub struct Model {
    /// The architecture.
    pub config: ModelConfig,
    /// Embedding, blocks, head.
    pub units: Vec<UnitState>,
    /// Precision of activations and products.
    pub compute: DType,
    /// The plain device, without autodiff.
    pub device: Device,
    /// RoPE tables, made once per row length.
    pub rope: RopeCache,
    /// What ranks that share rows send each other.
    pub context: ContextSettings,
}

/// The RoPE tables of the latest positions: the host makes them, too slowly for every batch.
#[derive(Debug, Default)]
pub struct RopeCache(Option<(Range<usize>, RopeTable)>);

/// Rows on the device, or this rank's part of them: the ranks of a context group have the same rows, and
/// each some of their tokens.
#[derive(Debug)]
pub struct MicroBatch {
    /// `[B, N]`
    ids: Tensor<2, Int>,
    /// `[B·N]`
    labels: Tensor<1, Int>,
    packing: Packing,
    /// Tokens here that have a label.
    pub labelled: usize,
    /// Whether no other follows in its step.
    last: bool,
}

impl MicroBatch {
    /// Uploads this rank's part of rows of equal length. The label of a part's last token is the first
    /// token of the next: it comes with the row.
    ///
    /// # Errors
    /// If a row's document starts are impossible, or the ranks do not divide its length.
    pub fn new(rows: &[Row], mesh: &Mesh, device: &Device) -> Result<Self, TrainError> {
        let length = rows[0].input_ids.len();
        let part = context::part(length, mesh)?;
        let ids = rows.iter().flat_map(|row| &row.input_ids[part.clone()]);
        let ids: Vec<i32> = ids.map(|&id| id as i32).collect();
        let labels: Vec<Option<u32>> = rows
            .iter()
            .flat_map(|row| &row.labels[part.clone()])
            .map(|&label| (label != IGNORE).then_some(label))
            .collect();
        let starts = rows.iter().map(|row| {
            let starts = row.document_starts.iter();
            starts.map(|&start| start as usize).collect()
        });
        let whole = Packing::new(length, starts.collect())?;
        Ok(Self {
            ids: Tensor::from_data(TensorData::new(ids, [rows.len(), part.len()]), device),
            labelled: labels.iter().flatten().count(),
            labels: ttt_kernels::ops::cross_entropy::labels(&labels, device),
            packing: match part.len() == length {
                true => whole,
                false => whole.part(part),
            },
            last: false,
        })
    }

    /// The last of its step: the gradients may be summed over all ranks as they come, while others are
    /// computed. Without it that waits for the update.
    pub fn last(self, last: bool) -> Self {
        Self { last, ..self }
    }
}

/// What a pass over one micro-batch returns, not yet read from the device.
#[derive(Debug)]
pub struct PassOutput {
    /// Summed loss times the given scale: `[1]` f32.
    pub loss: Tensor<1>,
    /// For each TTT layer, ‖η S‖_F / ‖W_0‖_F, the largest of the ranks that share the rows: `[1]` f32.
    pub state_ratios: Vec<(usize, Tensor<1>)>,
}

/// A block's graph, from its input leaves to its output.
struct BlockGraph {
    x: Tensor<3>,
    embeddings: Tensor<3>,
    params: Params,
    output: Tensor<3>,
    state_ratio: Option<Tensor<1>>,
}

/// What waits for the backward pass.
enum Kept {
    Graph(Box<BlockGraph>),
    Input(Box<Tensor<3>>),
}

impl Model {
    fn batch(&mut self, packing: &Packing, clip: Option<f64>, mesh: &Mesh) -> Batch {
        let positions = packing.positions();
        let rope = match self.rope.0.take() {
            Some((of, rope)) if of == positions => rope,
            _ => RopeTable::new(&self.config, positions.clone(), &self.device),
        };
        self.rope.0 = Some((positions, rope.clone()));
        let shared = mesh.context.size() > 1;
        Batch {
            packing: packing.clone(),
            context: shared.then(|| Context::new(mesh.context.clone(), self.context)),
            rope,
            clip,
        }
    }

    /// The units that are not blocks come first and last.
    fn unit(&mut self, unit: Unit) -> &mut UnitState {
        let last = self.units.len() - 1;
        match unit {
            Unit::Embedding => &mut self.units[0],
            Unit::Block(layer) => &mut self.units[layer + 1],
            Unit::Head => &mut self.units[last],
        }
    }

    /// The parameters of `unit`, gathered.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn params(&mut self, unit: Unit, mesh: &Mesh) -> Result<Params, CommError> {
        let compute = self.compute;
        self.unit(unit).params(compute, mesh)
    }

    /// Begins to gather a unit that will run soon.
    fn prefetch(&mut self, unit: Unit, mesh: &Mesh) -> Result<(), CommError> {
        let compute = self.compute;
        self.unit(unit).prefetch(compute, mesh)
    }

    /// Begins to gather what the forward pass needs after block `layer`.
    fn prefetch_after(&mut self, layer: usize, mesh: &Mesh) -> Result<(), CommError> {
        if layer + 1 < self.config.num_hidden_layers {
            return self.prefetch(Unit::Block(layer + 1), mesh);
        }
        self.prefetch(Unit::Head, mesh)
    }

    /// Adds gradients to a unit, the `last` of the step or not. Those of the units before have travelled
    /// meanwhile: with them settled, one unit's at most are on their way to their shards, and another's
    /// between replicas.
    fn add_gradients(
        &mut self,
        unit: Unit,
        gradients: Vec<Option<Tensor<1>>>,
        last: bool,
        mesh: &Mesh,
    ) -> Result<(), CommError> {
        // Backwards, as they come: what began first ends before the next begins.
        let mut units = self.units.iter_mut().rev();
        units.try_for_each(|unit| unit.settle(mesh))?;
        self.unit(unit).add_gradients(gradients, last, mesh)
    }

    /// Adds the gradient of `scale` · summed loss to the units, and returns that loss.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn accumulate(
        &mut self,
        micro: &MicroBatch,
        scale: f64,
        activations: Activations,
        mesh: &Mesh,
    ) -> Result<PassOutput, TrainError> {
        let config = self.config.clone();
        let batch = self.batch(&micro.packing, None, mesh);
        let layers = 0..config.num_hidden_layers;

        mesh.activity.at("the embedding");
        let embedding = Embedding::new(&self.params(Unit::Embedding, mesh)?);
        self.prefetch(Unit::Block(0), mesh)?;
        let embeddings = embedding.forward(micro.ids.clone(), self.compute);
        drop(embedding);

        let mut x = embeddings.clone();
        let mut kept = vec![];
        let mut state_ratios = vec![];
        for layer in layers.clone() {
            mesh.activity
                .at(format_args!("the forward of block {layer}"));
            let _sent = sent::for_unit(Unit::Block(layer));
            let params = self.params(Unit::Block(layer), mesh)?;
            self.prefetch_after(layer, mesh)?;
            if layer + 1 == config.num_hidden_layers && config.tie_word_embeddings {
                self.prefetch(Unit::Embedding, mesh)?;
            }
            let ratio = match activations {
                Activations::Keep => {
                    let graph = block_graph(&config, layer, params, x, &embeddings, &batch);
                    x = graph.output.clone().inner();
                    let ratio = graph.state_ratio.clone();
                    kept.push(Kept::Graph(Box::new(graph)));
                    ratio
                }
                Activations::Recompute => {
                    kept.push(Kept::Input(Box::new(x.clone())));
                    let block = Block::new(&config, layer, &params);
                    let out = block.forward(x, embeddings.clone(), &batch);
                    x = out.output;
                    out.state_ratio
                }
            };
            context::check(&batch)?;
            state_ratios.extend(ratio.map(|ratio| (layer, ratio)));
        }
        let state_ratios = context::largest(state_ratios, mesh)?;

        mesh.activity.at("the head");
        let (loss, mut dx) = self.head_pass(x, micro, scale, activations, mesh)?;

        let mut dembeddings: Option<Tensor<3>> = None;
        for layer in layers.rev() {
            mesh.activity
                .at(format_args!("the backward of block {layer}"));
            let _sent = sent::for_unit(Unit::Block(layer));
            let graph = match kept.pop().expect("one entry per block") {
                Kept::Graph(graph) => *graph,
                Kept::Input(x) => {
                    let params = self.params(Unit::Block(layer), mesh)?;
                    if let Some(before) = layer.checked_sub(1) {
                        self.prefetch(Unit::Block(before), mesh)?;
                    }
                    block_graph(&config, layer, params, *x, &embeddings, &batch)
                }
            };
            let mut gradients = backward_from(graph.output, dx);
            context::check(&batch)?;
            let own = graph.params.gradients(&mut gradients);
            self.add_gradients(Unit::Block(layer), own, micro.last, mesh)?;
            if let Some(part) = graph.embeddings.grad_remove(&mut gradients) {
                dembeddings = Some(match dembeddings {
                    Some(sum) => sum + part,
                    None => part,
                });
            }
            let reached = graph.x.grad_remove(&mut gradients);
            dx = reached.expect("a block's input reaches its output");
        }

        mesh.activity.at("the backward of the embedding");
        let dembedded = match dembeddings {
            Some(sum) => dx + sum,
            None => dx,
        };
        // The lookup once more, with a tape: its gradient depends on no value of the table.
        let compute = self.compute;
        let params = self.unit(Unit::Embedding).stand_in(compute).tracked();
        let embedded = Embedding::new(&params).forward(micro.ids.clone(), compute);
        let mut gradients = backward_from(embedded, dembedded);
        let own = params.gradients(&mut gradients);
        self.add_gradients(Unit::Embedding, own, micro.last, mesh)?;
        Ok(PassOutput { loss, state_ratios })
    }

    /// Loss and the gradient of the last block's output; the head's own gradients are added.
    fn head_pass(
        &mut self,
        x: Tensor<3>,
        micro: &MicroBatch,
        scale: f64,
        activations: Activations,
        mesh: &Mesh,
    ) -> Result<(Tensor<1>, Tensor<3>), TrainError> {
        let params = self.params(Unit::Head, mesh)?.tracked();
        let tied = match self.config.tie_word_embeddings {
            true => Some(self.params(Unit::Embedding, mesh)?.tracked()),
            false => None,
        };
        if activations == Activations::Recompute {
            let last = self.config.num_hidden_layers - 1;
            self.prefetch(Unit::Block(last), mesh)?;
        }
        let x = leaf(x);
        let weight = tied.as_ref().map(|tied| Embedding::new(tied).weight);
        let head = Head::new(&self.config, &params, weight);
        let loss = head.loss(x.clone(), micro.labels.clone(), scale);
        mesh.activity.at("the backward of the head");
        let mut gradients = loss.backward();
        let own = params.gradients(&mut gradients);
        self.add_gradients(Unit::Head, own, micro.last, mesh)?;
        if let Some(tied) = tied {
            let own = tied.gradients(&mut gradients);
            // The lookup's come, too.
            self.add_gradients(Unit::Embedding, own, false, mesh)?;
        }
        let dx = x.grad_remove(&mut gradients);
        Ok((loss.inner(), dx.expect("the head's input reaches the loss")))
    }

    /// The loss of each token here, 0 where it has no label: `[B·N]` f32.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn token_losses(
        &mut self,
        micro: &MicroBatch,
        mesh: &Mesh,
    ) -> Result<Tensor<1>, TrainError> {
        let config = self.config.clone();
        let batch = self.batch(&micro.packing, config.ttt.clip, mesh);
        let embedding = Embedding::new(&self.params(Unit::Embedding, mesh)?);
        let embeddings = embedding.forward(micro.ids.clone(), self.compute);
        let mut x = embeddings.clone();
        for layer in 0..config.num_hidden_layers {
            mesh.activity
                .at(format_args!("block {layer} in an evaluation"));
            let params = self.params(Unit::Block(layer), mesh)?;
            let block = Block::new(&config, layer, &params);
            self.prefetch_after(layer, mesh)?;
            x = block.forward(x, embeddings.clone(), &batch).output;
            context::check(&batch)?;
        }
        mesh.activity.at("the head in an evaluation");
        let tied = config.tie_word_embeddings.then_some(embedding.weight);
        let head = Head::new(&config, &self.params(Unit::Head, mesh)?, tied);
        Ok(head.token_losses(x, micro.labels.clone()))
    }
}

/// How often [`Model::accumulate`] gathers the parameters of a unit, and returns gradients of them.
pub fn gathers(config: &ModelConfig, unit: Unit, activations: Activations) -> (u64, u64) {
    match (unit, activations) {
        (Unit::Block(_), Activations::Recompute) => (2, 1),
        // Once more as the head.
        (Unit::Embedding, _) if config.tie_word_embeddings => (2, 2),
        _ => (1, 1),
    }
}

/// `value` as the leaf of a new graph.
fn leaf(value: Tensor<3>) -> Tensor<3> {
    value.inner().autodiff().require_grad()
}

/// Runs block `layer` on a graph of its own.
fn block_graph(
    config: &ModelConfig,
    layer: usize,
    params: Params,
    x: Tensor<3>,
    embeddings: &Tensor<3>,
    batch: &Batch,
) -> BlockGraph {
    let params = params.tracked();
    let x = leaf(x);
    // Only a layer that learns to predict embeddings sends a gradient back to them.
    let learns = config.is_ttt_layer(layer) && config.ttt.target != Target::Hidden;
    let embeddings = match learns {
        true => leaf(embeddings.clone()),
        false => embeddings.clone(),
    };
    let block = Block::new(config, layer, &params);
    let out = block.forward(x.clone(), embeddings.clone(), batch);
    BlockGraph {
        x,
        embeddings,
        params,
        output: out.output,
        state_ratio: out.state_ratio,
    }
}
