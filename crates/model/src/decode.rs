//! Generation: the same model, a few tokens at a time, with the state that carries over.
//!
//! A [`Session`] is one sequence: its keys and values (bounded by the window where attention
//! slides) and, per TTT layer, the running state S and the open chunk. Sessions are independent, so
//! a batch is several of them at any lengths. Cloning a session forks the sequence.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use ttt_kernels::Packing;
use ttt_kernels::rms_norm;
use ttt_kernels::ttt::{apply_state, outer_update};

use crate::block::Block;
use crate::config::ModelConfig;
use crate::mlp::Mlp;
use crate::model::{Embedding, Head};
use crate::params::{Params, Unit};
use crate::rope::RopeTable;
use crate::ttt::Ttt;

/// A model ready to generate.
#[derive(Clone, Debug)]
pub struct Decoder {
    config: ModelConfig,
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Head,
    dtype: DType,
    device: Device,
}

/// One sequence being read or written.
#[derive(Clone, Debug)]
pub struct Session {
    layers: Vec<LayerCache>,
    tokens: usize,
}

#[derive(Clone, Debug, Default)]
struct LayerCache {
    /// Keys (rotated) and values of the latest tokens: `[1, S, G, E]` each.
    keys_values: Option<(Tensor<4>, Tensor<4>)>,
    fast: FastWeights,
}

/// What a TTT layer carries from token to token.
#[derive(Clone, Debug, Default)]
struct FastWeights {
    /// S: `[D, F]` f32; `None` until the first chunk closes.
    state: Option<Tensor<2>>,
    /// Z and target source of the open chunk, in pieces: `[1, t, F]`, `[1, t, D]`.
    open: Vec<(Tensor<3>, Tensor<3>)>,
    open_tokens: usize,
}

impl Session {
    /// Tokens read so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

impl Decoder {
    /// Assembles a model from the parameters of its units, in the order of [`Unit::all`]; it
    /// computes in `dtype`.
    pub fn new(config: &ModelConfig, units: Vec<Params>, dtype: DType, device: &Device) -> Self {
        assert_eq!(units.len(), Unit::all(config).len(), "one Params per unit");
        let embedding = Embedding::new(&units[0]);
        let layers = config.num_hidden_layers;
        let tied = config.tie_word_embeddings.then(|| embedding.weight.clone());
        Self {
            config: config.clone(),
            blocks: (0..layers)
                .map(|layer| Block::new(config, layer, &units[layer + 1]))
                .collect(),
            head: Head::new(config, &units[layers + 1], tied),
            embedding,
            dtype,
            device: device.clone(),
        }
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A sequence of no tokens yet.
    pub fn session(&self) -> Session {
        Session {
            layers: vec![LayerCache::default(); self.blocks.len()],
            tokens: 0,
        }
    }

    /// Reads `ids` after what the session holds and returns the logits of each: `[N, V]`.
    ///
    /// # Panics
    /// If `ids` is empty or holds an id beyond the vocabulary.
    pub fn extend(&self, session: &mut Session, ids: &[u32]) -> Tensor<2> {
        let x = self.read(session, ids);
        self.head.logits(x).squeeze_dim(0)
    }

    /// [`Decoder::extend`], returning the logits of the last token only: `[V]`.
    pub fn extend_last(&self, session: &mut Session, ids: &[u32]) -> Tensor<1> {
        let x = self.read(session, ids);
        let [_, tokens, width] = x.dims();
        let last = x.slice([0..1, tokens - 1..tokens, 0..width]);
        self.head.logits(last).reshape([-1])
    }

    fn read(&self, session: &mut Session, ids: &[u32]) -> Tensor<3> {
        assert!(!ids.is_empty(), "nothing to read");
        let vocab = self.config.vocab_size;
        assert!(
            ids.iter().all(|&id| (id as usize) < vocab),
            "a token id beyond the vocabulary of {vocab}"
        );
        let data: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(data, [1, ids.len()]), &self.device);
        let tokens = ids.dims()[1];
        let positions = session.tokens..session.tokens + tokens;
        let rope = RopeTable::new(&self.config, positions, &self.device);
        let embeddings = self.embedding.forward(ids, self.dtype);
        let mut x = embeddings.clone();
        for (block, cache) in self.blocks.iter().zip(&mut session.layers) {
            x = self.step(block, cache, x, &embeddings, &rope);
        }
        session.tokens += tokens;
        x
    }

