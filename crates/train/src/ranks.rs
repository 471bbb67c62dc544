//! The ranks of a run: how this one meets the others, and what they do together beside arithmetic.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Device;
use rustix::process;
use ttt_parallel::tcp::{DeviceSigns, Meeting, Tcp, Watch, connect};
use ttt_parallel::{CommError, Declared, Mesh, Place, ProcessGroup, SingleRank, Votes};

use crate::config::{Config, DeviceKind};
use crate::device;
use crate::error::TrainError;
use crate::signals::Signal;

/// How long ranks wait for each other to start: nodes of a job do not come up at once.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a rank that hears of a lost one may take to end by itself, told in its own words. It may
/// be waiting for a GPU that waits for the lost rank for ever.
const GRACE: Duration = Duration::from_secs(3);

/// The exit code of a run that failed.
const FAILED: i32 = 2;

/// The ranks of a run as one of them sees them.
#[derive(Debug)]
pub struct Ranks {
    /// How they are laid out.
    pub mesh: Mesh,
    /// What this rank computes on, without autodiff.
    pub device: Device,
    /// All of them, over the host: for what must not wait for a device.
    host: Arc<dyn ProcessGroup>,
    votes: Votes,
    /// `None` on one rank.
    tcp: Option<Arc<Tcp>>,
    /// Until the run goes at its pace.
    starting: Option<Declared>,
}

impl Ranks {
    /// Meets the others of `place`'s run, which have been started with the same `config`; `purpose`
    /// is what else must be equal. From then on a lost rank ends this process within a few seconds,
    /// whatever it waits for; and so does one that hangs, sooner once [`Ranks::started`] was called.
    ///
    /// # Errors
    /// If the layout asked for is not one of so many ranks, or the others do not come.
    pub fn meet(place: &Place, config: &Config, purpose: &str) -> Result<Self, TrainError> {
        let layout = config.parallel.layout(place.size)?;
        config.validate_rows(layout.replicate * layout.shard)?;
        if place.size == 1 {
            return Ok(Self {
                mesh: Mesh::single(),
                device: device::open(config.run.device, place.local_rank)?,
                host: Arc::new(SingleRank),
                votes: Votes::new(Arc::new(SingleRank)),
                tcp: None,
                starting: None,
            });
        }
        let version = env!("CARGO_PKG_VERSION");
        let equal = format!("{version}\n{purpose}\n{}", config.to_toml()?);
        let deadline = Duration::from_secs(config.parallel.timeout_s);
        let (host, tcp) = meet_on_host(place, &equal, deadline)?;
        let starting = tcp.activity().long("the start of the run");
        tcp.watch_over(signs(config.run.device))?;
        let join = || -> Result<Self, TrainError> {
            let (device, world) = join_on_devices(config.run.device, place, &host)?;
            tcp.activity().at("the groups of ranks");
            let all = [(0..place.size).collect()];
            let mut mesh = Mesh::new(world, layout)?;
            mesh.activity = tcp.activity().clone();
            Ok(Self {
                mesh,
                device,
                // A group of its own: nothing else is exchanged in it.
                votes: Votes::new(host.split(&all)?),
                host: host.clone(),
                tcp: Some(tcp.clone()),
                starting: Some(starting),
            })
        };
        let joined = join();
        if let Err(error) = &joined {
            tcp.fail(&error.to_string());
        }
        joined
    }

    /// Whether this is rank 0, which speaks for all.
    pub fn first(&self) -> bool {
        self.host.rank() == 0
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.host.rank()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.host.size()
    }

    /// The run goes at its pace from now on.
    pub fn started(&mut self) {
        self.starting = None;
    }

