//! Ranks as threads of one process: for tests of everything that ranks do together.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::group::{CommError, ProcessGroup};

/// One rank of a group of threads.
#[derive(Clone, Debug)]
pub struct ThreadRank {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    size: usize,
    round: Mutex<Round>,
    changed: Condvar,
}

/// One exchange: every rank puts a tensor in, then every rank takes all of them out.
#[derive(Debug)]
struct Round {
    tensors: Vec<Option<Tensor<1>>>,
    /// Ranks that have yet to take.
    leaving: usize,
    /// A rank has left for good.
    lost: Option<usize>,
}

/// The ranks of a new group of `size` threads, one for each.
pub fn thread_group(size: usize) -> Vec<ThreadRank> {
    let shared = Arc::new(Shared {
        size,
        round: Mutex::new(Round {
            tensors: vec![None; size],
            leaving: 0,
            lost: None,
        }),
        changed: Condvar::new(),
    });
    (0..size)
        .map(|rank| ThreadRank {
            rank,
            shared: shared.clone(),
        })
        .collect()
}

impl ThreadRank {
    /// Every rank's tensor, in rank order.
    fn exchange(
        &self,
        operation: &'static str,
        tensor: Tensor<1>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        let Shared {
            size,
            round,
            changed,
        } = &*self.shared;
        let mut round = round.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |lost| CommError::Failed {
            rank: self.rank,
            size: *size,
            operation,
            reason: format!("rank {lost} has left"),
        };
        let wait = |guard| changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        // The round before must be over: a fast rank may be here again already.
        while round.leaving > 0 && round.lost.is_none() {
            round = wait(round);
        }
        round.tensors[self.rank] = Some(tensor);
        if round.tensors.iter().all(Option::is_some) {
            round.leaving = *size;
            changed.notify_all();
        }
        while round.leaving == 0 && round.lost.is_none() {
            round = wait(round);
        }
        if let Some(lost) = round.lost
            && round.leaving == 0
        {
            return Err(failed(lost));
        }
        let all = round.tensors.iter().flatten().cloned().collect();
        round.leaving -= 1;
        if round.leaving == 0 {
            round.tensors.fill(None);
            changed.notify_all();
        }
        Ok(all)
    }

    /// Tells the others that this rank will not come again, so that none waits for it.
    pub fn leave(&self) {
        let mut round = self
            .shared
            .round
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        round.lost = Some(self.rank);
        self.shared.changed.notify_all();
    }
}

/// The sum in rank order, so that every rank gets the same bits.
fn sum(tensors: Vec<Tensor<1>>) -> Tensor<1> {
    let sum = tensors.into_iter().reduce(|a, b| a + b);
    sum.expect("a group has ranks")
}

impl ProcessGroup for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        Ok(sum(self.exchange("all_reduce", tensor)?))
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        Ok(Tensor::cat(self.exchange("all_gather", shard)?, 0))
    }

    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        let len = tensor.dims()[0] / self.size();
        let own = self.rank * len..(self.rank + 1) * len;
        let all = self.exchange("reduce_scatter", tensor)?;
        Ok(sum(all
            .into_iter()
            .map(|t| t.slice([own.clone()]))
            .collect()))
    }

    fn barrier(&self) -> Result<(), CommError> {
        let device = burn::tensor::Device::flex();
        self.exchange("barrier", Tensor::zeros([1], &device))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn on_threads<T: Send>(size: usize, work: impl Fn(ThreadRank) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let work = &work;
            let handles: Vec<_> = thread_group(size)
                .into_iter()
                .map(|rank| scope.spawn(move || work(rank)))
                .collect();
            let join = |handle: std::thread::ScopedJoinHandle<T>| handle.join().expect("a rank");
            handles.into_iter().map(join).collect()
        })
    }

    fn values(tensor: Tensor<1>) -> Vec<f32> {
        tensor.into_data().try_into_vec().expect("f32")
    }

    #[test]
    fn collectives_over_many_rounds() {
        let results = on_threads(3, |group| {
            let rank = group.rank() as f32;
            let mut seen = vec![];
            for round in 0..50 {
                let own = [rank, rank + 10.0, round as f32];
                let own = || Tensor::<1>::from_floats(own, &Device::flex());
                seen.extend(values(group.all_reduce_sum(own()).expect("sum")));
                seen.extend(values(group.all_gather(own()).expect("gather")));
                seen.extend(values(group.reduce_scatter_sum(own()).expect("scatter")));
                group.barrier().expect("barrier");
            }
            seen
        });
        for (rank, seen) in results.iter().enumerate() {
            for (round, seen) in seen.chunks(13).enumerate() {
                let r = round as f32;
                let mut expected = vec![3.0, 33.0, 3.0 * r];
                expected.extend([0.0, 10.0, r, 1.0, 11.0, r, 2.0, 12.0, r]);
                expected.push([3.0, 33.0, 3.0 * r][rank]);
                assert_eq!(seen, expected, "rank {rank}, round {round}");
            }
        }
    }

    #[test]
    fn nobody_waits_for_a_rank_that_left() {
        let results = on_threads(2, |group| match group.rank() {
            0 => {
                group.leave();
                Ok(())
            }
            _ => group.barrier(),
        });
        let error = results[1].as_ref().expect_err("rank 0 left").to_string();
        assert!(error.contains("rank 0 has left"), "{error}");
    }
}
