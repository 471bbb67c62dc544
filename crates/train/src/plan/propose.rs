//! Which layout so many GPUs should have.
//!
//! Every layout, both activation modes and every number of rows at once are planned; of those that
//! fit, the one with the shortest estimated step is taken, and of those that are about as fast the one
//! that spreads the least.

use std::fmt;

use ttt_parallel::Layout;

use super::Plan;
use super::proposal::{PlanError, Proposal};
use super::speed::seconds;
use crate::config::{Activations, Config, ConfigError, DeviceKind};
use crate::context;
use crate::human::gib;

/// Steps that differ by less than this factor are taken for equally fast.
const ALIKE: f64 = 1.03;

/// What a GPU's memory holds beside what is planned: the driver, libraries, and an allocator's slack.
const RESERVED_BYTES: f64 = 1.5 * (1u64 << 30) as f64;
const RESERVED_SHARE: f64 = 0.03;

/// What there is to train on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpus {
    /// How many.
    pub count: usize,
    /// Memory of one.
    pub memory_bytes: f64,
}

impl Gpus {
    /// What of a GPU's memory the plan may take.
    pub(super) fn usable_bytes(&self) -> f64 {
        self.memory_bytes * (1.0 - RESERVED_SHARE) - RESERVED_BYTES
    }
}

/// One way to lay out a run.
#[derive(Clone)]
struct Candidate {
    config: Config,
    layout: Layout,
    plan: Plan,
    step_s: f64,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Layout {
            replicate,
            shard,
            context,
            shard_over_context,
        } = self.layout;
        let over = match shard_over_context {
            true => " (shard_over_context)",
            false => "",
        };
        let train = &self.config.train;
        let activations = match train.activations {
            Activations::Keep => "keep",
            Activations::Recompute => "recompute",
        };
        let rows = train.micro_batch_rows;
        write!(
            f,
            "replicate {replicate}, shard {shard}, context {context}{over} with activations = \
             \"{activations}\" and micro_batch_rows = {rows}"
        )
    }
}

/// The layout for `gpus`. `given`: take this one, with the configuration's own settings.
///
/// # Errors
/// If it, or none, divides the rows and fits.
pub fn propose(config: &Config, gpus: Gpus, given: Option<Layout>) -> Result<Proposal, PlanError> {
    if config.run.device == DeviceKind::Cpu {
        let problem = "is \"cpu\", and GPUs were asked for: add --set run.device=cuda";
        return Err(ConfigError::invalid("run.device", problem).into());
    }
    let search = Search { config, gpus };
    match given {
        Some(layout) => search.as_given(layout),
        None => search.best(),
    }
}

struct Search<'a> {
    config: &'a Config,
    gpus: Gpus,
}

