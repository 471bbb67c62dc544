//! Reading a prompt: the forward pass alone, up to the logits of the last token.

use std::time::Instant;

use anyhow::{Context, ensure};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use serde_json::{Value, json};
use ttt_kernels::Packing;
use ttt_kernels::clock::{Clock, median};
use ttt_kernels::dtype::cast;
use ttt_kernels::memory;
use ttt_model::{Batch, Block, Embedding, Head, ModelConfig, Params, Unit};
use ttt_train::config::Config;
use ttt_train::device;
use ttt_train::init::initial_values;
use ttt_train::units::FlatLayout;

use super::run::{Run, gib, join, round};
use super::training::random_rows;
use crate::gpu::args::Mode;

/// A model without anything to train it.
struct Reader {
    config: ModelConfig,
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Head,
    compute: DType,
    batch: Batch,
}

/// The parameters of `unit` as the model computes with them, at a new run's initial values, cut from one
/// buffer of each precision as those of a trained model are.
fn params(config: &ModelConfig, unit: Unit, compute: DType, device: &Device) -> Params {
    let specs = FlatLayout::new(config, unit, 1).specs;
    let mut flat = Vec::with_capacity(specs.len());
    for (wide, dtype) in [(true, DType::F32), (false, compute)] {
        let section = || specs.iter().filter(|spec| spec.master_precision == wide);
        let all: Vec<f32> = section().flat_map(|spec| initial_values(spec, 1)).collect();
        if all.is_empty() {
            continue;
        }
        let shape = [all.len()];
        let all = Tensor::<1>::from_data(TensorData::new(all, shape), (device, DType::F32));
        let all = cast(all, dtype);
        let mut end = 0;
        flat.extend(section().map(|spec| {
            let begin = end;
            end += spec.len();
            all.clone().narrow(0, begin, spec.len())
        }));
    }
    Params::new(specs, flat)
}

impl Reader {
    fn new(run: &Run, config: ModelConfig, device: &Device) -> Self {
        let compute = device::compute_dtype(run.device, None);
        let of = |unit| params(&config, unit, compute, device);
        let embedding = Embedding::new(&of(Unit::Embedding));
        let layers = 0..config.num_hidden_layers;
        let tied = config.tie_word_embeddings.then(|| embedding.weight.clone());
        Self {
            blocks: layers
                .map(|layer| Block::new(&config, layer, &of(Unit::Block(layer))))
                .collect(),
            head: Head::new(&config, &of(Unit::Head), tied),
            embedding,
            compute,
            batch: Batch::inference(&config, Packing::whole_rows(run.batch, run.seq), device),
            config,
        }
    }

    /// The logits of the last token: ids `[B, N]` → `[B, V]`.
    fn read(&self, ids: &Tensor<2, Int>) -> Tensor<2> {
        let embeddings = self.embedding.forward(ids.clone(), self.compute);
        let mut x = embeddings.clone();
        for block in &self.blocks {
            x = block.forward(x, embeddings.clone(), &self.batch).output;
        }
        let [rows, tokens, width] = x.dims();
        let last = x.slice([0..rows, tokens - 1..tokens, 0..width]);
        self.head
            .logits(last)
            .reshape([rows, self.config.vocab_size])
    }
}

/// A model of `run` and a prompt for it.
fn prepared(run: &Run, device: &Device) -> anyhow::Result<(Config, Reader, Tensor<2, Int>)> {
    let config = run.config()?;
    let reader = Reader::new(run, config.model.clone(), device);
    let rows = random_rows(run, config.model.vocab_size, 1);
    let ids: Vec<i32> = rows
        .iter()
        .flat_map(|row| row.input_ids.iter().map(|&id| id as i32))
        .collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [run.batch, run.seq]), device);
    device.sync().context("the device failed")?;
    Ok((config, reader, ids))
}

/// Prints the operations of one forward pass of `run`, the longest first.
pub fn profile(run: &Run, device: &Device) -> anyhow::Result<()> {
    let (_, reader, ids) = prepared(run, device)?;
    let logits = super::profile::profile(run, Mode::Prefill, device, || Ok(reader.read(&ids)))?;
    check(&logits)
}

/// The line of `run`.
pub fn measure(run: &Run, device: &Device) -> anyhow::Result<Value> {
    let begun = Instant::now();
    let (config, reader, ids) = prepared(run, device)?;
    let init_s = begun.elapsed().as_secs_f64();

    let first = Instant::now();
    let logits = reader.read(&ids);
    check(&logits)?;
    let first_step_s = first.elapsed().as_secs_f64();
    for _ in 1..run.warmup {
        reader.read(&ids);
    }
    let mut clock = Clock::new(device);
    let failed = |error: String| anyhow::anyhow!("the device failed: {error}");
    clock.mark().map_err(failed)?;
    for _ in 0..run.steps {
        reader.read(&ids);
        clock.mark().map_err(failed)?;
    }
    let times = clock.read().map_err(failed)?;
    let (logits, peak) = memory::peak_of(device, || reader.read(&ids));
    check(&logits)?;
    let mut line = run.line(&config, Mode::Prefill, median(&times));
    let more = json!({
        "init_s": round(init_s, 2),
        "first_step_s": round(first_step_s, 2),
        "peak_mem_gib": peak.map(gib),
    });
    join(&mut line, more);
    Ok(line)
}

/// Logits of random weights are finite and differ from each other.
fn check(logits: &Tensor<2>) -> anyhow::Result<()> {
    let flat: Tensor<1> = cast(logits.clone(), DType::F32).reshape([-1]);
    let values = device::read(&flat)?;
    ensure!(
        values.iter().all(|x| x.is_finite()),
        "the logits are not finite"
    );
    ensure!(
        values.iter().any(|x| *x != values[0]),
        "all logits are {}: nothing was computed",
        values[0]
    );
    Ok(())
}
