//! Where the parameters of a unit lie in its flat buffers, and in the shards of these.
//!
//! A buffer has up to two sections: the parameters that the model needs in master precision, then
//! the others; within each, those that decay come first. Each section is cut into equal shards,
//! padded with zeros, and a rank's shard is its part of one section behind its part of the other. So
//! a section can be gathered in its own precision, every rank sends as much as any other, and the
//! decaying part of a shard is one stretch.

use std::ops::Range;

use burn::tensor::DType;
use ttt_model::{ModelConfig, ParamSpec, Unit};

/// Elements that a part of a section is a multiple of: 512 bytes in bf16. On a GPU a slice is a view
/// only where both of its ends lie on such a boundary; elsewhere every parameter would be copied out
/// of what was gathered.
const ALIGNED: usize = 256;

/// Where a unit's parameters lie.
#[derive(Clone, Debug)]
pub struct FlatLayout {
    /// The parameters in order.
    pub specs: Vec<ParamSpec>,
    /// Where each begins, laid end to end, and the end of the last.
    offsets: Vec<usize>,
    sections: Vec<Section>,
    shards: usize,
}

/// Parameters that are gathered together.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// By number.
    pub params: Range<usize>,
    /// Where they lie, laid end to end.
    flat: Range<usize>,
    /// Where each rank's part lies in its shard.
    pub part: Range<usize>,
    /// Whether the model needs them in master precision.
    pub wide: bool,
}

/// Elements of one parameter in a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The parameter, by number.
    pub param: usize,
    /// Which of its elements, row-major.
    pub elements: Range<usize>,
    /// Where the first lies in the shard.
    pub at: usize,
}

impl FlatLayout {
    /// The layout of `unit` over `shards` ranks.
    pub fn new(config: &ModelConfig, unit: Unit, shards: usize) -> Self {
        let mut specs = unit.params(config);
        specs.sort_by_key(|spec| (!spec.master_precision, !spec.decays())); // stable
        let mut offsets = vec![0];
        for spec in &specs {
            offsets.push(offsets[offsets.len() - 1] + spec.len());
        }
        let wide = specs.iter().filter(|spec| spec.master_precision).count();
        let mut sections = vec![];
        let mut at = 0;
        for (params, wide) in [(0..wide, true), (wide..specs.len(), false)] {
            if params.is_empty() {
                continue;
            }
            let flat = offsets[params.start]..offsets[params.end];
            let len = match shards {
                1 => flat.len(),
                _ => flat.len().div_ceil(shards).next_multiple_of(ALIGNED),
            };
            let part = at..at + len;
            at = part.end;
            sections.push(Section {
                params,
                flat,
                part,
                wide,
            });
        }
        Self {
            specs,
            offsets,
            sections,
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

    /// Ranks that a buffer is spread over.
    pub fn shards(&self) -> usize {
        self.shards
    }

    /// Elements of one rank's shard, padding included.
    pub fn shard_len(&self) -> usize {
        self.sections.last().map_or(0, |section| section.part.end)
    }

    /// Where parameter `i` lies among all of them laid end to end.
    pub fn range(&self, i: usize) -> Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }

    /// How many elements at the front of a shard the model needs in master precision.
    pub fn wide_len(&self) -> usize {
        let wide = self.sections.iter().take_while(|section| section.wide);
        wide.last().map_or(0, |section| section.part.end)
    }

    pub(crate) fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// What is gathered from every shard where the model computes in `compute`: elements and their
    /// precision.
    pub fn gathers(&self, compute: DType) -> impl Iterator<Item = (usize, DType)> {
        let sections = self.sections.iter();
        sections.map(move |section| (section.part.len(), section.precision(compute)))
    }

    /// What rank `rank`'s shard holds, in the shard's order, without the padding.
    pub fn pieces(&self, rank: usize) -> Vec<Piece> {
        let mut pieces = vec![];
        for section in &self.sections {
            let begin = section.flat.start + rank * section.part.len();
            let end = (begin + section.part.len()).min(section.flat.end);
            for param in section.params.clone() {
                let own = self.range(param);
                let (from, to) = (begin.max(own.start), end.min(own.end));
                if from < to {
                    pieces.push(Piece {
                        param,
                        elements: from - own.start..to - own.start,
                        at: section.part.start + from - begin,
                    });
                }
            }
        }
        pieces
    }

    /// The part of rank `rank`'s shard that decays, in shard coordinates.
    pub fn decayed(&self, rank: usize) -> Range<usize> {
        let pieces = self.pieces(rank).into_iter();
        let mut decaying = pieces.filter(|piece| self.specs[piece.param].decays());
        0..decaying.next_back().map_or(0, |piece| piece.end())
    }

    /// Rank `rank`'s shard cut into stretches of one learning rate: `scale` of each parameter's
    /// name, neighbours of equal scale joined. Padding belongs to what lies before it.
    pub fn stretches(&self, rank: usize, scale: impl Fn(&str) -> f64) -> Vec<(Range<usize>, f64)> {
        let mut stretches: Vec<(Range<usize>, f64)> = vec![];
        for piece in self.pieces(rank) {
            let scale = scale(&self.specs[piece.param].name);
            match stretches.last_mut() {
                Some((range, last)) if *last == scale => range.end = piece.end(),
                Some((range, _)) => {
                    range.end = piece.at;
                    stretches.push((piece.at..piece.end(), scale));
                }
                None => stretches.push((0..piece.end(), scale)),
            }
        }
        match stretches.last_mut() {
            Some((range, _)) => range.end = self.shard_len(),
            None => stretches.push((0..self.shard_len(), 1.0)),
        }
        stretches
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
        let mut shard = vec![0.0; self.shard_len()];
        for piece in self.pieces(rank) {
            let place = piece.at..piece.end();
            read(&self.specs[piece.param], piece.elements, &mut shard[place])?;
        }
        Ok(shard)
    }

    /// All parameters laid end to end, from the shards of all ranks laid end to end.
    pub fn whole<T: Copy>(&self, shards: &[T]) -> Vec<T> {
        let section = |section: &Section| {
            let each = shards.chunks(self.shard_len().max(1));
            let parts = each.flat_map(|shard| &shard[section.part.clone()]);
            parts.copied().take(section.flat.len()).collect::<Vec<T>>()
        };
        self.sections.iter().flat_map(section).collect()
    }
}

impl Section {
    /// In which the model computes with them.
    pub fn precision(&self, compute: DType) -> DType {
        match self.wide {
            true => DType::F32,
            false => compute,
        }
    }

