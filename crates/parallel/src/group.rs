//! A group of ranks and what they can do together.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

/// An exchange between ranks that did not complete.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// A rank left or the transport failed.
    #[error("rank {rank} of {size}: {operation} failed: {reason}")]
    Failed {
        /// The rank that noticed, counted over the whole run.
        rank: usize,
        /// Ranks of the run.
        size: usize,
        /// Which exchange.
        operation: &'static str,
        /// What the transport said.
        reason: String,
    },
    /// An exchange that cannot be made, such as one with a rank that is not in the group.
    #[error("{operation}: {reason}")]
    Invalid {
        /// Which exchange.
        operation: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A mesh that does not fit the ranks.
    #[error("{0}")]
    Layout(String),
    /// The ranks could not find each other.
    #[error("{0}")]
    Start(String),
}

impl CommError {
    /// An exchange that cannot be made.
    pub fn invalid(operation: &'static str, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self::Invalid { operation, reason }
    }
}

/// A tensor that is to come from another rank.
#[derive(Clone, Debug)]
pub struct Receive {
    /// The rank that sends it.
    pub from: usize,
    /// Its elements.
    pub len: usize,
    /// Its precision.
    pub dtype: DType,
    /// Where it is to lie.
    pub device: Device,
}

/// An exchange under way.
#[must_use = "an exchange that nobody waits for may never end"]
pub struct Pending<T = Tensor<1>>(Box<dyn FnOnce() -> Result<T, CommError> + Send>);

impl<T: Send + 'static> Pending<T> {
    /// An exchange that `wait` brings to its end.
    pub fn new(wait: impl FnOnce() -> Result<T, CommError> + Send + 'static) -> Self {
        Self(Box::new(wait))
    }

    /// An exchange that is over.
    pub fn done(result: T) -> Self {
        Self::new(move || Ok(result))
    }

    /// The result. What is computed from it comes after the exchange; on a GPU the host goes on.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn wait(self) -> Result<T, CommError> {
        (self.0)()
    }
}

impl<T> Debug for Pending<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pending")
    }
}

/// Ranks that make the same exchanges in the same order.
///
/// Every rank of the group calls each method with tensors of the same length and precision, f32 or
/// bf16; only [`exchange`](Self::exchange) is between those that it names. Results lie on the device
/// of what was given. Nothing here is differentiable: a backward pass makes its own exchange.
///
/// Every rank gets the same bits of a sum. bf16 is summed in f32 and rounded once on the host's
/// transports; NCCL may round at every addition.
pub trait ProcessGroup: Debug + Send + Sync {
    /// This rank's number in the group, from 0.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// The sum over all ranks: `[n]` → `[n]`.
    ///
    /// # Errors
    /// If a rank is lost.
    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError>;

    /// The shards of all ranks in rank order: `[n]` → `[size · n]`.
    ///
    /// # Errors
    /// If a rank is lost.
    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError>;

    /// This rank's shard of the sum over all ranks: `[size · n]` → `[n]`.
    ///
    /// # Errors
    /// If a rank is lost, or the ranks do not divide the length.
    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError>;

    /// Part i goes to rank i, part j of the result came from rank j: `[size · n]` → `[size · n]`.
    ///
    /// # Errors
    /// If a rank is lost, or the ranks do not divide the length.
    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError>;

    /// Rank `root`'s tensor: `[n]` → `[n]`. Every rank gives one of that length; only the root's
    /// counts.
    ///
    /// # Errors
    /// If a rank is lost or there is no rank `root`.
    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError>;

    /// Sends tensors to ranks and receives others, all at once, so that no order of them waits for
    /// ever. Between two ranks, the first sent is the first received. Ranks that are not named need
    /// not call it. The result is in the order of `receives`.
    ///
    /// # Errors
    /// If a rank is lost, or one named is not in the group.
    fn exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError>;

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// If a rank is lost.
    fn barrier(&self) -> Result<(), CommError>;

    /// The group of the list in `parts` that holds this rank; a rank's place in the list is its
    /// number there. Every rank calls it with the same lists, of which none share a rank.
    ///
    /// # Errors
    /// If a rank is lost, or the lists are not as described.
    fn split(&self, parts: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError>;

    /// [`all_reduce_sum`](Self::all_reduce_sum), begun; other work may come before the wait.
    ///
    /// # Errors
    /// If a rank is lost.
    fn start_all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.all_reduce_sum(tensor).map(Pending::done)
    }

    /// [`all_gather`](Self::all_gather), begun.
    ///
    /// # Errors
    /// If a rank is lost.
    fn start_all_gather(&self, shard: Tensor<1>) -> Result<Pending, CommError> {
        self.all_gather(shard).map(Pending::done)
    }

    /// [`reduce_scatter_sum`](Self::reduce_scatter_sum), begun.
    ///
    /// # Errors
    /// If a rank is lost, or the ranks do not divide the length.
    fn start_reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.reduce_scatter_sum(tensor).map(Pending::done)
    }

    /// [`all_to_all`](Self::all_to_all), begun.
    ///
    /// # Errors
    /// If a rank is lost, or the ranks do not divide the length.
    fn start_all_to_all(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.all_to_all(tensor).map(Pending::done)
    }

    /// [`exchange`](Self::exchange), begun. Those that receive from the same rank are waited for in the
    /// order in which they were begun.
    ///
    /// # Errors
    /// If a rank is lost, or one named is not in the group.
    fn start_exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Pending<Vec<Tensor<1>>>, CommError> {
        self.exchange(sends, receives).map(Pending::done)
    }
}

/// The list in `parts` that holds `rank`, and its place there; refuses lists that share ranks or
/// name one that is not there.
///
/// # Errors
/// If the lists are not as [`ProcessGroup::split`] describes them.
pub fn part_of(
    parts: &[Vec<usize>],
    rank: usize,
    size: usize,
) -> Result<(&[usize], usize), CommError> {
    let invalid = |reason| CommError::invalid("split", reason);
    let mut named = vec![false; size];
    for &member in parts.iter().flatten() {
        match named.get_mut(member) {
            None => return Err(invalid(format!("there is no rank {member} among {size}"))),
            Some(true) => return Err(invalid(format!("rank {member} is named twice"))),
            Some(seen) => *seen = true,
        }
    }
    parts
        .iter()
        .find_map(|part| {
            let place = part.iter().position(|&member| member == rank)?;
            Some((part.as_slice(), place))
        })
        .ok_or_else(|| invalid(format!("no list holds rank {rank}")))
}
