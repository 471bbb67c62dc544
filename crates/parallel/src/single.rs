//! The group of one rank.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::group::{CommError, ProcessGroup, Receive, part_of};

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

    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        Ok(tensor)
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        match root {
            0 => Ok(tensor),
            _ => Err(not_here("broadcast", root)),
        }
    }

    fn exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        let ranks = sends.iter().map(|(to, _)| *to);
        let ranks = ranks.chain(receives.iter().map(|receive| receive.from));
        if let Some(other) = ranks.into_iter().find(|&rank| rank != 0) {
            return Err(not_here("exchange", other));
        }
        if sends.len() != receives.len() {
            let (sent, due) = (sends.len(), receives.len());
            let reason = format!("{sent} tensors sent to itself, {due} to be received");
            return Err(CommError::invalid("exchange", reason));
        }
        Ok(sends.into_iter().map(|(_, tensor)| tensor).collect())
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn split(&self, parts: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        part_of(parts, 0, 1)?;
        Ok(Arc::new(Self))
    }
}

fn not_here(operation: &'static str, rank: usize) -> CommError {
    CommError::invalid(operation, format!("there is no rank {rank} among 1"))
}
