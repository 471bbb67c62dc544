//! A process group over NCCL: one rank per GPU.
//!
//! A group has a communicator, and beside it a group of the same ranks over the host, through which
//! the communicator's id travels and which barriers use. That group's heartbeats are also what notices
//! a lost rank: NCCL itself would wait for it for ever.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use ttt_parallel::{CommError, Pending, ProcessGroup, Receive};

use super::nccl::{Communicator, Issue, Span, Started, UniqueId, unique_id};
use super::stream::Buffer;

/// One rank of a group on GPUs.
#[derive(Debug)]
pub struct NcclGroup {
    communicator: Arc<Communicator>,
    /// The same ranks over the host.
    host: Arc<dyn ProcessGroup>,
    device: Device,
    /// This rank's number and all ranks, of the whole run.
    of_run: (usize, usize),
}

impl NcclGroup {
    /// The ranks of `host`, all of a run, on their GPUs. Every rank calls it.
    ///
    /// # Errors
    /// If NCCL is not there, or the GPUs do not reach each other.
    pub fn new(device: &Device, host: Arc<dyn ProcessGroup>) -> Result<Self, CommError> {
        let of_run = (host.rank(), host.size());
        Self::part_of_run(device, host, of_run)
    }

    fn part_of_run(
        device: &Device,
        host: Arc<dyn ProcessGroup>,
        of_run: (usize, usize),
    ) -> Result<Self, CommError> {
        let start = |reason: String| CommError::Start(reason);
        let own = match host.rank() {
            0 => unique_id().map_err(start)?,
            _ => [0; 128],
        };
        // Bytes are exact in f32.
        let bytes: Vec<f32> = own.iter().map(|&byte| f32::from(byte)).collect();
        let tensor = Tensor::from_data(
            TensorData::new(bytes, [own.len()]),
            (&Device::flex(), DType::F32),
        );
        let bytes: Vec<f32> = host
            .broadcast(tensor, 0)?
            .into_data()
            .try_into_vec()
            .map_err(|error| start(format!("{error:?}")))?;
        let bytes: Vec<u8> = bytes.into_iter().map(|byte| byte as u8).collect();
        let id: UniqueId = bytes
            .try_into()
            .map_err(|_| start("rank 0 sent no NCCL id".into()))?;
        let communicator = Communicator::new(device, &id, host.rank(), host.size());
        Ok(Self {
            communicator: Arc::new(communicator.map_err(start)?),
            host,
            device: device.clone(),
            of_run,
        })
    }

    fn failed(&self, operation: &'static str, reason: String) -> CommError {
        CommError::Failed {
            rank: self.of_run.0,
            size: self.of_run.1,
            operation,
            reason,
        }
    }

    fn check(&self, operation: &'static str, rank: usize) -> Result<(), CommError> {
        match rank < self.size() {
            true => Ok(()),
            false => {
                let reason = format!("there is no rank {rank} among {}", self.size());
                Err(CommError::invalid(operation, reason))
            }
        }
    }

    /// Issues `call` from `tensor` to a new tensor of `len` elements: from and to.
    fn start(
        &self,
        operation: &'static str,
        tensor: Tensor<1>,
        len: usize,
        call: impl FnOnce(Issue, Span, Span) -> Result<(), String> + Send,
    ) -> Result<(Started, bool), CommError> {
        let tracked = tensor.is_autodiff();
        let (from, count, dtype) = buffer(operation, &tensor)?;
        let to = from.empty([len], dtype);
        let started = self
            .communicator
            .start(operation, vec![from], vec![to], |issue| {
                let span = |at, len| Span { at, len, dtype };
                let (from, to) = (span(issue.reads[0], count), span(issue.writes[0], len));
                call(issue, from, to)
            });
        let started = started.map_err(|reason| self.failed(operation, reason))?;
        Ok((started, tracked))
    }

    /// The result of something started, on Burn's stream.
    fn finish(
        &self,
        operation: &'static str,
        (started, tracked): (Started, bool),
    ) -> Result<Tensor<1>, CommError> {
        let written = started
            .wait()
            .map_err(|reason| self.failed(operation, reason))?;
        let written = written.into_iter().next();
        let written =
            written.ok_or_else(|| self.failed(operation, "nothing was written".into()))?;
        Ok(on_tape(written.tensor(), tracked))
    }

    /// [`finish`](Self::finish), when it is asked for.
    fn pending(&self, operation: &'static str, started: (Started, bool)) -> Pending {
        let this = self.again();
        Pending::new(move || this.finish(operation, started))
    }

    /// This group, for what is asked later.
    fn again(&self) -> Self {
        Self {
            communicator: self.communicator.clone(),
            host: self.host.clone(),
            device: self.device.clone(),
            of_run: self.of_run,
        }
    }

