//! The exchanges of a group, written once over a [`Transport`] that carries one tensor from one rank
//! to another. A sum is made by one rank or by all in rank order: every rank gets the same bits.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};

use crate::group::{CommError, Pending, ProcessGroup, Receive, part_of};
use crate::mailbox::{Operation, Tag};

/// Elements up to which a sum is made by every rank from all tensors, in one exchange instead of two.
const SMALL: usize = 1024;

/// Carries tensors between the ranks of a run, in order between any two, and without ever waiting
/// for the other side to receive.
pub trait Transport: Debug + Send + Sync + 'static {
    /// This rank's number in the run.
    fn rank(&self) -> usize;

    /// Ranks of the run.
    fn size(&self) -> usize;

    /// The number above those of all groups that this rank is in.
    fn next_group(&self) -> &AtomicU32;

    /// Sends a tensor to each of `to`, which may hold this rank.
    ///
    /// # Errors
    /// With what went wrong.
    fn send(&self, to: &[usize], tag: Tag, tensor: Tensor<1>) -> Result<(), String>;

    /// Waits for the next tensor that `from` sent for this exchange, brings it to `device`, and tells
    /// what the sender called the exchange.
    ///
    /// # Errors
    /// With what went wrong.
    fn receive(
        &self,
        from: usize,
        tag: Tag,
        device: &Device,
    ) -> Result<(Operation, Tensor<1>), String>;
}

/// A group of ranks that a transport connects.
#[derive(Debug)]
pub struct HostGroup<T: Transport> {
    transport: Arc<T>,
    /// The members' numbers in the run.
    members: Vec<usize>,
    /// This rank's place among them.
    place: usize,
    id: u32,
    /// The next exchange's.
    ticket: Arc<AtomicU64>,
}

/// The ticket of all [`Operation::Exchange`].
const BETWEEN_SOME: u64 = u64::MAX;

impl<T: Transport> Clone for HostGroup<T> {
    fn clone(&self) -> Self {
        Self {
            transport: self.transport.clone(),
            members: self.members.clone(),
            place: self.place,
            id: self.id,
            ticket: self.ticket.clone(),
        }
    }
}

impl<T: Transport> HostGroup<T> {
    /// The group of all ranks of `transport`.
    pub fn world(transport: Arc<T>) -> Self {
        transport.next_group().fetch_max(1, Ordering::Relaxed);
        Self {
            members: (0..transport.size()).collect(),
            place: transport.rank(),
            id: 0,
            ticket: Arc::default(),
            transport,
        }
    }

    /// What carries this group's tensors.
    pub fn transport(&self) -> &Arc<T> {
        &self.transport
    }

    /// What the next exchange of all ranks is known by.
    fn next(&self, operation: Operation) -> Tag {
        Tag {
            group: self.id,
            ticket: self.ticket.fetch_add(1, Ordering::Relaxed),
            operation,
        }
    }

    fn failed(&self, operation: Operation, reason: String) -> CommError {
        CommError::Failed {
            rank: self.transport.rank(),
            size: self.transport.size(),
            operation: operation.name(),
            reason,
        }
    }

    fn send(&self, tag: Tag, to: usize, tensor: Tensor<1>) -> Result<(), CommError> {
        let sent = self.transport.send(&[self.members[to]], tag, tensor);
        sent.map_err(|reason| self.failed(tag.operation, reason))
    }

    /// The same tensor to all others.
    fn send_all(&self, tag: Tag, tensor: Tensor<1>) -> Result<(), CommError> {
        let others = self.members.iter().copied();
        let others: Vec<usize> = others.filter(|&m| m != self.members[self.place]).collect();
        let sent = self.transport.send(&others, tag, tensor);
        sent.map_err(|reason| self.failed(tag.operation, reason))
    }

    fn receive(&self, tag: Tag, due: &Receive) -> Result<Tensor<1>, CommError> {
        let from = self.members[due.from];
        let operation = tag.operation;
        let received = self.transport.receive(from, tag, &due.device);
        let (sent, tensor) = received.map_err(|reason| self.failed(operation, reason))?;
        let (len, dtype) = (tensor.dims()[0], tensor.dtype());
        if sent != operation || len != due.len || dtype != due.dtype {
            let reason = format!(
                "rank {from} sent {len} elements of {dtype:?} for {sent}, where {} of {:?} for \
                 {operation} were due: the ranks do not run the same program on the same settings",
                due.len, due.dtype
            );
            return Err(self.failed(operation, reason));
        }
        Ok(tensor)
    }

