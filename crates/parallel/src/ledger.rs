//! What a rank sends, counted by what it is for.
//!
//! A group that [`Ledger::watch`] returns writes down the bytes of every exchange under what the calling
//! thread is doing: [`sending`] says what travels, [`part`] for which part of a model. An exchange of all
//! ranks is counted as a ring makes it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::group::{CommError, Pending, ProcessGroup, Receive};

/// What a thread exchanges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// What travels; empty where nothing was said.
    pub what: &'static str,
    /// For which part of the model.
    pub part: Option<usize>,
}

thread_local! {
    static NOW: Cell<Entry> = const { Cell::new(Entry { what: "", part: None }) };
}

/// Until it is dropped, the thread exchanges what was said last.
#[derive(Debug)]
#[must_use = "it is over when this is dropped"]
pub struct Said(Entry);

impl Drop for Said {
    fn drop(&mut self) {
        NOW.set(self.0);
    }
}

/// What this thread sends from now on.
pub fn sending(what: &'static str) -> Said {
    let before = NOW.get();
    NOW.set(Entry { what, ..before });
    Said(before)
}

/// For which part of the model this thread works from now on.
pub fn part(part: usize) -> Said {
    let before = NOW.get();
    let part = Some(part);
    NOW.set(Entry { part, ..before });
    Said(before)
}

/// Bytes that this rank sent to others, by what they were. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Arc<Mutex<BTreeMap<Entry, u64>>>);

impl Ledger {
    /// `group`, whose exchanges are counted here.
    pub fn watch(&self, group: &Arc<dyn ProcessGroup>) -> Arc<dyn ProcessGroup> {
        match group.size() {
            1 => group.clone(),
            _ => Arc::new(Counted {
                inner: group.clone(),
                ledger: self.clone(),
            }),
        }
    }

    /// What was sent since the last call.
    pub fn take(&self) -> BTreeMap<Entry, u64> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add(&self, bytes: u64) {
        let mut sent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *sent.entry(NOW.get()).or_default() += bytes;
    }
}

/// A group that counts.
#[derive(Debug)]
struct Counted {
    inner: Arc<dyn ProcessGroup>,
    ledger: Ledger,
}

fn bytes(tensor: &Tensor<1>) -> u64 {
    (tensor.dims()[0] * tensor.dtype().size()) as u64
}

impl Counted {
    /// `tensor` has a part for each rank.
    fn others(&self, tensor: &Tensor<1>) {
        let size = self.size() as u64;
        self.ledger.add(bytes(tensor) * (size - 1) / size);
    }

    fn summed(&self, tensor: &Tensor<1>) {
        let size = self.size() as u64;
        self.ledger.add(2 * (bytes(tensor) * (size - 1) / size));
    }

    fn gathered(&self, shard: &Tensor<1>) {
        self.ledger.add(bytes(shard) * (self.size() as u64 - 1));
    }

    fn sent(&self, sends: &[(usize, Tensor<1>)]) {
        let own = self.rank();
        let others = sends.iter().filter(|(to, _)| *to != own);
        self.ledger
            .add(others.map(|(_, tensor)| bytes(tensor)).sum());
    }
}

impl ProcessGroup for Counted {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.summed(&tensor);
        self.inner.all_reduce_sum(tensor)
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.gathered(&shard);
        self.inner.all_gather(shard)
    }

    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.others(&tensor);
        self.inner.reduce_scatter_sum(tensor)
    }

    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.others(&tensor);
        self.inner.all_to_all(tensor)
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        self.ledger.add(bytes(&tensor));
        self.inner.broadcast(tensor, root)
    }

    fn exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        self.sent(&sends);
        self.inner.exchange(sends, receives)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.inner.barrier()
    }

    fn split(&self, parts: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        Ok(self.ledger.watch(&self.inner.split(parts)?))
    }

    fn start_all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.summed(&tensor);
        self.inner.start_all_reduce_sum(tensor)
    }

    fn start_all_gather(&self, shard: Tensor<1>) -> Result<Pending, CommError> {
        self.gathered(&shard);
        self.inner.start_all_gather(shard)
    }

    fn start_reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.others(&tensor);
        self.inner.start_reduce_scatter_sum(tensor)
    }

    fn start_all_to_all(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        self.others(&tensor);
        self.inner.start_all_to_all(tensor)
    }

    fn start_exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Pending<Vec<Tensor<1>>>, CommError> {
        self.sent(&sends);
        self.inner.start_exchange(sends, receives)
    }
}
