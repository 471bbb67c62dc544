//! Where every parameter of a model comes from: the folder, or, for new TTT parameters, their
//! initialisation.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use ttt_model::params::all_params;
use ttt_model::{Init, ModelConfig, ParamGroup, ParamSpec, Target};
use ttt_weights::{Dtype, Folder};

use super::error::InteropError;
use crate::error::TrainError;
use crate::init::draw;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A plan to fill a model from a folder, checked by names, shapes and types alone.
#[derive(Debug)]
pub struct InitFrom<'a> {
    weights: &'a Folder,
    /// All parameters, in the order of the model's units.
    specs: Vec<ParamSpec>,
    /// Those that the folder lacks.
    new: BTreeSet<String>,
    /// The folder stores the tied head a second time.
    redundant_head: bool,
    seed: u64,
}

impl<'a> InitFrom<'a> {
    /// Plans to fill the model `config` from `weights`. TTT layers that the folder does not have
    /// are new: their parameters are drawn from `seed`, such that the model computes exactly what
    /// it computes without them.
    ///
    /// # Errors
    /// If another parameter is missing, a tensor would not be used, or one has another shape or a
    /// type that is not read.
    pub fn plan(
        config: &ModelConfig,
        weights: &'a Folder,
        seed: u64,
    ) -> Result<Self, InteropError> {
        let mut specs = all_params(config);
        let mut unused: BTreeSet<&str> = weights.names().collect();
        let mut absent: Vec<&ParamSpec> = vec![];
        for spec in &specs {
            match unused.remove(spec.name.as_str()) {
                true => check_tensor(weights, spec)?,
                false => absent.push(spec),
            }
        }
        let new = new_layers(weights, &specs, &absent)?;
        // Older files hold RoPE's frequencies, which follow from the configuration.
        unused.retain(|name| !name.ends_with(".rotary_emb.inv_freq"));
        let redundant_head = config.tie_word_embeddings && unused.remove(HEAD);
        if !unused.is_empty() {
            let ttt = unused.iter().all(|name| name.contains(".mlp.ttt_"));
            return Err(InteropError::Unused {
                dir: weights.dir().to_path_buf(),
                names: some_of(unused.iter().copied()),
                hint: match ttt {
                    true => {
                        "do ttt.layers, ttt.projection and ttt.target say what these weights were trained with?"
                    }
                    false => "is this the configuration that belongs to these weights?",
                },
            });
        }
        for spec in specs.iter_mut().filter(|spec| new.contains(&spec.name)) {
            // Without a convolution only the projection can make the first updates nothing, and
            // its gradient does not need it to be anything.
            if config.ttt.target == Target::NextToken {
                spec.init = Init::Zeros;
            }
        }
        Ok(Self {
            weights,
            specs,
            new,
            redundant_head,
            seed,
        })
    }

    /// All parameters, in the order of the model's units.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// The parameters that the folder does not have.
    pub fn new_parameters(&self) -> impl Iterator<Item = &str> {
        self.new.iter().map(String::as_str)
    }

    /// The folder.
    pub fn weights(&self) -> &Folder {
        self.weights
    }

