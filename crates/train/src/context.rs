//! Rows that several ranks share: which tokens each has, what must divide, and what they agree on.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
use ttt_kernels::context::AttentionExchange;
use ttt_kernels::ops::attention::heads_divide;
use ttt_kernels::{Context, ContextSettings};
use ttt_model::{Batch, LayerType, ModelConfig, Target};
use ttt_parallel::{CommError, Mesh};

use crate::config::ConfigError;
use crate::device::read;
use crate::error::TrainError;
use crate::sent;

/// The tokens of a row of `length` that this rank has.
///
/// # Errors
/// If the ranks do not divide the row.
pub fn part(length: usize, mesh: &Mesh) -> Result<Range<usize>, ConfigError> {
    let (rank, ranks) = (mesh.context.rank(), mesh.context.size());
    if !length.is_multiple_of(ranks) {
        return Err(ConfigError::invalid(
            "parallel.context",
            format!("a row of {length} tokens does not divide among {ranks} ranks"),
        ));
    }
    let part = length / ranks;
    Ok(rank * part..(rank + 1) * part)
}

/// Refuses a model or a row length that `ranks` ranks cannot share, in sentences that name the key.
///
/// # Errors
/// If a chunk would lie on two ranks, or a layer has no form for it.
pub fn validate(
    model: &ModelConfig,
    length: usize,
    ranks: usize,
    settings: &ContextSettings,
) -> Result<(), ConfigError> {
    if ranks == 1 {
        return Ok(());
    }
    let refuse = |key: &str, problem: String| Err(ConfigError::invalid(key, problem));
    let chunk = match model.ttt_layers().is_empty() {
        true => 1,
        false => model.ttt.chunk,
    };
    if !length.is_multiple_of(ranks * chunk) {
        let step = ranks * chunk;
        let below = length / step * step;
        let nearest = match below {
            0 => format!("the least is {step}"),
            _ => format!("the nearest are {below} and {}", below + step),
        };
        let whole = match chunk {
            1 => String::new(),
            _ => format!(" with whole chunks of {chunk} (model.ttt.chunk) each"),
        };
        return refuse(
            "train.sequence_length",
            format!(
                "{length} tokens do not divide among {ranks} ranks (parallel.context){whole}: {nearest}"
            ),
        );
    }
    for layer in 0..model.num_hidden_layers {
        // Whatever a layer may be is named here, so that a new kind is not switched on by accident.
        match model.layer_types.as_ref().map(|types| types[layer]) {
            None | Some(LayerType::FullAttention | LayerType::SlidingAttention) => {}
        }
        let groups = model.kv_heads();
        if model.window(layer).is_none()
            && settings.attention == AttentionExchange::Heads
            && !heads_divide(groups, ranks)
        {
            return refuse(
                "parallel.context_attention",
                format!(
                    "\"heads\": the {groups} key-value heads of layer {layer} do not divide among {ranks} \
                     ranks (parallel.context): set \"keys\" or \"auto\""
                ),
            );
        }
    }
    // The convolution is cut at the edges of chunks, and so of parts; fast weights travel.
    match model.ttt.target {
        Target::Embedding | Target::Hidden | Target::NextToken => Ok(()),
    }
}

/// Whether the exchanges of a batch's operations went well so far.
///
/// # Errors
/// If a rank is lost.
pub fn check(batch: &Batch) -> Result<(), CommError> {
    batch.context.as_ref().map_or(Ok(()), Context::check)
}

/// For each layer the largest value that a rank of the context group has: `[1]` f32 each.
///
/// # Errors
/// If a rank is lost.
pub fn largest(
    values: Vec<(usize, Tensor<1>)>,
    mesh: &Mesh,
) -> Result<Vec<(usize, Tensor<1>)>, CommError> {
    let ranks = mesh.context.size();
    if ranks == 1 || values.is_empty() {
        return Ok(values);
    }
    let (layers, own): (Vec<usize>, Vec<Tensor<1>>) = values.into_iter().unzip();
    // What a graph's forward pass measured belongs to no tape.
    let own = own.into_iter().map(|value| match value.is_autodiff() {
        true => value.inner(),
        false => value,
    });
    let own = Tensor::cat(own.collect(), 0);
    let all = sent::of(sent::NORMS, || mesh.context.all_gather(own))?;
    let all: Tensor<2> = all.reshape([ranks, layers.len()]);
    let all: Tensor<1> = all.max_dim(0).reshape([-1]);
    let each = layers.into_iter().enumerate();
    Ok(each
        .map(|(i, layer)| (layer, all.clone().narrow(0, i, 1)))
        .collect())
}

/// The sum over all ranks of values that the host has, such as losses by position.
///
/// # Errors
/// If a rank is lost or the device fails.
pub fn sum(values: &[f64], mesh: &Mesh, device: &Device) -> Result<Vec<f64>, TrainError> {
    if mesh.world.size() == 1 {
        return Ok(values.to_vec());
    }
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    let count = values.len();
    let values = Tensor::from_data(TensorData::new(values, [count]), (device, DType::F32));
    read(&mesh.all_reduce_sum(values)?)
}
