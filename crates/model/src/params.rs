//! Every parameter of a model: its name, shape, initial values and treatment.
//!
//! A model is a list of [`Unit`]s. A unit is what is gathered, run and differentiated at once, so
//! it is also what activation recompute and sharding work on.

use burn::tensor::{Gradients, Tensor};

use crate::config::ModelConfig;

/// A part of the model that is run as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    /// The embedding matrix.
    Embedding,
    /// Block `i`.
    Block(usize),
    /// The last norm and, if not tied to the embedding, the head.
    Head,
}

/// Which part of the parameter count a parameter belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ParamGroup {
    /// The embedding matrix.
    Embedding,
    /// Query, key, value and output projections.
    Attention,
    /// Gate, up and down projections.
    Mlp,
    /// Convolutions and projections of the TTT targets.
    Ttt,
    /// Gains.
    Norm,
    /// The output matrix.
    Head,
}

/// Initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All ones.
    Ones,
    /// All zeros.
    Zeros,
    /// Independent normals of this standard deviation.
    Normal(f64),
    /// A square matrix with normals of this standard deviation on the diagonal, zeros elsewhere.
    Diagonal(f64),
}

/// One parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Hugging Face path.
    pub name: String,
    /// Hugging Face shape: matrices are `[out, in]`.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// What it counts as.
    pub group: ParamGroup,
    /// Whether the maths needs it in master precision even where the rest computes in bf16: the
    /// weight that small fast updates are added to (docs/in-place-ttt.md, section 6).
    pub master_precision: bool,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether weight decay applies: to matrices, not to gains, biases or the convolution's taps.
    pub fn decays(&self) -> bool {
        self.shape.len() == 2
    }
}

impl Unit {
    /// The units of a model in the order of the forward pass.
    pub fn all(config: &ModelConfig) -> Vec<Unit> {
        let blocks = (0..config.num_hidden_layers).map(Unit::Block);
        std::iter::once(Unit::Embedding)
            .chain(blocks)
            .chain([Unit::Head])
            .collect()
    }

    /// The parameters of this unit.
    pub fn params(self, config: &ModelConfig) -> Vec<ParamSpec> {
        match self {
            Unit::Embedding => vec![matrix(
                config,
                "model.embed_tokens.weight".into(),
                config.vocab_size,
                config.hidden_size,
                ParamGroup::Embedding,
            )],
            Unit::Block(layer) => block(config, layer),
            Unit::Head => head(config),
        }
    }
}

/// The parameters of all units, in order.
pub fn all_params(config: &ModelConfig) -> Vec<ParamSpec> {
    Unit::all(config)
        .into_iter()
        .flat_map(|unit| unit.params(config))
        .collect()
}

fn matrix(
    config: &ModelConfig,
    name: String,
    rows: usize,
    columns: usize,
    group: ParamGroup,
) -> ParamSpec {
    ParamSpec {
        name,
        shape: vec![rows, columns],
        init: Init::Normal(config.initializer_range),
        group,
        master_precision: false,
    }
}

fn vector(name: String, len: usize, init: Init, group: ParamGroup) -> ParamSpec {
    ParamSpec {
        name,
        shape: vec![len],
        init,
        group,
        master_precision: false,
    }
}

