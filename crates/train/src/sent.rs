//! What a rank really sent in a step, beside what the plan says.

use std::collections::BTreeMap;
use std::fmt;

use ttt_model::Unit;
use ttt_parallel::ledger::{self, Entry, Ledger, Said};
use ttt_parallel::{Layout, Mesh};

use crate::config::Config;
use crate::human::grouped;
use crate::plan::{Traffic, TrafficItem};

/// The parameters of a unit that is spread over ranks.
pub const PARAMETERS: &str = "parameters, all-gather";
/// The gradient of such a unit.
pub const GRADIENTS: &str = "gradients, reduce-scatter";
/// Gradients of ranks that hold the same.
pub const SUMS: &str = "gradients, all-reduce";
/// For the metrics of TTT layers.
pub const NORMS: &str = "norms of fast weights";
/// For the loss of all.
pub const LOSS: &str = "loss and labelled tokens";
/// For clipping.
pub const GRADIENT_NORM: &str = "norm of the gradient";

/// A unit's number in a ledger.
fn number(unit: Unit) -> usize {
    match unit {
        Unit::Embedding => 0,
        Unit::Block(layer) => layer + 1,
        Unit::Head => usize::MAX,
    }
}

/// Until the result is dropped, this thread's exchanges are those of `unit`.
pub fn for_unit(unit: Unit) -> Said {
    ledger::part(number(unit))
}

/// `what` of `unit` is exchanged by `run`.
pub fn of_unit<T>(unit: Unit, what: &'static str, run: impl FnOnce() -> T) -> T {
    let _unit = for_unit(unit);
    of(what, run)
}

/// `what` is exchanged by `run`.
pub fn of<T>(what: &'static str, run: impl FnOnce() -> T) -> T {
    let _what = ledger::sending(what);
    run()
}

/// The mesh with all of its exchanges counted.
pub fn counted(mesh: Mesh) -> (Mesh, Ledger) {
    let ledger = Ledger::default();
    let counted = Mesh {
        world: ledger.watch(&mesh.world),
        replicate: ledger.watch(&mesh.replicate),
        shard: ledger.watch(&mesh.shard),
        context: ledger.watch(&mesh.context),
        replicas: ledger.watch(&mesh.replicas),
        ..mesh
    };
    (counted, ledger)
}

/// Bytes that one rank sent in a step, counted and planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    items: Vec<Item>,
}

/// One thing that travels.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Item {
    name: &'static str,
    counted: u64,
    planned: u64,
    /// Units, and what was counted and planned for each.
    units: Vec<(Vec<usize>, u64, u64)>,
}

impl Comparison {
    /// Of what rank `rank` of its context group sent.
    pub fn new(sent: &BTreeMap<Entry, u64>, config: &Config, layout: Layout, rank: usize) -> Self {
        let planned = Traffic::of(config, layout, rank).items;
        let mut names: Vec<&'static str> = planned.iter().map(|item| item.name).collect();
        for entry in sent.keys().filter(|entry| sent[entry] > 0) {
            if !names.contains(&entry.what) {
                names.push(entry.what);
            }
        }
        let item = |name| {
            let planned = planned.iter().find(|item| item.name == name);
            Item::new(name, sent, planned)
        };
        Self {
            items: names.into_iter().map(item).collect(),
        }
    }

    /// Whether every unit sent what was planned for it.
    pub fn is_equal(&self) -> bool {
        let equal = |counted: u64, planned: u64| counted == planned;
        self.items.iter().all(|item| {
            let mut units = item.units.iter();
            equal(item.counted, item.planned) && units.all(|&(_, a, b)| equal(a, b))
        })
    }

    /// Bytes that were counted.
    pub fn counted(&self) -> u64 {
        self.items.iter().map(|item| item.counted).sum()
    }
}

impl Item {
    fn new(name: &'static str, sent: &BTreeMap<Entry, u64>, planned: Option<&TrafficItem>) -> Self {
        // By unit, counted and planned.
        let mut of_units: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        let entries = sent.iter().filter(|(entry, _)| entry.what == name);
        let mut counted = 0;
        for (entry, bytes) in entries {
            counted += bytes;
            if let Some(unit) = entry.part {
                of_units.entry(unit).or_default().0 += bytes;
            }
        }
        for (unit, bytes) in planned.iter().flat_map(|item| &item.units) {
            of_units.entry(number(*unit)).or_default().1 += bytes;
        }
        let mut units: Vec<(Vec<usize>, u64, u64)> = vec![];
        for (unit, (counted, planned)) in of_units {
            if (counted, planned) == (0, 0) {
                continue;
            }
            let same = |of: &&mut (Vec<usize>, u64, u64)| (of.1, of.2) == (counted, planned);
            match units.iter_mut().find(same) {
                Some((units, ..)) => units.push(unit),
                None => units.push((vec![unit], counted, planned)),
            }
        }
        Self {
            name,
            counted,
            planned: planned.map_or(0, |item| item.bytes),
            units,
        }
    }
}

/// Such as "embedding, blocks 0-5 7, head".
fn names(units: &[usize]) -> String {
    let mut parts = vec![];
    let blocks: Vec<usize> = units
        .iter()
        .filter(|&&unit| unit != number(Unit::Embedding) && unit != number(Unit::Head))
        .map(|unit| unit - 1)
        .collect();
    if units.contains(&number(Unit::Embedding)) {
        parts.push("embedding".to_string());
    }
    let ranges = blocks
        .chunk_by(|a, b| a + 1 == *b)
        .map(|range| match range {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        });
    match blocks.len() {
        0 => {}
        1 => parts.push(format!("block {}", blocks[0])),
        _ => parts.push(format!("blocks {}", ranges.collect::<Vec<_>>().join(" "))),
    }
    if units.contains(&number(Unit::Head)) {
        parts.push("head".to_string());
    }
    parts.join(", ")
}

/// Width of the names, and of the numbers.
const NAME: usize = 46;
const NUMBER: usize = 18;

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, counted: &str, planned: &str| {
            write!(f, "\n  {name:<NAME$}{counted:>NUMBER$}{planned:>NUMBER$}")
        };
        row("", "sent", "planned")?;
        for item in &self.items {
            let name = match item.name {
                "" => "others",
                name => name,
            };
            row(name, &grouped(item.counted), &grouped(item.planned))?;
            for (units, counted, planned) in &item.units {
                let name = match units.len() {
                    1 => format!("  {}", names(units)),
                    _ => format!("  {}, each", names(units)),
                };
                row(&name, &grouped(*counted), &grouped(*planned))?;
            }
        }
        let planned: u64 = self.items.iter().map(|item| item.planned).sum();
        row("total", &grouped(self.counted()), &grouped(planned))
    }
}