    /// Elements that pad the parts of all ranks.
    pub fn padding(&self, shards: usize) -> usize {
        self.part.len() * shards - self.flat.len()
    }

    /// Where parameter `i` of `layout`, which must be one of these, lies in the section.
    pub fn range(&self, layout: &FlatLayout, i: usize) -> Range<usize> {
        let Range { start, end } = layout.range(i);
        start - self.flat.start..end - self.flat.start
    }
}

impl Piece {
    /// Where it ends in the shard.
    pub fn end(&self) -> usize {
        self.at + self.elements.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ttt_model::ModelType;
    use ttt_model::hf::config_from_json;

    fn config(inner: usize) -> ModelConfig {
        let json = serde_json::json!({
            "model_type": "qwen3", "vocab_size": 7, "hidden_size": 6, "intermediate_size": inner,
            "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
            "head_dim": 2, "tie_word_embeddings": false,
        });
        let mut config = config_from_json(&json).expect("a model");
        assert_eq!(config.model_type, ModelType::Qwen3);
        config.ttt.enabled = true;
        config.ttt.layers = Some(vec![1]);
        config
    }

    proptest! {
        /// Shards of any number hold every element once, at its place.
        #[test]
        fn shards_are_all_of_the_parameters(inner in 1usize..9, shards in 1usize..9) {
            let config = config(inner);
            for unit in Unit::all(&config) {
                let layout = FlatLayout::new(&config, unit, shards);
                // Every element is its place among all, from 1: padding is 0.
                let all = (0..shards).flat_map(|rank| {
                    let read = |spec: &ParamSpec, elements: Range<usize>, out: &mut [f32]| {
                        let i = layout.specs.iter().position(|s| s.name == spec.name);
                        let begin = 1 + layout.range(i.expect("a parameter")).start;
                        for (value, element) in out.iter_mut().zip(elements) {
                            *value = (begin + element) as f32;
                        }
                        Ok::<_, std::convert::Infallible>(())
                    };
                    layout.read_shard(rank, read).expect("infallible")
                });
                let all: Vec<f32> = all.collect();
                prop_assert_eq!(all.len(), shards * layout.shard_len());
                let expected: Vec<f32> = (1..=layout.len()).map(|i| i as f32).collect();
                prop_assert_eq!(layout.whole(&all), expected);

                // What decays is what the stretches of matrices say, but for padding.
                for rank in 0..shards {
                    let decayed = layout.decayed(rank);
                    for piece in layout.pieces(rank) {
                        let decays = layout.specs[piece.param].decays();
                        prop_assert_eq!(decays, piece.end() <= decayed.end);
                        prop_assert_eq!(decays, piece.at < decayed.end);
                    }
                    let stretches = layout.stretches(rank, |name| name.len() as f64);
                    let mut end = 0;
                    for (range, _) in &stretches {
                        prop_assert_eq!(range.start, end);
                        end = range.end;
                    }
                    prop_assert_eq!(end, layout.shard_len());
                    for piece in layout.pieces(rank) {
                        let scale = layout.specs[piece.param].name.len() as f64;
                        let of = stretches.iter().find(|(range, _)| range.contains(&piece.at));
                        let (range, found) = of.expect("all of the shard");
                        prop_assert_eq!(*found, scale);
                        prop_assert!(piece.end() <= range.end);
                    }
                }
            }
        }
    }

    /// W0 of a learning layer is apart, so that its shards are equal.
    #[test]
    fn what_needs_master_precision_comes_first() {
        let config = config(4);
        let layout = FlatLayout::new(&config, Unit::Block(1), 2);
        assert!(layout.specs[0].name.ends_with("mlp.down_proj.weight"));
        let gathers: Vec<_> = layout.gathers(DType::BF16).collect();
        assert_eq!(gathers[0], (ALIGNED, DType::F32));
        assert_eq!(gathers[1].1, DType::BF16);
        assert_eq!(layout.wide_len(), ALIGNED);
        let plain = FlatLayout::new(&config, Unit::Block(0), 2);
        assert_eq!(plain.wide_len(), 0);
        assert_eq!(plain.gathers(DType::BF16).count(), 1);
    }
}