    /// Sends tensor i to rank i; this rank's own comes back.
    fn deal(&self, tag: Tag, tensors: Vec<Tensor<1>>) -> Result<Tensor<1>, CommError> {
        let own = tensors[self.place].clone();
        for (to, tensor) in tensors.into_iter().enumerate() {
            if to != self.place {
                self.send(tag, to, tensor)?;
            }
        }
        Ok(own)
    }

    /// One tensor of all ranks: `[n]` → size times `[n]`.
    fn gather(&self, operation: Operation, tensor: Tensor<1>) -> Result<Vec<Tensor<1>>, CommError> {
        let tag = self.next(operation);
        self.send_all(tag, tensor.clone())?;
        let len = tensor.dims()[0];
        self.collect(tag, tensor, |_| len)
    }

    /// One tensor from each rank, of `len(rank)` elements; this rank's own is `own`.
    fn collect(
        &self,
        tag: Tag,
        own: Tensor<1>,
        len: impl Fn(usize) -> usize,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        let (dtype, device) = (own.dtype(), own.device());
        let due = |from| Receive {
            from,
            len: len(from),
            dtype,
            device: device.clone(),
        };
        (0..self.size())
            .map(|from| match from == self.place {
                true => Ok(own.clone()),
                false => self.receive(tag, &due(from)),
            })
            .collect()
    }

    /// What [`collect`](Self::collect) of tensors as long as `own` will give, put together.
    fn later(
        &self,
        tag: Tag,
        own: Tensor<1>,
        join: impl FnOnce(Vec<Tensor<1>>) -> Tensor<1> + Send + 'static,
    ) -> Pending {
        let (this, len) = (self.clone(), own.dims()[0]);
        Pending::new(move || Ok(join(this.collect(tag, own, |_| len)?)))
    }

    /// `tensor` in equal parts, one for each rank.
    fn parts(&self, operation: Operation, tensor: Tensor<1>) -> Result<Vec<Tensor<1>>, CommError> {
        let (len, size) = (tensor.dims()[0], self.size());
        if !len.is_multiple_of(size) {
            let reason = format!("{len} elements are no multiple of {size} ranks");
            return Err(CommError::invalid(operation.name(), reason));
        }
        let len = len / size;
        let part = |i: usize| tensor.clone().narrow(0, i * len, len);
        Ok((0..size).map(part).collect())
    }

    fn check(&self, operation: Operation, rank: usize) -> Result<(), CommError> {
        match rank < self.size() {
            true => Ok(()),
            false => {
                let reason = format!("there is no rank {rank} among {}", self.size());
                Err(CommError::invalid(operation.name(), reason))
            }
        }
    }
}

/// The sum in rank order; of halves, rounded once.
fn sum(tensors: Vec<Tensor<1>>) -> Tensor<1> {
    let dtype = tensors[0].dtype();
    let wide = |tensor: Tensor<1>| match dtype {
        DType::BF16 | DType::F16 => tensor.cast(FloatDType::F32),
        _ => tensor,
    };
    let sum = tensors.into_iter().map(wide).reduce(|a, b| a + b);
    let sum = sum.expect("a group has ranks");
    match dtype {
        DType::BF16 => sum.cast(FloatDType::BF16),
        DType::F16 => sum.cast(FloatDType::F16),
        _ => sum,
    }
}

/// A small message of whole numbers below 2²⁴, which f32 holds exactly.
fn message(numbers: &[u32]) -> Tensor<1> {
    let numbers: Vec<f32> = numbers.iter().map(|&n| n as f32).collect();
    let len = numbers.len();
    Tensor::from_data(
        TensorData::new(numbers, [len]),
        (&Device::flex(), DType::F32),
    )
}

impl<T: Transport> ProcessGroup for HostGroup<T> {
    fn rank(&self) -> usize {
        self.place
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.start_all_reduce_sum(tensor)?.wait()
    }