    /// Returns once every rank has come, however long that takes.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn barrier(&self) -> Result<(), CommError> {
        self.host.barrier()
    }

    /// What `work` returns, done by rank 0 first and by the others once it is done: what rank 0 finds
    /// to be made, the others find made. `work` hears whether it is the first.
    ///
    /// # Errors
    /// Those of `work`, or if a rank is lost.
    pub fn first_then_all<T>(
        &self,
        work: impl FnOnce(bool) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        if self.first() {
            let done = work(true)?;
            self.barrier()?;
            return Ok(done);
        }
        self.barrier()?;
        work(false)
    }

    /// The signal at which all ranks end, once one of them has received it: all hear of it at the
    /// same call, on several ranks the one after.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn agree_on(&mut self, received: Option<Signal>) -> Result<Option<Signal>, CommError> {
        let vote = received.map_or(0, |signal| signal as u8);
        let highest = self.votes.highest(vote)?;
        Ok(Signal::of(highest.into()))
    }

    /// Tells the others of this rank's failure, so that they end and name it.
    pub fn tell(&self, error: &TrainError) {
        if let Some(tcp) = &self.tcp {
            tcp.fail(&error.to_string());
        }
    }
}

/// Connects the ranks over TCP; `equal` is what must be the same on all of them.
///
/// # Errors
/// If they do not come.
pub fn meet_on_host(
    place: &Place,
    equal: &str,
    deadline: Duration,
) -> Result<(Arc<dyn ProcessGroup>, Arc<Tcp>), CommError> {
    let hash = blake3::hash(equal.as_bytes());
    let (first, _) = hash.as_bytes().split_at(8);
    let fingerprint = first
        .iter()
        .fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    let group = connect(&Meeting {
        rank: place.rank,
        size: place.size,
        host: place.host.clone(),
        port: place.port,
        run: place.run.clone(),
        fingerprint,
        patience: PATIENCE,
        deadline,
    })?;
    let tcp = group.transport().clone();
    end_with(tcp.watch(), place.rank, place.size);
    Ok((Arc::new(group), tcp))
}

/// Opens this rank's device, and makes a group of all ranks whose tensors travel between devices.
///
/// # Errors
/// If there is no such device, or the devices do not reach each other.
pub fn join_on_devices(
    kind: DeviceKind,
    place: &Place,
    host: &Arc<dyn ProcessGroup>,
) -> Result<(Device, Arc<dyn ProcessGroup>), TrainError> {
    let device = device::open(kind, place.local_rank)?;
    let world = match kind {
        DeviceKind::Cpu => host.clone(),
        DeviceKind::Cuda => on_gpus(&device, host)?,
    };
    Ok((device, world))
}

/// Ends the process some time after a rank was lost, unless it has ended by then.
fn end_with(watch: Watch, rank: usize, size: usize) {
    std::thread::spawn(move || {
        if let Some(reason) = watch.wait() {
            std::thread::sleep(GRACE);
            eprintln!("error: rank {rank} of {size}: {reason}");
            leave();
        }
    });
}

/// Ends the process. What libraries do at an exit may wait for a GPU that never answers, so a process that
/// is still there after [`GRACE`] is killed.
fn leave() -> ! {
    std::thread::spawn(|| {
        std::thread::sleep(GRACE);
        let own = process::getpid();
        if let Err(error) = process::kill_process(own, process::Signal::KILL) {
            eprintln!("error: cannot end this process: {error}; kill {own:?} by hand");
        }
    });
    std::process::exit(FAILED)
}

/// What is seen of this rank's device while the main thread waits for it.
fn signs(kind: DeviceKind) -> DeviceSigns {
    match kind {
        // Threads that wait for tensors over TCP say so.
        DeviceKind::Cpu => DeviceSigns::NONE,
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => DeviceSigns::NONE,
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => DeviceSigns {
            waits: ttt_kernels::cuda::event::waits_for_others,
            mark: ttt_kernels::cuda::event::mark,
            marks: ttt_kernels::cuda::event::marks,
        },
    }
}

#[cfg(not(feature = "cuda"))]
fn on_gpus(
    _device: &Device,
    _host: &Arc<dyn ProcessGroup>,
) -> Result<Arc<dyn ProcessGroup>, CommError> {
    let problem = "this program was built without GPU support, so there are no ranks on GPUs";
    Err(CommError::Start(problem.into()))
}

#[cfg(feature = "cuda")]
fn on_gpus(
    device: &Device,
    host: &Arc<dyn ProcessGroup>,
) -> Result<Arc<dyn ProcessGroup>, CommError> {
    Ok(Arc::new(ttt_kernels::cuda::nccl_group::NcclGroup::new(
        device,
        host.clone(),
    )?))
}