    fn part(&self, operation: &'static str, tensor: &Tensor<1>) -> Result<usize, CommError> {
        let (len, size) = (tensor.dims()[0], self.size());
        match len.is_multiple_of(size) {
            true => Ok(len / size),
            false => {
                let reason = format!("{len} elements are no multiple of {size} ranks");
                Err(CommError::invalid(operation, reason))
            }
        }
    }

    fn reduce(&self, tensor: Tensor<1>) -> Result<(Started, bool), CommError> {
        let len = tensor.dims()[0];
        self.start("all_reduce", tensor, len, |issue, from, to| {
            issue.all_reduce(from, to.at)
        })
    }

    fn gather(&self, shard: Tensor<1>) -> Result<(Started, bool), CommError> {
        let len = shard.dims()[0] * self.size();
        self.start("all_gather", shard, len, |issue, from, to| {
            issue.all_gather(from, to.at)
        })
    }

    fn scatter(&self, tensor: Tensor<1>) -> Result<(Started, bool), CommError> {
        let len = self.part("reduce_scatter", &tensor)?;
        self.start("reduce_scatter", tensor, len, |issue, from, to| {
            issue.reduce_scatter(from.at, to)
        })
    }

    fn transpose(&self, tensor: Tensor<1>) -> Result<(Started, bool), CommError> {
        let part = self.part("all_to_all", &tensor)?;
        let (len, size) = (tensor.dims()[0], self.size());
        self.start("all_to_all", tensor, len, move |issue, from, to| {
            let parts = |span: Span| (0..size).map(move |rank| (rank, span.part(rank, part)));
            issue.exchange(parts(from), parts(to))
        })
    }
}

/// The memory of `tensor`, its elements and precision.
fn buffer(
    operation: &'static str,
    tensor: &Tensor<1>,
) -> Result<(Buffer, usize, DType), CommError> {
    let buffer = Buffer::of(tensor).ok_or_else(|| {
        CommError::invalid(operation, "ranks on GPUs exchange tensors on GPUs alone")
    })?;
    let (len, dtype) = (buffer.len(), buffer.dtype());
    Ok((buffer, len, dtype))
}

/// Results lie where what was given lay.
fn on_tape(tensor: Tensor<1>, tracked: bool) -> Tensor<1> {
    match tracked {
        true => tensor.autodiff(),
        false => tensor,
    }
}

impl ProcessGroup for NcclGroup {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.finish("all_reduce", self.reduce(tensor)?)
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.finish("all_gather", self.gather(shard)?)
    }

    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.finish("reduce_scatter", self.scatter(tensor)?)
    }

    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.finish("all_to_all", self.transpose(tensor)?)
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        self.check("broadcast", root)?;
        let len = tensor.dims()[0];
        let started = self.start("broadcast", tensor, len, move |issue, from, to| {
            issue.broadcast(from, to.at, root)
        })?;
        self.finish("broadcast", started)
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
        let operation = "exchange";
        let mut reads = vec![];
        let mut sent = vec![];
        for (to, tensor) in &sends {
            self.check(operation, *to)?;
            let (from, len, dtype) = buffer(operation, tensor)?;
            reads.push(from);
            sent.push((*to, len, dtype));
        }
        let mut writes = vec![];
        for due in &receives {
            self.check(operation, due.from)?;
            let (like, ..) = buffer(
                operation,
                &Tensor::empty([due.len], (&due.device, due.dtype)),
            )?;
            writes.push(like);
        }
        let started = self.communicator.start(operation, reads, writes, |issue| {
            let from = sent.iter().zip(issue.reads);
            let from = from.map(|(&(to, len, dtype), &at)| (to, Span { at, len, dtype }));
            let into = receives.iter().zip(issue.writes).map(|(due, &at)| {
                let (len, dtype) = (due.len, due.dtype);
                (due.from, Span { at, len, dtype })
            });
            issue.exchange(from, into)
        });
        let started = started.map_err(|reason| self.failed(operation, reason))?;
        let this = self.again();
        Ok(Pending::new(move || {
            let written = started.wait();
            let written = written.map_err(|reason| this.failed(operation, reason))?;
            let received = written.into_iter().zip(&receives);
            Ok(received
                .map(|(buffer, due)| on_tape(buffer.tensor(), due.device.is_autodiff()))
                .collect())
        }))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.host.barrier()
    }

    fn split(&self, parts: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        let host = self.host.split(parts)?;
        let part = Self::part_of_run(&self.device, host, self.of_run)?;
        Ok(Arc::new(part))
    }

    fn start_all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        Ok(self.pending("all_reduce", self.reduce(tensor)?))
    }

    fn start_all_gather(&self, shard: Tensor<1>) -> Result<Pending, CommError> {
        Ok(self.pending("all_gather", self.gather(shard)?))
    }

    fn start_reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        Ok(self.pending("reduce_scatter", self.scatter(tensor)?))
    }

    fn start_all_to_all(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        Ok(self.pending("all_to_all", self.transpose(tensor)?))
    }
}
