//! Burn's CUDA stream, and the device addresses of its tensors.
//!
//! Nothing else in this crate names CubeCL. A failure marks the outputs, so that their first read
//! reports it instead of garbage.

use std::cell::RefCell;

use burn::backend::Cube;
use burn::tensor::{DType, Device, Int, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use cubecl_common::device_handle::{CallResultExt, DeviceHandle};
use cubecl_environment::backtrace::BackTrace;
use cubecl_environment::stream::StreamId;
use cubecl_server::memory_management::{MemoryScope, StreamMemoryReport};
use cubecl_server::runtime::Runtime;
use cubecl_server::server::{BufferBinding, Server, ServerError, ServerStorage};
use cubecl_server::stream::{FailureStore, WriteScoped};
use cudarc::driver::sys::CUstream;

use super::attention::Attentions;
use super::compile::Kernels;
use super::event;
use super::gemm::Gemms;
use super::profile;
use super::scratch;
use crate::memory::{self, Usage};
use crate::reference;
use crate::work::Work;

type CudaServer = <cubecl::cuda::CudaRuntime as Runtime>::Server;

/// A float or integer tensor in the GPU's memory.
#[derive(Clone, Debug)]
pub struct Buffer(CubeTensor);

impl Buffer {
    /// `tensor` with rows in order, copied if they are not; `None` on another backend.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        Self::strided(tensor).map(|b| Self(into_contiguous(b.0)))
    }

    /// `tensor` as it lies, possibly a transposed view.
    pub fn strided<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        if reference::is_on() {
            return None;
        }
        let tensor = match tensor.is_autodiff() {
            true => tensor.clone().inner(),
            false => tensor.clone(),
        };
        tensor.try_into_primitive::<Cube>().ok().map(Self)
    }

    /// The same for integers.
    pub fn of_ints<const D: usize>(tensor: &Tensor<D, Int>) -> Option<Self> {
        if reference::is_on() {
            return None;
        }
        let plain = tensor.clone().try_into_primitive::<Cube>();
        let plain = plain.or_else(|_| tensor.clone().inner().try_into_primitive::<Cube>());
        plain.ok().map(|t| Self(into_contiguous(t)))
    }

    /// A little memory on `device`, by which work finds its stream; `None` on another backend.
    pub fn probe(device: &Device) -> Option<Self> {
        let tensor = Tensor::<1>::empty([1], (&device.clone().without_autodiff(), DType::F32));
        tensor.try_into_primitive::<Cube>().ok().map(Self)
    }

    /// Unwritten memory on the same device.
    pub fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Self {
        let shape = shape.into();
        let like = &self.0;
        let handle = like.client.empty(shape.num_elements() * dtype.size());
        let (client, device) = (like.client.clone(), like.device.clone());
        Self(CubeTensor::new_contiguous(
            client, device, shape, handle, dtype,
        ))
    }

    /// The tensor again.
    pub fn tensor<const D: usize>(self) -> Tensor<D> {
        Tensor::from_primitive::<Cube>(self.0)
    }

    /// The integer tensor again.
    pub fn ints<const D: usize>(self) -> Tensor<D, Int> {
        Tensor::from_primitive::<Cube>(self.0)
    }

    /// Where the memory is.
    pub fn device(&self) -> Device {
        Tensor::<1>::from_primitive::<Cube>(self.0.clone()).device()
    }

    /// Extents.
    pub fn dims(&self) -> Vec<usize> {
        self.0.meta.shape().iter().copied().collect()
    }

    /// Elements between neighbours of each dimension.
    pub fn strides(&self) -> Vec<usize> {
        self.0.meta.strides().iter().copied().collect()
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.dims().iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Precision.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Whether nothing else refers to this memory, so that it may be overwritten.
    pub fn is_ours(&self) -> bool {
        self.0.handle.can_mut()
    }
}

/// What work on the stream needs: the stream, cuBLASLt's plans, our kernels.
pub struct Context<'a> {
    /// Burn's stream.
    pub stream: CUstream,
    /// GEMM plans of the device thread.
    pub gemms: &'a mut Gemms,
    /// Kernels of the device thread.
    pub kernels: &'a mut Kernels,
    /// cuDNN's plans of the device thread.
    pub attentions: &'a mut Attentions,
    /// Address and bytes of every buffer of this call, while a profile is taken.
    pub extents: Vec<(u64, u64)>,
    /// What the next launch does, where somebody said so.
    pub work: Option<Work>,
}