    /// The values of one parameter, row-major.
    ///
    /// # Errors
    /// If the model has no parameter of this name, or its file cannot be read.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        let mut values = vec![0.0; self.spec(name)?.len()];
        let all = 0..values.len();
        self.read(name, all, &mut values)?;
        Ok(values)
    }

    /// Elements `range` of one parameter in row-major order.
    ///
    /// # Errors
    /// As [`InitFrom::values`], or if `range` and `values` do not fit it.
    pub fn read(
        &self,
        name: &str,
        range: Range<usize>,
        values: &mut [f32],
    ) -> Result<(), TrainError> {
        let spec = self.spec(name)?;
        if self.new.contains(name) {
            draw(spec, self.seed, range, values);
            return Ok(());
        }
        if name == EMBEDDING {
            self.check_redundant_head()?;
        }
        Ok(self.weights.read_f32_range(name, range, values)?)
    }

    fn spec(&self, name: &str) -> Result<&ParamSpec, InteropError> {
        let spec = self.specs.iter().find(|spec| spec.name == name);
        spec.ok_or_else(|| InteropError::Missing {
            dir: self.weights.dir().to_path_buf(),
            names: name.to_string(),
            hint: "the model has no such parameter",
        })
    }

    /// Every parameter with its values, one at a time.
    pub fn iter(&self) -> impl Iterator<Item = Result<(&ParamSpec, Vec<f32>), TrainError>> {
        self.specs
            .iter()
            .map(|spec| Ok((spec, self.values(&spec.name)?)))
    }

    /// Refuses a head that is said to be tied and is not.
    pub(super) fn check_redundant_head(&self) -> Result<(), TrainError> {
        if self.redundant_head {
            let same_type = self.weights.info(HEAD) == self.weights.info(EMBEDDING);
            if !(same_type && *self.weights.bytes(HEAD)? == *self.weights.bytes(EMBEDDING)?) {
                let dir = self.weights.dir().to_path_buf();
                return Err(InteropError::TiedHeadDiffers { dir }.into());
            }
        }
        Ok(())
    }
}

fn check_tensor(weights: &Folder, spec: &ParamSpec) -> Result<(), InteropError> {
    let Some(found) = weights.info(&spec.name) else {
        return Ok(()); // reported with all that are missing
    };
    let (dir, name) = (weights.dir().to_path_buf(), spec.name.clone());
    if !matches!(found.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        let found = found.dtype;
        return Err(InteropError::Dtype { dir, name, found });
    }
    if found.shape != spec.shape {
        return Err(InteropError::Shape {
            dir,
            name,
            found: found.shape,
            expected: spec.shape.clone(),
        });
    }
    Ok(())
}

/// The absent parameters, if all of them belong to TTT layers of which the folder has nothing.
fn new_layers(
    weights: &Folder,
    specs: &[ParamSpec],
    absent: &[&ParamSpec],
) -> Result<BTreeSet<String>, InteropError> {
    let missing = |names: Vec<&str>, hint| {
        let dir = weights.dir().to_path_buf();
        let names = some_of(names.into_iter());
        Err(InteropError::Missing { dir, names, hint })
    };
    let base = absent.iter().filter(|spec| spec.group != ParamGroup::Ttt);
    let base: Vec<&str> = base.map(|spec| spec.name.as_str()).collect();
    if !base.is_empty() {
        let hint = match base == [HEAD] {
            true => "is its head the embedding (tie_word_embeddings)?",
            false => "is this the configuration that belongs to these weights?",
        };
        return missing(base, hint);
    }
    // Half a TTT layer was trained under other settings, and the rest cannot be made up.
    let mut have: BTreeMap<&str, bool> = BTreeMap::new();
    for spec in specs.iter().filter(|spec| spec.group == ParamGroup::Ttt) {
        *have.entry(layer(&spec.name)).or_default() |= weights.info(&spec.name).is_some();
    }
    let half = absent.iter().filter(|spec| have[layer(&spec.name)]);
    let half: Vec<&str> = half.map(|spec| spec.name.as_str()).collect();
    if !half.is_empty() {
        return missing(
            half,
            "do ttt.projection and ttt.target say what these weights were trained with?",
        );
    }
    Ok(absent.iter().map(|spec| spec.name.clone()).collect())
}

/// `model.layers.3.mlp.ttt_conv.weight` → `model.layers.3.mlp`
fn layer(name: &str) -> &str {
    name.split(".ttt_").next().unwrap_or(name)
}

/// The first names and how many more there are.
fn some_of<'n>(names: impl ExactSizeIterator<Item = &'n str>) -> String {
    const SHOWN: usize = 3;
    let more = names.len().saturating_sub(SHOWN);
    let shown: Vec<&str> = names.take(SHOWN).collect();
    match more {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
