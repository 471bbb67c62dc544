//! Ranks as threads of one process: for tests of everything that ranks do together.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use burn::tensor::{Device, Tensor};

use crate::group::{CommError, Pending, ProcessGroup, Receive};
use crate::host::{HostGroup, Transport};
use crate::mailbox::{Mailbox, Operation, Tag};
use crate::mesh::{Layout, Mesh};

/// One rank of a group of threads.
#[derive(Clone, Debug)]
pub struct ThreadRank(HostGroup<Threads>);

/// One rank's view of the mailboxes of all.
#[derive(Debug)]
struct Threads {
    rank: usize,
    mailboxes: Arc<Vec<Mailbox<Tensor<1>>>>,
    next_group: AtomicU32,
}

/// The ranks of a new group of `size` threads, one for each.
pub fn thread_group(size: usize) -> Vec<ThreadRank> {
    let mailboxes: Arc<Vec<_>> = Arc::new((0..size).map(|_| Mailbox::default()).collect());
    (0..size)
        .map(|rank| {
            ThreadRank(HostGroup::world(Arc::new(Threads {
                rank,
                mailboxes: mailboxes.clone(),
                next_group: AtomicU32::new(0),
            })))
        })
        .collect()
}

/// What `work` returns on each rank of a new group of threads, in rank order.
///
/// # Panics
/// If a rank does; the others then fail instead of waiting for it.
pub fn on_threads<T: Send>(size: usize, work: impl Fn(ThreadRank) -> T + Sync) -> Vec<T> {
    /// Ends the others' waiting when a rank panics.
    struct Leave(ThreadRank);
    impl Drop for Leave {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.leave();
            }
        }
    }
    std::thread::scope(|scope| {
        let work = &work;
        let handles: Vec<_> = thread_group(size)
            .into_iter()
            .map(|rank| {
                scope.spawn(move || {
                    let _leave = Leave(rank.clone());
                    work(rank)
                })
            })
            .collect();
        let join = |handle: std::thread::ScopedJoinHandle<T>| match handle.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        handles.into_iter().map(join).collect()
    })
}

/// What `work` returns on each rank of a new mesh of threads, in rank order.
///
/// # Panics
/// If a rank does.
pub fn on_mesh<T: Send>(layout: Layout, work: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
    on_threads(layout.ranks(), |rank| {
        let mesh = Mesh::new(Arc::new(rank), layout);
        work(mesh.expect("as many threads as the layout has ranks"))
    })
}

impl ThreadRank {
    /// Tells the others that this rank will not come again, so that none waits for it.
    pub fn leave(&self) {
        let threads = self.0.transport();
        for mailbox in threads.mailboxes.iter() {
            mailbox.fail(format!("rank {} has left", threads.rank));
        }
    }
}

impl Transport for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.mailboxes.len()
    }

    fn next_group(&self) -> &AtomicU32 {
        &self.next_group
    }

    fn send(&self, to: &[usize], tag: Tag, tensor: Tensor<1>) -> Result<(), String> {
        // What travels belongs to no tape.
        let tensor = match tensor.is_autodiff() {
            true => tensor.inner(),
            false => tensor,
        };
        for &to in to {
            self.mailboxes[to].put(self.rank, tag, tensor.clone());
        }
        Ok(())
    }

    fn receive(
        &self,
        from: usize,
        tag: Tag,
        device: &Device,
    ) -> Result<(Operation, Tensor<1>), String> {
        let (operation, tensor) = self.mailboxes[self.rank].take(from, tag)?;
        let tensor = match device.is_autodiff() {
            true => tensor.autodiff(),
            false => tensor,
        };
        Ok((operation, tensor))
    }
}

impl ProcessGroup for ThreadRank {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.0.all_reduce_sum(tensor)
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.0.all_gather(shard)
    }

    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.0.reduce_scatter_sum(tensor)
    }

    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.0.all_to_all(tensor)
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        self.0.broadcast(tensor, root)
    }

    fn exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        self.0.exchange(sends, receives)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.0.barrier()
    }

    fn split(&self, parts: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        self.0.split(parts)
    }

    fn start_all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.0.start_all_reduce_sum(tensor)
    }

    fn start_all_gather(&self, shard: Tensor<1>) -> Result<Pending, CommError> {
        self.0.start_all_gather(shard)
    }

    fn start_reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.0.start_reduce_scatter_sum(tensor)
    }

    fn start_all_to_all(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.0.start_all_to_all(tensor)
    }

    fn start_exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Pending<Vec<Tensor<1>>>, CommError> {
        self.0.start_exchange(sends, receives)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_rank_that_left() {
        // Rank 2 waits for rank 1, which still lives but waits for rank 0.
        let results = on_threads(3, |group| match group.rank() {
            0 => {
                group.leave();
                Ok(())
            }
            _ => group.barrier(),
        });
        for result in &results[1..] {
            let error = result.as_ref().expect_err("rank 0 left").to_string();
            assert!(error.contains("rank 0 has left"), "{error}");
        }
    }

    #[test]
    fn ranks_that_disagree_hear_of_it() {
        let results = on_threads(2, |group| {
            let tensor = |len| Tensor::<1>::zeros([len], &Device::flex());
            let lengths = group.all_gather(tensor(2 + group.rank())).map(|_| ());
            let operations = match group.rank() {
                0 => group.all_gather(tensor(2)),
                _ => group.all_reduce_sum(tensor(2)),
            };
            let split = match group.rank() {
                0 => group.split(&[vec![0], vec![1]]),
                _ => group.split(&[vec![1], vec![0]]),
            };
            [lengths, operations.map(|_| ()), split.map(|_| ())]
        });
        let says = ["3 elements of F32", "for all_reduce", "in another way"];
        for (result, says) in results
            .into_iter()
            .next()
            .expect("rank 0")
            .into_iter()
            .zip(says)
        {
            let error = result.expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
