//! Which layout so many GPUs should have.
//!
//! Every layout, both activation modes and every number of rows at once are planned; of those that
//! fit, the one with the shortest estimated step is taken, and of those that are about as fast the one
//! that spreads the least. The estimate only ranks: its constants are round numbers of the machines
//! that one trains on, and are told with the choice.

use std::fmt;

use ttt_kernels::ContextSettings;
use ttt_parallel::Layout;

use super::{Among, Plan};
use crate::config::{Activations, Config, ConfigError, DeviceKind};
use crate::context;
use crate::human::gib;

/// Matrix products that a GPU computes in a second, as models reach it.
const FLOPS_PER_S: f64 = 450e12;

/// Bytes that a GPU sends in a second to another of its host, and of another host.
const WITHIN_HOST: f64 = 200e9;
const BETWEEN_HOSTS: f64 = 25e9;

/// GPUs of a host.
const HOST: usize = 8;

/// How long an exchange takes that moves nothing, where nothing hides it.
const LATENCY_S: f64 = 20e-6;

/// Tokens at once with which products reach half of their speed.
const HALF_SPEED_TOKENS: f64 = 512.0;

/// Share of a pass behind which the exchanges of parameters hide.
const OVERLAP: f64 = 0.8;

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
    fn usable_bytes(&self) -> f64 {
        self.memory_bytes * (1.0 - RESERVED_SHARE) - RESERVED_BYTES
    }
}

/// A layout that fits, and why it was taken.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// The configuration with what the proposal sets.
    pub config: Config,
    /// Its plan.
    pub plan: Plan,
    /// Estimated seconds of a step; they rank layouts and promise nothing.
    pub step_s: f64,
    /// What else was looked at, in sentences.
    pub reasons: Vec<String>,
    /// The GPUs it was made for.
    pub gpus: Gpus,
}

/// Why there is no layout.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A setting of the configuration stands against it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No layout divides the rows, or the row, among the GPUs.
    #[error(
        "no layout of {gpus} GPUs divides a step of {rows} rows (train.batch_tokens / train.sequence_length) \
         of {length} tokens{chunks}: {why}; change train.batch_tokens, or take a number of GPUs that divides the rows"
    )]
    Rows {
        /// GPUs.
        gpus: usize,
        /// Rows of a step.
        rows: usize,
        /// Tokens of a row.
        length: usize,
        /// The chunk, where there are TTT layers.
        chunks: String,
        /// What the last layout that was tried lacks.
        why: String,
    },
    /// None fits.
    #[error(
        "no layout of {gpus} GPUs fits into {:.1} GiB each ({:.1} of them usable): {least} needs the least, {:.1} GiB; {more}",
        gib(*memory_bytes), gib(*usable_bytes), gib(*needed_bytes)
    )]
    Memory {
        /// GPUs.
        gpus: usize,
        /// Memory of one.
        memory_bytes: f64,
        /// What the plan may take of it.
        usable_bytes: f64,
        /// What the smallest layout takes.
        needed_bytes: f64,
        /// That layout.
        least: String,
        /// What would do.
        more: String,
    },
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
        } = self.layout;
        let train = &self.config.train;
        let activations = match train.activations {
            Activations::Keep => "keep",
            Activations::Recompute => "recompute",
        };
        let rows = train.micro_batch_rows;
        write!(
            f,
            "replicate {replicate}, shard {shard}, context {context} with activations = \
             \"{activations}\" and micro_batch_rows = {rows}"
        )
    }
}

/// The layout for `gpus`. `given`: take this one, with the configuration's own settings.
///
/// # Errors
/// If it, or none, divides the rows and fits.
pub fn propose(
    config: &Config,
    gpus: Gpus,
    given: Option<Layout>,
    context: &ContextSettings,
) -> Result<Proposal, PlanError> {
    if config.run.device == DeviceKind::Cpu {
        let problem = "is \"cpu\", and GPUs were asked for: add --set run.device=cuda";
        return Err(ConfigError::invalid("run.device", problem).into());
    }
    let search = Search {
        config,
        gpus,
        context,
    };
    match given {
        Some(layout) => search.as_given(layout),
        None => search.best(),
    }
}