    /// Begun, the parts travel; the sums of large tensors only once they are waited for.
    fn start_all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        let (len, size) = (tensor.dims()[0], self.size());
        let tag = self.next(Operation::AllReduce);
        if len <= SMALL.max(size) {
            self.send_all(tag, tensor.clone())?;
            return Ok(self.later(tag, tensor, sum));
        }
        // Each rank sums its part, then all get all parts; parts differ by one element at most.
        let range = move |i: usize| i * len / size..(i + 1) * len / size;
        let parts = (0..size).map(|i| tensor.clone().slice([range(i)]));
        let own = self.deal(tag, parts.collect())?;
        let this = self.clone();
        Ok(Pending::new(move || {
            let own = sum(this.collect(tag, own, |_| range(this.place).len())?);
            this.send_all(tag, own.clone())?;
            let whole = this.collect(tag, own, |from| range(from).len())?;
            Ok(Tensor::cat(whole, 0))
        }))
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.start_all_gather(shard)?.wait()
    }

    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.start_reduce_scatter_sum(tensor)?.wait()
    }

    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.start_all_to_all(tensor)?.wait()
    }

    fn start_all_gather(&self, shard: Tensor<1>) -> Result<Pending, CommError> {
        let tag = self.next(Operation::AllGather);
        self.send_all(tag, shard.clone())?;
        Ok(self.later(tag, shard, |all| Tensor::cat(all, 0)))
    }

    fn start_reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        let parts = self.parts(Operation::ReduceScatter, tensor)?;
        let tag = self.next(Operation::ReduceScatter);
        let own = self.deal(tag, parts)?;
        Ok(self.later(tag, own, sum))
    }

    fn start_all_to_all(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        let parts = self.parts(Operation::AllToAll, tensor)?;
        let tag = self.next(Operation::AllToAll);
        let own = self.deal(tag, parts)?;
        Ok(self.later(tag, own, |all| Tensor::cat(all, 0)))
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        let operation = Operation::Broadcast;
        self.check(operation, root)?;
        let tag = self.next(operation);
        if root == self.place {
            self.send_all(tag, tensor.clone())?;
            return Ok(tensor);
        }
        let due = Receive {
            from: root,
            len: tensor.dims()[0],
            dtype: tensor.dtype(),
            device: tensor.device(),
        };
        self.receive(tag, &due)
    }

    fn exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        self.start_exchange(sends, receives)?.wait()
    }

    fn start_exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Pending<Vec<Tensor<1>>>, CommError> {
        let operation = Operation::Exchange;
        let ranks = sends.iter().map(|(to, _)| *to);
        for rank in ranks.chain(receives.iter().map(|due| due.from)) {
            self.check(operation, rank)?;
        }
        let tag = Tag {
            group: self.id,
            ticket: BETWEEN_SOME,
            operation,
        };
        for (to, tensor) in sends {
            self.send(tag, to, tensor)?;
        }
        let this = self.clone();
        Ok(Pending::new(move || {
            receives.iter().map(|due| this.receive(tag, due)).collect()
        }))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.gather(Operation::Barrier, message(&[0]))?;
        Ok(())
    }

    fn split(&self, parts: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        let operation = Operation::Split;
        let (list, place) = part_of(parts, self.place, self.size())?;
        // All ranks take a number that none of them uses yet; and see that the lists are the same.
        let next = self.transport.next_group();
        let mut flat = vec![next.load(Ordering::Relaxed), parts.len() as u32];
        for part in parts {
            flat.push(part.len() as u32);
            flat.extend(part.iter().map(|&rank| rank as u32));
        }
        let all = self.gather(operation, message(&flat))?;
        let mut id = 0;
        for (from, theirs) in all.into_iter().enumerate() {
            let theirs: Vec<f32> = theirs
                .into_data()
                .try_into_vec()
                .map_err(|error| self.failed(operation, format!("{error:?}")))?;
            let expected = flat[1..].iter().map(|&n| n as f32);
            if !expected.eq(theirs[1..].iter().copied()) {
                let reason = format!("rank {from} of the group splits it in another way");
                return Err(self.failed(operation, reason));
            }
            id = id.max(theirs[0] as u32);
        }
        next.store(id + 1, Ordering::Relaxed);
        Ok(Arc::new(Self {
            transport: self.transport.clone(),
            members: list.iter().map(|&rank| self.members[rank]).collect(),
            place,
            id,
            ticket: Arc::default(),
        }))
    }
}