fn block(config: &ModelConfig, layer: usize) -> Vec<ParamSpec> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let size = config.head_size();
    let (queries, keys) = (config.num_attention_heads * size, config.kv_heads() * size);
    let at = |path: &str| format!("model.layers.{layer}.{path}");
    let weight = |path: &str, rows, columns, group| {
        matrix(config, at(&format!("{path}.weight")), rows, columns, group)
    };
    let attention = ParamGroup::Attention;
    let mut params = vec![
        weight("self_attn.q_proj", queries, hidden, attention),
        weight("self_attn.k_proj", keys, hidden, attention),
        weight("self_attn.v_proj", keys, hidden, attention),
        weight("self_attn.o_proj", hidden, queries, attention),
        weight("mlp.gate_proj", inner, hidden, ParamGroup::Mlp),
        weight("mlp.up_proj", inner, hidden, ParamGroup::Mlp),
        weight("mlp.down_proj", hidden, inner, ParamGroup::Mlp),
    ];
    let learns = config.is_ttt_layer(layer);
    params[6].master_precision = learns;
    if learns && config.ttt.projection {
        params.push(ParamSpec {
            init: Init::Diagonal(config.initializer_range),
            ..weight("mlp.ttt_proj", hidden, hidden, ParamGroup::Ttt)
        });
    }
    if let (true, Some(taps)) = (learns, config.ttt.conv_taps()) {
        params.push(ParamSpec {
            name: at("mlp.ttt_conv.weight"),
            shape: vec![hidden, 1, taps],
            init: Init::Zeros,
            group: ParamGroup::Ttt,
            master_precision: false,
        });
    }
    if config.qkv_bias() {
        for (path, len) in [("q", queries), ("k", keys), ("v", keys)] {
            let name = at(&format!("self_attn.{path}_proj.bias"));
            params.push(vector(name, len, Init::Zeros, attention));
        }
    }
    let mut norms = vec![
        ("input_layernorm", hidden),
        ("post_attention_layernorm", hidden),
    ];
    if config.qk_norm() {
        norms.extend([("self_attn.q_norm", size), ("self_attn.k_norm", size)]);
    }
    for (path, len) in norms {
        let name = at(&format!("{path}.weight"));
        params.push(vector(name, len, Init::Ones, ParamGroup::Norm));
    }
    params
}

fn head(config: &ModelConfig) -> Vec<ParamSpec> {
    let mut params = vec![];
    if !config.tie_word_embeddings {
        params.push(matrix(
            config,
            "lm_head.weight".into(),
            config.vocab_size,
            config.hidden_size,
            ParamGroup::Head,
        ));
    }
    let name = "model.norm.weight".to_string();
    params.push(vector(
        name,
        config.hidden_size,
        Init::Ones,
        ParamGroup::Norm,
    ));
    params
}

/// The values of one unit's parameters, each flat, in the order of [`Unit::params`].
#[derive(Clone, Debug)]
pub struct Params {
    specs: Vec<ParamSpec>,
    flat: Vec<Tensor<1>>,
}

impl Params {
    /// Pairs values with their descriptions.
    ///
    /// # Panics
    /// If there are not as many values as parameters, or one has another number of elements.
    pub fn new(specs: Vec<ParamSpec>, flat: Vec<Tensor<1>>) -> Self {
        assert_eq!(specs.len(), flat.len(), "one value per parameter");
        for (spec, value) in specs.iter().zip(&flat) {
            assert_eq!(value.dims(), [spec.len()], "{}", spec.name);
        }
        Self { specs, flat }
    }

    /// The same values as leaves of a new autodiff graph.
    pub fn tracked(self) -> Self {
        let flat = self.flat.into_iter();
        Self {
            flat: flat.map(|t| t.autodiff().require_grad()).collect(),
            specs: self.specs,
        }
    }

    /// The parameter whose name ends in `path`, with its shape; `None` if the unit has none.
    pub fn get<const R: usize>(&self, path: &str) -> Option<Tensor<R>> {
        let i = self.specs.iter().position(|spec| {
            spec.name
                .strip_suffix(path)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })?;
        let shape: [usize; R] = self.specs[i].shape.clone().try_into().ok()?;
        Some(self.flat[i].clone().reshape(shape))
    }

    /// [`Params::get`] of a parameter that every such unit has.
    ///
    /// # Panics
    /// If it is missing or has another rank.
    pub fn expect<const R: usize>(&self, path: &str) -> Tensor<R> {
        self.get(path)
            .unwrap_or_else(|| panic!("parameter {path} of rank {R} is part of this unit"))
    }

    /// Takes the gradient of each parameter, flat, in order; `None` where none arrived.
    pub fn gradients(&self, gradients: &mut Gradients) -> Vec<Option<Tensor<1>>> {
        let flat = self.flat.iter();
        flat.map(|leaf| leaf.grad_remove(gradients)).collect()
    }
}
