//! Ranks that hold one part of every row each.
//!
//! Rank r of P has tokens r N/P .. (r + 1) N/P. Most operations know no neighbours; attention fetches the
//! keys that its queries see ([`crate::ops::attention`]), and In-Place TTT the fast weights that were
//! learned on the ranks before it ([`crate::ops::ttt`]).

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use ttt_parallel::{CommError, ProcessGroup, ledger};

/// What TTT layers send, in a [`ttt_parallel::ledger`].
pub const STATES: &str = "fast weights, and their gradients";
/// What attention sends.
pub const ATTENTION: &str = "keys, values or heads of attention";

/// How fast weights travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateExchange {
    /// The chain between two ranks, which is one message; between more, all-to-all.
    #[default]
    Auto,
    /// Every rank receives one slice of all ranks' sums, adds up what each rank needs of it, and sends
    /// that back: 2 (P − 1)/P states per rank, whatever P is.
    AllToAll,
    /// From rank to rank, each adding its own: one state per rank and hop, P − 1 hops in a row.
    Chain,
    /// Every rank receives the sums of all: P − 1 states, held at once.
    AllGather,
}

impl StateExchange {
    /// How they travel among `ranks` ranks: never [`StateExchange::Auto`]. Measured with
    /// `ttt doctor --ranks --context` (docs/log.md).
    pub fn among(self, ranks: usize) -> Self {
        match self {
            Self::Auto if ranks <= 2 => Self::Chain,
            Self::Auto => Self::AllToAll,
            chosen => chosen,
        }
    }
}

/// The precision in which fast weights travel. They are summed in f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Payload {
    /// As they are summed.
    #[default]
    F32,
    /// Half of the bytes, rounded to 8 bits of mantissa.
    Bf16,
}

/// What travels for attention without a window. With a window the keys do: only its own length of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionExchange {
    /// The heads if they divide among the ranks, else the keys.
    #[default]
    Auto,
    /// Every rank fetches all earlier keys and values; the last rank has the most to do.
    Keys,
    /// Every rank gets some heads of all tokens and does the same work; its key-value heads must divide
    /// among the ranks.
    Heads,
}

/// How the ranks of a context group exchange what they need of each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextSettings {
    /// How fast weights travel.
    pub states: StateExchange,
    /// In which precision.
    pub payload: Payload,
    /// What travels for attention without a window.
    pub attention: AttentionExchange,
}

/// The group of ranks that share rows, as the operations use it.
///
/// An operation of a graph cannot return an error. The first one is kept here, the operations go on with
/// zeros, and whoever runs them asks [`Context::check`] before using what they returned.
#[derive(Clone, Debug)]
pub struct Context {
    group: Arc<dyn ProcessGroup>,
    /// How things are exchanged.
    pub settings: ContextSettings,
    failure: Arc<Mutex<Failure>>,
    #[cfg(test)]
    fault: Option<Fault>,
}

#[derive(Debug, Default)]
struct Failure {
    happened: bool,
    error: Option<CommError>,
}

/// What a test does wrong on purpose, to see that it would be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Fast weights cross document starts.
    NoReset,
    /// A rank's own update is in the state it begins with.
    InclusiveScan,
    /// Later ranks' gradients are in the gradient of W0.
    SuffixInWeightGradient,
    /// The gradients of fetched keys and values do not return.
    KeyGradientDropped,
    /// Fetched keys are taken for keys of the documents of this rank.
    KeysWithoutDocuments,
    /// The sums that first queries keep are those of this rank's own keys.
    SumsOfOwnKeys,
}

impl Context {
    /// The ranks of `group`, each with its part of every row.
    pub fn new(group: Arc<dyn ProcessGroup>, settings: ContextSettings) -> Self {
        Self {
            group,
            settings,
            failure: Arc::default(),
            #[cfg(test)]
            fault: None,
        }
    }

    /// The same with a mistake in it.
    #[cfg(test)]
    pub(crate) fn with_fault(self, fault: Option<Fault>) -> Self {
        Self { fault, ..self }
    }

    /// This rank's place: which part of a row it has.
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// Ranks that share a row.
    pub fn size(&self) -> usize {
        self.group.size()
    }

    /// What went wrong since the last call.
    ///
    /// # Errors
    /// The first failure of an exchange; what the operations returned since then is not to be used.
    pub fn check(&self) -> Result<(), CommError> {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.error.take().map_or(Ok(()), Err)
    }

    /// Runs an exchange of `what`; `None` if it failed, or one before it did: a lost rank is not asked twice.
    pub(crate) fn exchange<T>(
        &self,
        what: &'static str,
        run: impl FnOnce(&dyn ProcessGroup) -> Result<T, CommError>,
    ) -> Option<T> {
        let lock = || self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if lock().happened {
            return None;
        }
        let _what = ledger::sending(what);
        match run(&*self.group) {
            Ok(done) => Some(done),
            Err(error) => {
                let mut failure = lock();
                failure.happened = true;
                failure.error.get_or_insert(error);
                None
            }
        }
    }

    /// Whether a test asked for `fault`.
    pub(crate) fn planted(&self, fault: Fault) -> bool {
        #[cfg(test)]
        return self.fault == Some(fault);
        #[cfg(not(test))]
        {
            let _ = fault;
            false
        }
    }
}
