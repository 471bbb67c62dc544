//! The model's configuration, with Hugging Face's key names.

use serde::{Deserialize, Serialize};

/// A decoder with In-Place TTT layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Which family's details apply.
    #[serde(default)]
    pub model_type: ModelType,
    /// Rows of the embedding, V.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub hidden_size: usize,
    /// Width of the MLP, F.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads, H.
    pub num_attention_heads: usize,
    /// Key-value heads, G; default H.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<usize>,
    /// Width of a head, E; default D / H.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Added to the mean square in RMSNorm.
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// RoPE base.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Change of the RoPE frequencies for longer contexts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Positions the model is meant for; information for other programs.
    #[serde(default = "default_max_positions")]
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Window of sliding-attention layers: keys i − window + 1 ..= i.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<usize>,
    /// Attention of each layer; default: all sliding if `sliding_window` is given, else all full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_types: Option<Vec<LayerType>>,
    /// Standard deviation of the initial matrices.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// The layers that learn while reading.
    #[serde(default)]
    pub ttt: TttConfig,
}

/// A model family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelType {
    /// No biases, no normalisation of queries and keys.
    #[default]
    Llama,
    /// Biases on the query, key and value projections.
    Qwen2,
    /// Queries and keys normalised per head (QK-norm).
    Qwen3,
}

/// What a layer's attention sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// All earlier tokens.
    FullAttention,
    /// The last `sliding_window` tokens.
    SlidingAttention,
}

/// How RoPE's frequencies are changed for contexts longer than those trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// LLaMA 3.1: low frequencies divided by `factor`, a smooth passage in between.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Below this many turns over the original context a frequency is low.
        low_freq_factor: f64,
        /// Above this many turns it is kept.
        high_freq_factor: f64,
        /// Context length of the original training.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Context length of the original training.
        original_max_position_embeddings: usize,
        /// Turns above which a frequency is kept.
        #[serde(default = "default_beta_fast")]
        beta_fast: f64,
        /// Turns below which a frequency is divided by `factor`.
        #[serde(default = "default_beta_slow")]
        beta_slow: f64,
        /// Factor on cos and sin; default 0.1 ln(factor) + 1.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attention_factor: Option<f64>,
    },
}

/// The In-Place TTT layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TttConfig {
    /// Off: every layer is an ordinary one.
    pub enabled: bool,
    /// The layers that learn; in place of `every`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Every so many layers, from layer 0; default 6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<usize>,
    /// Tokens per chunk, C.
    pub chunk: usize,
    /// Inner learning rate η.
    pub lr: f64,
    /// What the fast weight learns to predict.
    pub target: Target,
    /// Whether targets go through the learned matrix W_t.
    pub projection: bool,
    /// Taps of the target convolution.
    pub conv_kernel: usize,
    /// Largest Frobenius norm of one chunk's update at inference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
}

impl Default for TttConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            layers: None,
            every: None,
            chunk: 1024,
            lr: 0.3,
            target: Target::Embedding,
            projection: true,
            conv_kernel: 5,
            clip: None,
        }
    }
}

/// Where a TTT layer's targets come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The embeddings, mixed by the learned convolution: for training from scratch.
    Embedding,
    /// The MLP's own input, mixed by the learned convolution: for continuing a trained model.
    Hidden,
    /// The next token's embedding, without a convolution.
    NextToken,
}

fn default_eps() -> f64 {
    1e-6
}
fn default_rope_theta() -> f64 {
    10_000.0
}
fn default_max_positions() -> usize {
    32_768
}
fn default_initializer_range() -> f64 {
    0.02
}
fn default_beta_fast() -> f64 {
    32.0
}
fn default_beta_slow() -> f64 {
    1.0
}

/// A configuration that no model can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct ConfigError {
    /// The key at fault, below `[model]`.
    pub key: &'static str,
    /// What is wrong with it and what would do.
    pub problem: String,
}

fn refuse(key: &'static str, problem: impl Into<String>) -> Result<(), ConfigError> {
    let problem = problem.into();
    Err(ConfigError { key, problem })
}

