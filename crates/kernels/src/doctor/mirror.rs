//! A rank among ranks that all hold and send what it does, so that one process can check what is made of
//! what arrives.

use std::sync::Arc;

use burn::tensor::Tensor;
use ttt_parallel::{CommError, ProcessGroup, Receive};

/// Rank `rank` of `size`. It knows no sums.
#[derive(Debug)]
pub struct Mirror {
    /// This rank's number.
    pub rank: usize,
    /// Ranks in the group.
    pub size: usize,
}

/// A defect of the check, which must not pass for a lost rank: both sides would go on with zeros.
fn refused(operation: &str) -> ! {
    panic!("{operation}: there are no other ranks, only images of this one")
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

    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        let len = tensor.dims()[0] / self.size;
        let own = tensor.narrow(0, self.rank * len, len);
        Ok(Tensor::cat(vec![own; self.size], 0))
    }

    fn broadcast(&self, _: Tensor<1>, _: usize) -> Result<Tensor<1>, CommError> {
        refused("broadcast")
    }

    fn exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        // What an image sends here, it sends as far to its right as this rank does, or left.
        let sent = |due: &Receive| sends.iter().find(|(_, t)| t.dims()[0] == due.len);
        let found = receives.iter().map(|due| sent(due).map(|(_, t)| t.clone()));
        Ok(found
            .collect::<Option<_>>()
            .unwrap_or_else(|| refused("exchange")))
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn split(&self, _: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        refused("split")
    }
}
