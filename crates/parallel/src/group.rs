//! A group of ranks and what they can do together.

use std::fmt::Debug;

use burn::tensor::Tensor;

/// A collective operation that did not complete.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// A rank left the group or the transport failed.
    #[error("rank {rank} of {size}: {operation} failed: {reason}")]
    Failed {
        /// The rank that noticed.
        rank: usize,
        /// Ranks in the group.
        size: usize,
        /// Which collective.
        operation: &'static str,
        /// What the transport said.
        reason: String,
    },
}

/// Ranks that run the same collectives in the same order.
///
/// Every rank of the group calls each method with tensors of the same length and precision.
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
    /// If a rank is lost.
    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError>;

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// If a rank is lost.
    fn barrier(&self) -> Result<(), CommError>;
}

/// The group of one rank, in which every exchange is the identity.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleRank;

impl ProcessGroup for SingleRank {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        Ok(tensor)
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        Ok(shard)
    }

    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        Ok(tensor)
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }
}
