//! The ranks of a run as a grid.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::group::{CommError, ProcessGroup, SingleRank};

/// A grid of `replicate` × `shard` ranks; each rank is a member of one group per direction.
#[derive(Clone, Debug)]
pub struct Mesh {
    /// Ranks that hold the same shard of the parameters.
    pub replicate: Arc<dyn ProcessGroup>,
    /// Ranks that hold the shards of one copy of the parameters.
    pub shard: Arc<dyn ProcessGroup>,
}

impl Mesh {
    /// The mesh of one rank.
    pub fn single() -> Self {
        Self {
            replicate: Arc::new(SingleRank),
            shard: Arc::new(SingleRank),
        }
    }

    /// This rank's place among those that read different rows.
    pub fn data_rank(&self) -> usize {
        self.replicate.rank() * self.shard.size() + self.shard.rank()
    }

    /// How many ranks read different rows.
    pub fn data_size(&self) -> usize {
        self.replicate.size() * self.shard.size()
    }

    /// The sum over all ranks: `[n]` → `[n]`.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.replicate
            .all_reduce_sum(self.shard.all_reduce_sum(tensor)?)
    }
}