impl ModelConfig {
    /// Key-value heads, G.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of a head, E.
    pub fn head_size(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Whether queries and keys are normalised per head.
    pub fn qk_norm(&self) -> bool {
        self.model_type == ModelType::Qwen3
    }

    /// Whether the query, key and value projections have biases.
    pub fn qkv_bias(&self) -> bool {
        self.model_type == ModelType::Qwen2
    }

    /// The window of layer `layer`'s attention, `None` for full attention.
    pub fn window(&self, layer: usize) -> Option<usize> {
        match &self.layer_types {
            Some(types) if types[layer] == LayerType::FullAttention => None,
            _ => self.sliding_window,
        }
    }

    /// The layers that learn while reading, ascending.
    pub fn ttt_layers(&self) -> Vec<usize> {
        match (&self.ttt.layers, self.ttt.enabled) {
            (_, false) => vec![],
            (Some(layers), _) => layers.clone(),
            (None, _) => (0..self.num_hidden_layers)
                .step_by(self.ttt.every.unwrap_or(6).max(1))
                .collect(),
        }
    }

    /// Whether layer `layer` learns while reading.
    pub fn is_ttt_layer(&self, layer: usize) -> bool {
        self.ttt_layers().contains(&layer)
    }

    /// Refuses sizes that cannot be built.
    ///
    /// # Errors
    /// With the key at fault and what would do.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (key, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.kv_heads()),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ] {
            if size == 0 {
                refuse(key, "must be at least 1, got 0")?;
            }
        }
        let (heads, groups) = (self.num_attention_heads, self.kv_heads());
        if !heads.is_multiple_of(groups) {
            refuse(
                "num_key_value_heads",
                format!("{heads} query heads do not divide into {groups} groups"),
            )?;
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(heads) {
            let hidden = self.hidden_size;
            refuse(
                "head_dim",
                format!("hidden_size {hidden} is no multiple of {heads} heads: give head_dim"),
            )?;
        }
        let size = self.head_size();
        if !size.is_multiple_of(2) || size == 0 {
            refuse(
                "head_dim",
                format!("rotary embeddings need an even head size, got {size}"),
            )?;
        }
        for (key, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
            ("initializer_range", self.initializer_range),
        ] {
            if !(value.is_finite() && value > 0.0) {
                refuse(key, format!("must be a positive number, got {value}"))?;
            }
        }
        if let Some(types) = &self.layer_types {
            let (given, layers) = (types.len(), self.num_hidden_layers);
            if given != layers {
                refuse(
                    "layer_types",
                    format!("lists {given} layers, num_hidden_layers is {layers}"),
                )?;
            }
            if types.contains(&LayerType::SlidingAttention) && self.sliding_window.is_none() {
                refuse(
                    "sliding_window",
                    "layer_types has sliding_attention layers: give the window in tokens",
                )?;
            }
        }
        self.validate_rope_scaling()?;
        self.ttt.validate(self.num_hidden_layers)
    }

    fn validate_rope_scaling(&self) -> Result<(), ConfigError> {
        let (factor, original) = match &self.rope_scaling {
            None => return Ok(()),
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                ..
            }) => (*factor, *original_max_position_embeddings),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                if low_freq_factor >= high_freq_factor {
                    refuse(
                        "rope_scaling",
                        "low_freq_factor must be below high_freq_factor",
                    )?;
                }
                (*factor, *original_max_position_embeddings)
            }
        };
        if !(factor.is_finite() && factor >= 1.0) || original == 0 {
            refuse(
                "rope_scaling",
                format!(
                    "needs factor >= 1 and original_max_position_embeddings >= 1, got {factor} and {original}"
                ),
            )?;
        }
        Ok(())
    }
}

impl TttConfig {
    /// Taps of the learned target convolution, `None` where the target has none.
    pub fn conv_taps(&self) -> Option<usize> {
        (self.target != Target::NextToken).then_some(self.conv_kernel)
    }

    fn validate(&self, depth: usize) -> Result<(), ConfigError> {
        if !self.enabled {
            return Ok(());
        }
        if self.layers.is_some() && self.every.is_some() {
            refuse("ttt.layers", "give either layers or every, not both")?;
        }
        if self.every == Some(0) {
            refuse("ttt.every", "must be at least 1, got 0")?;
        }
        if let Some(layers) = &self.layers {
            if let Some(beyond) = layers.iter().find(|&&layer| layer >= depth) {
                let last = depth - 1;
                refuse(
                    "ttt.layers",
                    format!(
                        "layer {beyond} does not exist: the model has {depth} layers, 0 to {last}"
                    ),
                )?;
            }
            if layers.is_empty() || !layers.windows(2).all(|pair| pair[0] < pair[1]) {
                refuse(
                    "ttt.layers",
                    "must list at least one layer, ascending and without repeats",
                )?;
            }
        }
        if self.chunk == 0 {
            refuse("ttt.chunk", "must be at least 1 token, got 0")?;
        }
        if !(self.lr.is_finite() && self.lr >= 0.0) {
            let lr = self.lr;
            refuse(
                "ttt.lr",
                format!("must be zero or a positive number, got {lr}"),
            )?;
        }
        if self.conv_kernel.is_multiple_of(2) {
            let taps = self.conv_kernel;
            refuse(
                "ttt.conv_kernel",
                format!("must be odd, so that one tap is the current token, got {taps}"),
            )?;
        }
        if self
            .clip
            .is_some_and(|clip| !(clip.is_finite() && clip > 0.0))
        {
            refuse("ttt.clip", "must be a positive number")?;
        }
        Ok(())
    }
}