struct Search<'a> {
    config: &'a Config,
    gpus: Gpus,
    context: &'a ContextSettings,
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
                let simple = |c: &Candidate| (c.layout.shard, c.layout.context);
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
                };
                let rows = self.config.train.batch_rows() / (layout.replicate * shard);
                for micro_rows in divisors(rows) {
                    for activations in [Activations::Keep, Activations::Recompute] {
                        match self.candidate(layout, activations, micro_rows) {
                            Ok(candidate) => all.push(candidate),
                            Err(why) => refused = why,
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
        context::validate(&config.model, length, layout.context, self.context)
            .map_err(|error| error.to_string())?;
        let plan = Plan::on(&config, layout, self.context);
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
        let Layout { shard, context, .. } = chosen.layout;
        let train = &chosen.config.train;
        let (activations, rows) = (train.activations, train.micro_batch_rows);
        let count = self.gpus.count;
        let layout = |shard: usize, context: usize| Layout {
            replicate: count / shard / context,
            shard,
            context,
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

/// Estimated seconds of a step.
fn seconds(config: &Config, plan: &Plan) -> f64 {
    let layout = plan.layout;
    let train = &config.train;
    let again = match train.activations {
        Activations::Keep => 1.0,
        Activations::Recompute => 4.0 / 3.0,
    };
    let at_once = (train.micro_batch_rows * train.sequence_length / layout.context) as f64;
    let speed = FLOPS_PER_S * at_once / (at_once + HALF_SPEED_TOKENS);
    let flops = plan.flops.training_with_ttt() * plan.tokens_per_step as f64;
    let compute = again * flops / layout.ranks() as f64 / speed;
    // A group lies on one host if all between its first and last rank do.
    let per_s = |span: usize| match span <= HOST {
        true => WITHIN_HOST,
        false => BETWEEN_HOSTS,
    };
    let time = |among: Among, span: usize| plan.traffic.bytes_among(among) as f64 / per_s(span);
    let shard = time(Among::Shard, layout.shard * layout.context);
    let exposed = (shard - OVERLAP * compute).max(0.0);
    let context = time(Among::Context, layout.context);
    let replicas = time(Among::Replicas, layout.ranks());
    let exchanges: u64 = plan.traffic.items.iter().map(|item| item.exchanges).sum();
    compute + exposed + context + replicas + LATENCY_S * exchanges as f64
}

fn divisors(n: usize) -> impl DoubleEndedIterator<Item = usize> {
    let all: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
    all.into_iter()
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Layout {
            replicate,
            shard,
            context,
        } = self.plan.layout;
        let train = &self.config.train;
        let activations = match train.activations {
            Activations::Keep => "keep",
            Activations::Recompute => "recompute",
        };
        writeln!(f, "{}\n", self.plan)?;
        writeln!(
            f,
            "for {} GPUs of {:.1} GiB, {:.1} of them usable:\n",
            self.gpus.count,
            gib(self.gpus.memory_bytes),
            gib(self.gpus.usable_bytes())
        )?;
        writeln!(f, "  [parallel]")?;
        writeln!(f, "  replicate = {replicate}")?;
        writeln!(f, "  shard = {shard}")?;
        writeln!(f, "  context = {context}")?;
        writeln!(f, "  [train]")?;
        writeln!(f, "  activations = \"{activations}\"")?;
        writeln!(f, "  micro_batch_rows = {}\n", train.micro_batch_rows)?;
        writeln!(f, "why:")?;
        for reason in &self.reasons {
            writeln!(f, "  {reason}")?;
        }
        write!(
            f,
            "  layouts are ranked by an estimate from {:.0} TFLOP/s per GPU, {:.0} GB/s within a host of {HOST} \
             and {:.0} GB/s between hosts",
            FLOPS_PER_S / 1e12,
            WITHIN_HOST / 1e9,
            BETWEEN_HOSTS / 1e9
        )
    }
}
