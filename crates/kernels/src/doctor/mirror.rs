//! A rank among ranks that all hold what it holds, so that one process can check what travels.

use std::sync::Arc;

use burn::tensor::Tensor;
use ttt_parallel::{CommError, ProcessGroup, Receive};

/// Rank `rank` of `size`. Only what [`crate::context::StateExchange::AllGather`] needs works.
#[derive(Debug)]
pub struct Mirror {
    /// This rank's number.
    pub rank: usize,
    /// Ranks in the group.
    pub size: usize,
}

fn refused<T>(operation: &'static str) -> Result<T, CommError> {
    let reason = "there are no other ranks, only what they would gather";
    Err(CommError::invalid(operation, reason))
}

impl ProcessGroup for Mirror {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce_sum(&self, _: Tensor<1>) -> Result<Tensor<1>, CommError> {
        refused("all_reduce")
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        Ok(Tensor::cat(vec![shard; self.size], 0))
    }

    fn reduce_scatter_sum(&self, _: Tensor<1>) -> Result<Tensor<1>, CommError> {
        refused("reduce_scatter")
    }

    fn all_to_all(&self, _: Tensor<1>) -> Result<Tensor<1>, CommError> {
        refused("all_to_all")
    }

    fn broadcast(&self, _: Tensor<1>, _: usize) -> Result<Tensor<1>, CommError> {
        refused("broadcast")
    }

    fn exchange(
        &self,
        _: Vec<(usize, Tensor<1>)>,
        _: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        refused("exchange")
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn split(&self, _: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        refused("split")
    }
}
