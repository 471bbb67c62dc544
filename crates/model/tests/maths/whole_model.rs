//! A model run from tokens to logits and loss in one graph, as the tests need it. Training runs
//! the same units one by one.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use ttt_kernels::Packing;
use ttt_kernels::ops::cross_entropy::labels;
use ttt_kernels::testing::values;
use ttt_model::decode::Decoder;
use ttt_model::{Batch, Block, Embedding, Head, ModelConfig, ParamSpec, Params, Unit};

/// Parameters by unit, and the precision they compute in.
#[derive(Clone, Debug)]
pub struct WholeModel {
    pub config: ModelConfig,
    units: Vec<Params>,
    dtype: DType,
}

impl WholeModel {
    /// A model whose parameters are `value(spec)`, flat, in precision `dtype`.
    pub fn new(
        config: &ModelConfig,
        dtype: DType,
        mut value: impl FnMut(&ParamSpec) -> Tensor<1>,
    ) -> Self {
        let unit = |unit: Unit| {
            let specs = unit.params(config);
            let flat = specs.iter().map(&mut value).collect();
            Params::new(specs, flat)
        };
        Self {
            config: config.clone(),
            units: Unit::all(config).into_iter().map(unit).collect(),
            dtype,
        }
    }

    fn tracked(&self) -> Self {
        let units = self.units.iter().cloned().map(Params::tracked);
        Self {
            units: units.collect(),
            ..self.clone()
        }
    }

    /// The parameters of block `layer`.
    pub fn block(&self, layer: usize) -> &Params {
        &self.units[layer + 1]
    }

    fn head(&self) -> Head {
        let tied = self.config.tie_word_embeddings;
        let tied = tied.then(|| Embedding::new(&self.units[0]).weight);
        Head::new(&self.config, &self.units[self.units.len() - 1], tied)
    }

    /// What the last block returns: `[B, N, D]`.
    fn hidden(&self, ids: &Tensor<2, Int>, batch: &Batch) -> Tensor<3> {
        let embeddings = Embedding::new(&self.units[0]).forward(ids.clone(), self.dtype);
        let mut x = embeddings.clone();
        for layer in 0..self.config.num_hidden_layers {
            let block = Block::new(&self.config, layer, self.block(layer));
            x = block.forward(x, embeddings.clone(), batch).output;
        }
        x
    }

    /// ids `[B, N]` → `[B, N, V]`, as at inference.
    pub fn logits(&self, ids: &Tensor<2, Int>, packing: &Packing) -> Tensor<3> {
        let batch = Batch::inference(&self.config, packing.clone(), &Device::flex());
        self.head().logits(self.hidden(ids, &batch))
    }

    fn mean_loss(&self, ids: &Tensor<2, Int>, packing: &Packing) -> Tensor<1> {
        let [rows, tokens] = ids.dims();
        let all: Vec<i64> = ids.to_data().convert::<i64>().try_into_vec().unwrap();
        let next = |i: usize| (!(i + 1).is_multiple_of(tokens)).then(|| all[i + 1] as u32);
        let next: Vec<Option<u32>> = (0..rows * tokens).map(next).collect();
        let scale = 1.0 / (rows * (tokens - 1)) as f64;
        let labels = labels(&next, &Device::flex());
        let batch = Batch::training(&self.config, packing.clone(), &Device::flex());
        self.head().loss(self.hidden(ids, &batch), labels, scale)
    }

    /// Mean cross-entropy of all B (N − 1) next tokens.
    pub fn loss(&self, ids: &Tensor<2, Int>, packing: &Packing) -> f64 {
        values(&self.mean_loss(ids, packing))[0]
    }

    /// The gradient of [`WholeModel::loss`] by parameter name; zeros where none arrived.
    pub fn gradients(&self, ids: &Tensor<2, Int>, packing: &Packing) -> BTreeMap<String, Vec<f64>> {
        let model = self.tracked();
        let mut gradients = model.mean_loss(ids, packing).backward();
        let mut named = BTreeMap::new();
        for (unit, params) in Unit::all(&self.config).into_iter().zip(&model.units) {
            let specs = unit.params(&self.config);
            for (spec, gradient) in specs.iter().zip(params.gradients(&mut gradients)) {
                let gradient = gradient.map_or_else(|| vec![0.0; spec.len()], |g| values(&g));
                named.insert(spec.name.clone(), gradient);
            }
        }
        named
    }

    /// The same model for decoding.
    pub fn decoder(&self) -> Decoder {
        Decoder::new(
            &self.config,
            self.units.clone(),
            self.dtype,
            &Device::flex(),
        )
    }
}

/// Token ids of equal rows: `[B, N]`.
pub fn token_ids(rows: &[Vec<u32>]) -> Tensor<2, Int> {
    let shape = [rows.len(), rows[0].len()];
    let ids: Vec<i64> = rows.iter().flatten().map(|&id| i64::from(id)).collect();
    Tensor::from_data(TensorData::new(ids, shape), &Device::flex())
}