    fn step(
        &self,
        block: &Block,
        cache: &mut LayerCache,
        x: Tensor<3>,
        embeddings: &Tensor<3>,
        rope: &RopeTable,
    ) -> Tensor<3> {
        let normed = rms_norm(x.clone(), block.input_layernorm.clone(), block.eps);
        let [q, k, v] = block.self_attn.project(normed, rope);
        let (k, v) = match cache.keys_values.take() {
            None => (k, v),
            Some((keys, values)) => (
                Tensor::cat(vec![keys, k], 1),
                Tensor::cat(vec![values, v], 1),
            ),
        };
        let offset = k.dims()[1] - q.dims()[1];
        let window = block.self_attn.window();
        cache.keys_values = Some((latest(&k, window), latest(&v, window)));
        let x = x + block.self_attn.attend([q, k, v], offset);

        let normed = rms_norm(x.clone(), block.post_attention_layernorm.clone(), block.eps);
        let z = block.mlp.activate(normed.clone());
        let y = match block.mlp.ttt() {
            None => ttt_kernels::linear(z, block.mlp.down_proj().clone()),
            Some(ttt) => {
                let source = ttt.source(normed, embeddings.clone());
                cache
                    .fast
                    .extend(z, source, &block.mlp, ttt, self.config.ttt.clip)
            }
        };
        x + y
    }
}

/// The tokens that a later query can still see: all, or the last window − 1.
fn latest(x: &Tensor<4>, window: Option<usize>) -> Tensor<4> {
    let [batch, tokens, _, _] = x.dims();
    match window {
        // At least one token is kept, since a tensor cannot be empty.
        Some(window) if tokens >= window.max(2) => x
            .clone()
            .slice([0..batch, tokens + 1 - window.max(2)..tokens]),
        _ => x.clone(),
    }
}

impl FastWeights {
    /// The down projection of new tokens, chunk by chunk: apply the state, then, when a chunk
    /// fills up, add its update. z `[1, N, F]`, source `[1, N, D]` → `[1, N, D]`.
    fn extend(
        &mut self,
        z: Tensor<3>,
        source: Tensor<3>,
        mlp: &Mlp,
        ttt: &Ttt,
        clip: Option<f64>,
    ) -> Tensor<3> {
        let config = ttt.config();
        let tokens = z.dims()[1];
        let mut outputs = vec![];
        let mut begin = 0;
        while begin < tokens {
            let end = tokens.min(begin + config.chunk - self.open_tokens);
            let piece = |t: &Tensor<3>| t.clone().slice([0..1, begin..end]);
            let (tz, tsource) = (piece(&z), piece(&source));
            let flat = tz.clone().squeeze_dim(0);
            let y = apply_state(flat, mlp.down_proj(), self.state.as_ref(), config.lr);
            outputs.push(y.unsqueeze::<3>());
            self.open.push((tz, tsource));
            self.open_tokens += end - begin;
            if self.open_tokens == config.chunk {
                self.close_chunk(ttt, clip);
            }
            begin = end;
        }
        Tensor::cat(outputs, 1)
    }

    fn close_chunk(&mut self, ttt: &Ttt, clip: Option<f64>) {
        let (z, source): (Vec<_>, Vec<_>) = self.open.drain(..).unzip();
        self.open_tokens = 0;
        let (z, source) = (Tensor::cat(z, 1), Tensor::cat(source, 1));
        let v = ttt.targets(source, &Packing::whole_rows(1, ttt.config().chunk));
        let delta = outer_update(v.squeeze_dim(0), z.squeeze_dim(0), clip);
        self.state = Some(match self.state.take() {
            Some(sum) => sum + delta,
            None => delta,
        });
    }
}
