//! Ranks as threads, and groups that can be watched. Each test file uses what it needs of this.

#![allow(dead_code)]

pub mod checkpoint;
pub mod model;
pub mod shared_rows;

use std::sync::Arc;

use burn::tensor::Tensor;
use ttt_parallel::threads::{on_mesh, on_threads};
use ttt_parallel::{CommError, Layout, Mesh, Pending, ProcessGroup, Receive};

/// Layouts of ranks, with the parameters spread over the ranks of a row or not.
pub fn layouts() -> Vec<Layout> {
    let apart = [
        [1, 1, 1],
        [1, 2, 1],
        [1, 4, 1],
        [2, 1, 1],
        [2, 2, 1],
        [1, 1, 2],
        [1, 3, 2],
        [2, 2, 2],
    ];
    let jointly = [[1, 1, 2], [1, 3, 2], [2, 2, 2]];
    let apart = apart.into_iter().map(layout);
    apart.chain(jointly.into_iter().map(joint)).collect()
}

pub fn layout([replicate, shard, context]: [usize; 3]) -> Layout {
    Layout {
        replicate,
        shard,
        context,
        shard_over_context: false,
    }
}

/// The same with the parameters spread over the ranks of a row, too.
pub fn joint(shape: [usize; 3]) -> Layout {
    Layout {
        shard_over_context: true,
        ..layout(shape)
    }
}

/// What `work` returns on each rank of a mesh of threads, in rank order.
pub fn on_ranks<T: Send>(layout: Layout, work: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
    on_mesh(layout, work)
}

/// [`on_ranks`], where rank `lost` leaves before the exchange of all ranks that it has made
/// `exchanges` of.
pub fn on_ranks_losing<T: Send>(
    layout: Layout,
    lost: usize,
    exchanges: usize,
    work: impl Fn(Mesh) -> T + Sync,
) -> Vec<T> {
    use std::sync::atomic::{AtomicUsize, Ordering};
    on_threads(layout.ranks(), |rank| {
        let made = AtomicUsize::new(0);
        let world = Arc::new(rank.clone());
        let mesh = Mesh::new(world.clone(), layout).expect("as many ranks as the layout has");
        let watched = Watched {
            inner: world,
            before: Box::new(move |operation, _| {
                if rank.rank() == lost && made.fetch_add(1, Ordering::Relaxed) >= exchanges {
                    rank.leave();
                    let reason = format!("rank {lost} has left");
                    return Err(CommError::invalid(operation, reason));
                }
                Ok(())
            }),
            waited: None,
        };
        work(Mesh {
            world: Arc::new(watched),
            ..mesh
        })
    })
}

type Before = dyn Fn(&'static str, u64) -> Result<(), CommError> + Send + Sync;

/// A group that tells of every exchange before it makes it: which, and how many bytes this rank sends
/// to others, where the exchange of many is made in a ring.
pub struct Watched {
    pub inner: Arc<dyn ProcessGroup>,
    pub before: Box<Before>,
    /// Told when what was begun is waited for.
    pub waited: Option<Arc<dyn Fn(&'static str) + Send + Sync>>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

fn bytes(tensor: &Tensor<1>) -> u64 {
    (tensor.dims()[0] * tensor.dtype().size()) as u64
}

impl Watched {
    /// Bytes of `tensor` that one rank sends where each of the others gets a part of all of them.
    fn others(&self, tensor: &Tensor<1>) -> u64 {
        let size = self.size() as u64;
        bytes(tensor) * (size - 1) / size
    }

    fn told(&self, operation: &'static str, pending: Pending) -> Pending {
        match self.waited.clone() {
            None => pending,
            Some(waited) => Pending::new(move || {
                waited(operation);
                pending.wait()
            }),
        }
    }

    fn gathered(&self, shard: &Tensor<1>) -> u64 {
        bytes(shard) * (self.size() as u64 - 1)
    }
}

impl ProcessGroup for Watched {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        (self.before)("all_reduce", 2 * self.others(&tensor))?;
        self.inner.all_reduce_sum(tensor)
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        (self.before)("all_gather", self.gathered(&shard))?;
        self.inner.all_gather(shard)
    }

    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        (self.before)("reduce_scatter", self.others(&tensor))?;
        self.inner.reduce_scatter_sum(tensor)
    }

    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        (self.before)("all_to_all", self.others(&tensor))?;
        self.inner.all_to_all(tensor)
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        (self.before)("broadcast", bytes(&tensor))?;
        self.inner.broadcast(tensor, root)
    }

    fn exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        let sent = sends.iter().map(|(_, tensor)| bytes(tensor)).sum();
        (self.before)("exchange", sent)?;
        self.inner.exchange(sends, receives)
    }

    fn barrier(&self) -> Result<(), CommError> {
        (self.before)("barrier", 0)?;
        self.inner.barrier()
    }

    fn split(&self, parts: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        self.inner.split(parts)
    }

    fn start_all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        (self.before)("all_reduce", 2 * self.others(&tensor))?;
        let pending = self.inner.start_all_reduce_sum(tensor)?;
        Ok(self.told("all_reduce", pending))
    }

    fn start_all_gather(&self, shard: Tensor<1>) -> Result<Pending, CommError> {
        (self.before)("all_gather", self.gathered(&shard))?;
        let pending = self.inner.start_all_gather(shard)?;
        Ok(self.told("all_gather", pending))
    }

    fn start_reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        (self.before)("reduce_scatter", self.others(&tensor))?;
        let pending = self.inner.start_reduce_scatter_sum(tensor)?;
        Ok(self.told("reduce_scatter", pending))
    }

    fn start_all_to_all(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        (self.before)("all_to_all", self.others(&tensor))?;
        let pending = self.inner.start_all_to_all(tensor)?;
        Ok(self.told("all_to_all", pending))
    }
}