/// One kernel argument.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A device address, or 0 for none.
    Ptr(u64),
    /// A C `int`.
    Int(i32),
    /// An unsigned 64-bit integer.
    Size(u64),
    /// A C `float`.
    Float(f32),
    /// An unsigned 32-bit mask.
    Bits(u32),
    /// The seven floats of AdamW's constants.
    Floats([f32; 7]),
    /// Where the parts of a gradient lie: `Parts` in `source/optimizer.cu`.
    Parts([u64; 26]),
    /// A tensor map of the copy engine.
    Map([u64; 16]),
    /// The pieces of documents: `Chains` in `source/hopper_scan.cu`.
    Chains([u32; 32]),
}

thread_local! {
    /// Lives on the device thread, where the context is current and all work is issued.
    static STATE: RefCell<(Gemms, Kernels, Attentions)> = RefCell::default();
}

/// Calls `issue` on the device thread with Burn's stream and the addresses of `reads` and `writes`.
///
/// On failure the outputs are marked: whoever reads them gets the sentence.
pub fn on_stream(
    reads: &[&Buffer],
    writes: &[&Buffer],
    issue: impl FnOnce(&mut Context, &[u64], &[u64]) -> Result<(), String> + Send,
) {
    let stream = StreamId::current();
    let device = DeviceHandle::<CudaServer>::new(writes[0].0.client.service_id().device);
    let bind = |buffers: &[&Buffer]| -> Vec<BufferBinding> {
        buffers
            .iter()
            .map(|b| b.0.handle.clone().binding())
            .collect()
    };
    let (reads, writes) = (bind(reads), bind(writes));
    device
        .submit_blocking(move |server: &mut CudaServer| {
            if let Err(error) = issue_on(server, stream, &reads, &writes, issue) {
                WriteScoped::write_streams(server).taint(error, writes.iter());
            }
        })
        .unwrap_or_resume();
}

/// What Burn's allocator holds on `device`, all streams together; `None` on another backend.
pub fn usage(device: &Device) -> Option<Usage> {
    let client = Buffer::probe(device)?.0.client;
    let report = client.memory_report(MemoryScope::Device);
    Some(total(&report.streams))
}

fn usage_of(server: &mut CudaServer) -> Usage {
    let streams = Server::stream_ids(server).into_iter();
    let reports: Vec<_> = streams
        .filter_map(|id| Server::memory_report(server, id))
        .collect();
    total(&reports)
}

/// Without the staging buffers beside the pools, which are the host's memory.
fn total(reports: &[StreamMemoryReport]) -> Usage {
    let mut sum = Usage {
        scratch: scratch::held(),
        ..Usage::default()
    };
    for report in reports {
        let usage = report.pools.usage();
        sum.tensors += usage.bytes_in_use;
        sum.pools += usage.bytes_reserved;
    }
    sum
}

fn issue_on(
    server: &mut CudaServer,
    stream: StreamId,
    reads: &[BufferBinding],
    writes: &[BufferBinding],
    issue: impl FnOnce(&mut Context, &[u64], &[u64]) -> Result<(), String>,
) -> Result<(), ServerError> {
    // Addresses first: this also makes the context current, and fails on a buffer that a failed
    // launch left unwritten.
    let mut pin = |bindings: &[BufferBinding]| {
        bindings
            .iter()
            .map(|b| ServerStorage::get_resource(server, b.clone(), stream))
            .collect::<Result<Vec<_>, _>>()
    };
    let (pinned_reads, pinned_writes) = (pin(reads)?, pin(writes)?);
    let from: Vec<u64> = pinned_reads.iter().map(|r| r.resource().ptr).collect();
    let to: Vec<u64> = pinned_writes.iter().map(|w| w.resource().ptr).collect();
    if memory::is_watched() {
        memory::seen(usage_of(server).allocated());
    }
    // Then the stream, ordered after every producer on other streams.
    let mut streams =
        WriteScoped::write_streams(server).resolve(stream, reads.iter().chain(writes))?;
    let stream = streams.current().sys;
    event::keep_mark(stream);
    let extents = match profile::is_on() {
        true => pinned_reads
            .iter()
            .chain(&pinned_writes)
            .map(|pinned| (pinned.resource().ptr, pinned.resource().size))
            .collect(),
        false => vec![],
    };
    STATE
        .with_borrow_mut(|(gemms, kernels, attentions)| {
            let mut context = Context {
                stream,
                gemms,
                kernels,
                attentions,
                extents,
                work: None,
            };
            issue(&mut context, &from, &to)
        })
        .map_err(|reason| {
            eprintln!("ttt: a CUDA operation failed: {reason}");
            ServerError::Generic {
                reason,
                backtrace: BackTrace::capture(),
            }
        })
}