impl Search<'_> {
    fn as_given(&self, layout: Layout) -> Result<Proposal, PlanError> {
        if layout.ranks() != self.gpus.count {
            return Err(ConfigError::invalid(
                "parallel",
                format!(
                    "replicate {} x shard {} x context {} are {} ranks, --gpus says {}: make them equal, or \
                     leave [parallel] out for a proposal",
                    layout.replicate,
                    layout.shard,
                    layout.context,
                    layout.ranks(),
                    self.gpus.count
                ),
            )
            .into());
        }
        let train = &self.config.train;
        let candidate = self
            .candidate(layout, train.activations, train.micro_batch_rows)
            .map_err(|why| self.divides_nothing(self.gpus.count, why))?;
        match self.fits(&candidate) {
            true => Ok(self.proposal(candidate, vec!["the layout of [parallel]".into()])),
            false => Err(self.fits_nothing(candidate)),
        }
    }

    fn best(&self) -> Result<Proposal, PlanError> {
        let all = self.all(self.gpus.count)?;
        let fitting = || all.iter().filter(|candidate| self.fits(candidate));
        let fastest = fitting().map(|candidate| candidate.step_s).reduce(f64::min);
        let chosen = fitting()
            .filter(|candidate| fastest.is_some_and(|least| candidate.step_s <= least * ALIKE))
            .min_by(|a, b| {
                let simple = |c: &Candidate| {
                    let over = c.layout.shard_over_context;
                    (c.layout.shard, c.layout.context, over)
                };
                simple(a)
                    .cmp(&simple(b))
                    .then(a.step_s.total_cmp(&b.step_s))
            });
        match chosen {
            Some(chosen) => {
                let reasons = self.reasons(chosen);
                Ok(self.proposal(chosen.clone(), reasons))
            }
            None => Err(self.fits_nothing(smallest(all))),
        }
    }

    fn proposal(&self, candidate: Candidate, reasons: Vec<String>) -> Proposal {
        Proposal {
            config: candidate.config,
            plan: candidate.plan,
            step_s: candidate.step_s,
            reasons,
            gpus: self.gpus,
        }
    }

    fn fits(&self, candidate: &Candidate) -> bool {
        candidate.plan.memory.total_bytes() <= self.gpus.usable_bytes()
    }

    /// Everything that `gpus` GPUs can do.
    fn all(&self, gpus: usize) -> Result<Vec<Candidate>, PlanError> {
        let mut all = vec![];
        let mut refused = String::new();
        for shard in divisors(gpus) {
            for context in divisors(gpus / shard) {
                let layout = Layout {
                    replicate: gpus / shard / context,
                    shard,
                    context,
                    shard_over_context: false,
                };
                let rows = self.config.train.batch_rows() / (layout.replicate * shard);
                for micro_rows in divisors(rows) {
                    for activations in [Activations::Keep, Activations::Recompute] {
                        for shard_over_context in [false, true] {
                            if shard_over_context && context == 1 {
                                continue;
                            }
                            let layout = Layout {
                                shard_over_context,
                                ..layout
                            };
                            match self.candidate(layout, activations, micro_rows) {
                                Ok(candidate) => all.push(candidate),
                                Err(why) => refused = why,
                            }
                        }
                    }
                }
                if rows == 0 {
                    refused = format!(
                        "replicate {} x shard {shard} needs a row for each",
                        layout.replicate
                    );
                }
            }
        }
        match all.is_empty() {
            true => Err(self.divides_nothing(gpus, refused)),
            false => Ok(all),
        }
    }

    /// One of them, or why it is none.
    fn candidate(
        &self,
        layout: Layout,
        activations: Activations,
        micro_batch_rows: usize,
    ) -> Result<Candidate, String> {
        let mut config = self.config.clone();
        config.parallel.replicate = Some(layout.replicate);
        config.parallel.shard = layout.shard;
        config.parallel.context = layout.context;
        config.parallel.shard_over_context = layout.shard_over_context;
        config.train.activations = activations;
        config.train.micro_batch_rows = micro_batch_rows;
        let (rows, length) = (config.train.batch_rows(), config.train.sequence_length);
        let readers = layout.replicate * layout.shard;
        if !rows.is_multiple_of(readers) {
            return Err(format!(
                "replicate {} x shard {} do not divide them",
                layout.replicate, layout.shard
            ));
        }
        if !(rows / readers).is_multiple_of(micro_batch_rows) {
            return Err(format!(
                "the {} rows of a rank are no multiple of train.micro_batch_rows, {micro_batch_rows}",
                rows / readers
            ));
        }
        let settings = config.parallel.context_settings();
        context::validate(&config.model, length, layout.context, &settings)
            .map_err(|error| error.to_string())?;
        let plan = Plan::on(&config, layout);
        let step_s = seconds(&config, &plan);
        Ok(Candidate {
            config,
            layout,
            plan,
            step_s,
        })
    }

    /// Why not less of each thing that costs something.
    fn reasons(&self, chosen: &Candidate) -> Vec<String> {
        let Layout {
            shard,
            context,
            shard_over_context: over,
            ..
        } = chosen.layout;
        let train = &chosen.config.train;
        let (activations, rows) = (train.activations, train.micro_batch_rows);
        let count = self.gpus.count;
        let layout = |shard: usize, context: usize| Layout {
            replicate: count / shard / context,
            shard,
            context,
            shard_over_context: over && context > 1,
        };
        let mut others = vec![];
        if shard > 1 {
            let less = divisors(shard).rev().nth(1).unwrap_or(1);
            others.push((
                format!("shard {less}"),
                layout(less, context),
                activations,
                rows,
            ));
        }
        if context > 1 {
            let less = divisors(context).rev().nth(1).unwrap_or(1);
            others.push((
                format!("context {less}"),
                layout(shard, less),
                activations,
                rows,
            ));
        }
        if over {
            let whole = Layout {
                shard_over_context: false,
                ..chosen.layout
            };
            let what = "shard_over_context = false".to_string();
            others.push((what, whole, activations, rows));
        }
        if activations == Activations::Recompute {
            let keep = Activations::Keep;
            others.push(("activations = \"keep\"".into(), chosen.layout, keep, rows));
        }
        let more = 2 * rows;
        others.push((
            format!("micro_batch_rows = {more}"),
            chosen.layout,
            activations,
            more,
        ));
        let mut reasons = vec![];
        for (what, layout, activations, rows) in others {
            reasons.push(match self.candidate(layout, activations, rows) {
                Err(why) => format!("{what} is not possible: {why}"),
                Ok(other) if !self.fits(&other) => format!(
                    "{what} would need {:.1} GiB, {:.1} are usable",
                    gib(other.plan.memory.total_bytes()),
                    gib(self.gpus.usable_bytes())
                ),
                Ok(other) => format!(
                    "{what} is estimated at {:.3} s per step, the proposal at {:.3} s",
                    other.step_s, chosen.step_s
                ),
            });
        }
        reasons
    }

    fn divides_nothing(&self, gpus: usize, why: String) -> PlanError {
        let model = &self.config.model;
        PlanError::Rows {
            gpus,
            rows: self.config.train.batch_rows(),
            length: self.config.train.sequence_length,
            chunks: match model.ttt_layers().is_empty() {
                true => String::new(),
                false => format!(" in chunks of {}", model.ttt.chunk),
            },
            why,
        }
    }

    fn fits_nothing(&self, least: Candidate) -> PlanError {
        // More of the same GPUs: doubling as far as anybody has them.
        let counts = (1..=7).map(|k| self.gpus.count << k);
        let enough = counts
            .filter_map(|count| Some((count, smallest(self.all(count).ok()?))))
            .find(|(_, candidate)| self.fits(candidate));
        let needed = least.plan.memory.total_bytes();
        let memory = (needed + RESERVED_BYTES) / (1.0 - RESERVED_SHARE);
        let larger = format!("GPUs of {:.0} GiB would do", gib(memory).ceil());
        let shorter = "or shorter rows (train.sequence_length)";
        PlanError::Memory {
            gpus: self.gpus.count,
            memory_bytes: self.gpus.memory_bytes,
            usable_bytes: self.gpus.usable_bytes(),
            needed_bytes: needed,
            least: least.to_string(),
            more: match enough {
                Some((count, candidate)) => {
                    format!("{count} of these GPUs would do ({candidate}), {larger}, {shorter}")
                }
                None => format!("{larger}, {shorter}"),
            },
        }
    }
}

fn smallest(all: Vec<Candidate>) -> Candidate {
    let bytes = |candidate: &Candidate| candidate.plan.memory.total_bytes();
    let least = all.into_iter().min_by(|a, b| bytes(a).total_cmp(&bytes(b)));
    least.expect("there are candidates")
}

fn divisors(n: usize) -> impl DoubleEndedIterator<Item = usize> {
    let all: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
    all.into_iter()
}
