//! Ranks as processes that talk over TCP: CPU ranks, and what GPU ranks agree on beside NCCL.
//!
//! Why not a kept library: the `mpi` crate needs an Open MPI or MPICH installation with its compiler
//! wrapper to build, and Gloo has no kept Rust binding; `cargo build` alone must suffice. What is
//! here is the standard library: one connection between any two ranks (`rendezvous.rs`), framed
//! ([`frame`]), with a thread that writes and one that reads at each end, so that no send waits for
//! its receiver and no order of exchanges waits for ever.
//!
//! Each end hears a heartbeat several times per deadline. A rank that is silent for the deadline, or
//! whose connection closes without a goodbye, is lost: every exchange of the run fails from then on,
//! with its name. A rank that fails says why before it goes, and so does one that finds itself hanging
//! while its threads still beat (`hang.rs`).

mod device;
pub mod frame;
mod greeting;
mod hang;
mod life;
mod rendezvous;
#[cfg(test)]
mod tests;
mod wire;

use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use burn::tensor::{Device, Tensor};

use crate::activity::Activity;
use crate::group::CommError;
use crate::host::{HostGroup, Transport};
use crate::mailbox::{Mailbox, Operation, Tag};
use device::Answers;
use frame::{Header, Kind, WireType, read_frame, write_frame};
use hang::{Heard, Said, Watched, hear, last_words, went_on};

pub use device::DeviceSigns;
pub use rendezvous::Meeting;

/// Heartbeats per deadline: several may be late before a rank is given up.
const BEATS: u32 = 5;

/// The group of all ranks of a run, connected over TCP.
pub type TcpGroup = HostGroup<Tcp>;

/// This rank's connections.
#[derive(Debug)]
pub struct Tcp {
    rank: usize,
    size: usize,
    shared: Shared,
    /// By rank; none to itself.
    peers: Vec<Option<Peer>>,
    next_group: AtomicU32,
}

/// What has come from other ranks.
type Received = Mailbox<(WireType, Vec<u8>)>;

/// What the threads of all connections share.
#[derive(Clone, Debug)]
struct Shared {
    deadline: Duration,
    mailbox: Arc<Received>,
    activity: Activity,
    heard: Arc<Heard>,
}

/// A connection's sending side.
#[derive(Debug)]
struct Peer {
    queue: Sender<Letter>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What a writing thread is given.
enum Letter {
    Tensor {
        tag: Tag,
        dtype: WireType,
        bytes: Arc<Vec<u8>>,
    },
    Failed(String),
    Bye,
}

impl Letter {
    fn failed(reason: &str) -> Self {
        Self::Failed(reason.chars().take(4096).collect())
    }
}

/// Meets the other ranks and connects to all of them.
///
/// # Errors
/// If they do not come, or have come for another run.
pub fn connect(meeting: &Meeting) -> Result<TcpGroup, CommError> {
    let connections = meeting.meet().map_err(CommError::Start)?;
    let shared = Shared {
        deadline: meeting.deadline,
        mailbox: Arc::default(),
        activity: Activity::default(),
        heard: Arc::new(Mutex::new(vec![None; meeting.size])),
    };
    let mut peers = vec![];
    for (rank, connection) in connections.into_iter().enumerate() {
        peers.push(match connection {
            None => None,
            Some(stream) => {
                let peer = Peer::start(rank, stream, &shared);
                Some(peer.map_err(|error| {
                    CommError::Start(format!("cannot talk to rank {rank}: {error}"))
                })?)
            }
        });
    }
    let (rank, size) = (meeting.rank, meeting.size);
    Ok(HostGroup::world(Arc::new(Tcp {
        rank,
        size,
        shared,
        peers,
        next_group: AtomicU32::new(0),
    })))
}

impl Peer {
    fn start(rank: usize, stream: TcpStream, shared: &Shared) -> io::Result<Self> {
        let deadline = shared.deadline;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(deadline))?;
        stream.set_write_timeout(Some(deadline))?;
        let (queue, letters) = channel();
        let (reading, to_read) = (stream.try_clone()?, shared.clone());
        std::thread::Builder::new()
            .name(format!("from rank {rank}"))
            .spawn(move || read_all(rank, reading, &to_read))?;
        let shared = shared.clone();
        let writer = std::thread::Builder::new()
            .name(format!("to rank {rank}"))
            .spawn(move || {
                let said = || Said::of(&shared.activity.look()).encode();
                if let Err(error) = write_all(stream, &letters, deadline / BEATS, said) {
                    let reason = write_reason(&error, deadline);
                    shared.mailbox.fail(shared.lost(rank, &reason));
                }
            })?;
        let writer = Mutex::new(Some(writer));
        Ok(Self { queue, writer })
    }
}

impl Shared {
    /// How everybody hears of a lost rank.
    fn lost(&self, rank: usize, reason: &str) -> String {
        let last = last_words(&self.heard, rank);
        format!("rank {rank} is lost: {reason}{last}")
    }
}

fn write_reason(error: &io::Error, deadline: Duration) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("it took nothing for {} s", deadline.as_secs_f32())
        }
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            "its connection closed".into()
        }
        _ => format!("its connection broke ({error})"),
    }
}

/// Writes what is queued, and a heartbeat with what this rank has to say where nothing was for `beat`.
fn write_all(
    mut stream: TcpStream,
    letters: &Receiver<Letter>,
    beat: Duration,
    said: impl Fn() -> Vec<u8>,
) -> io::Result<()> {
    let mut sequence = 1; // frame 0 was the rendezvous's
    loop {
        let letter = letters.recv_timeout(beat);
        let words;
        let (header, bytes) = match &letter {
            Ok(Letter::Tensor { tag, dtype, bytes }) => {
                let header = Header {
                    kind: Kind::Tensor,
                    tag: *tag,
                    dtype: *dtype,
                    sequence,
                    bytes: bytes.len() as u64,
                };
                (header, bytes.as_slice())
            }
            Ok(Letter::Failed(reason)) => {
                let header = Header::plain(Kind::Failed, sequence, reason.len());
                (header, reason.as_bytes())
            }
            Err(RecvTimeoutError::Timeout) => {
                words = said();
                let header = Header::plain(Kind::Heartbeat, sequence, words.len());
                (header, words.as_slice())
            }
            Ok(Letter::Bye) | Err(RecvTimeoutError::Disconnected) => {
                let header = Header::plain(Kind::Bye, sequence, 0);
                write_frame(&mut stream, &header, &[])?;
                stream.flush()?;
                return stream.shutdown(Shutdown::Write);
            }
        };
        write_frame(&mut stream, &header, bytes)?;
        sequence += 1;
        if header.kind == Kind::Failed {
            stream.flush()?;
            return stream.shutdown(Shutdown::Write);
        }
    }
}

/// Puts what arrives into the mailbox, until the other side ends.
fn read_all(rank: usize, mut stream: TcpStream, shared: &Shared) {
    let mailbox = &shared.mailbox;
    let mut sequence = 1;
    loop {
        match read_frame(&mut stream, sequence) {
            Ok((header, bytes)) => match header.kind {
                Kind::Tensor => {
                    let letter = (header.dtype, bytes);
                    went_on(&shared.heard, rank);
                    mailbox.put(rank, header.tag, letter);
                }
                Kind::Heartbeat => hear(&shared.heard, rank, Said::decode(&bytes)),
                Kind::Bye => {
                    hear(&shared.heard, rank, None);
                    return mailbox.end(rank, format!("rank {rank} has ended"));
                }
                Kind::Failed => {
                    return mailbox.fail(String::from_utf8_lossy(&bytes).into_owned());
                }
                Kind::Hello | Kind::Welcome | Kind::Refused => {
                    return mailbox.fail(shared.lost(rank, "it sent a greeting amid the run"));
                }
            },
            Err(frame::FrameError::Silent) => {
                let seconds = shared.deadline.as_secs_f32();
                let reason = format!("nothing was heard of it for {seconds} s");
                return mailbox.fail(shared.lost(rank, &reason));
            }
            Err(error) => return mailbox.fail(shared.lost(rank, &error.to_string())),
        }
        sequence += 1;
    }
}

/// Hears of a failure while the program may be waiting for something else.
#[derive(Debug)]
pub struct Watch(Arc<Received>);

impl Watch {
    /// Waits until the run cannot go on, and tells why; `None` once this rank has ended in order.
    pub fn wait(&self) -> Option<String> {
        self.0.wait_for_failure()
    }
}

impl Tcp {
    /// Why the run cannot go on, if so.
    pub fn failure(&self) -> Option<String> {
        self.shared.mailbox.failure()
    }

    /// What waits for a failure beside the program.
    pub fn watch(&self) -> Watch {
        Watch(self.shared.mailbox.clone())
    }

    /// What this rank's main thread says of itself; the others hear it.
    pub fn activity(&self) -> &Activity {
        &self.shared.activity
    }

    /// From now on this rank says that it hangs, to all, when neither its main thread nor its device
    /// moves.
    ///
    /// # Errors
    /// If there can be no thread that looks.
    pub fn watch_over(&self, device: DeviceSigns) -> Result<(), CommError> {
        self.activity().mark_with(device.mark);
        let answers = Answers::default();
        let watched = Watched {
            rank: self.rank,
            activity: self.shared.activity.clone(),
            mailbox: self.shared.mailbox.clone(),
            heard: self.shared.heard.clone(),
            device: answers.clone(),
            queues: self
                .peers
                .iter()
                .flatten()
                .map(|p| p.queue.clone())
                .collect(),
        };
        let (deadline, mailbox) = (self.shared.deadline, self.shared.mailbox.clone());
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let between = hang::between(deadline);
        let asks = thread("device").spawn(move || answers.ask(device, &mailbox, between));
        let watches = thread("watch").spawn(move || watched.watch(deadline));
        let failed = |error| CommError::Start(format!("cannot start a thread: {error}"));
        asks.and(watches).map(drop).map_err(failed)
    }

    /// Tells all others that this rank ends because of `reason`. Where another's failure is the
    /// cause, they hear of that one.
    pub fn fail(&self, reason: &str) {
        let reason = match self.failure() {
            Some(cause) => cause,
            None => format!("rank {} failed: {reason}", self.rank),
        };
        self.part(|| Letter::failed(&reason));
        // Whatever of this process still waits ends too.
        self.shared.mailbox.fail(reason);
    }

    /// Sends everyone a last letter and waits until it is on its way.
    fn part(&self, last: impl Fn() -> Letter) {
        for peer in self.peers.iter().flatten() {
            // A writer that is gone has told of its connection's end.
            let _gone = peer.queue.send(last());
        }
        for peer in self.peers.iter().flatten() {
            let mut writer = peer.writer.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(writer) = writer.take() {
                let _panicked = writer.join();
            }
        }
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The panic's own words are on this rank's stderr.
            return self.fail("it panicked");
        }
        self.shared.mailbox.close();
        // Who ends because of another's failure passes that on: it may come before the other's own word.
        match self.failure() {
            Some(cause) => self.part(|| Letter::failed(&cause)),
            None => self.part(|| Letter::Bye),
        }
    }
}

impl Transport for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn next_group(&self) -> &AtomicU32 {
        &self.next_group
    }

    fn send(&self, to: &[usize], tag: Tag, tensor: Tensor<1>) -> Result<(), String> {
        if let Some(reason) = self.failure() {
            return Err(reason);
        }
        let (dtype, bytes) = wire::to_bytes(tensor)?;
        if bytes.len() as u64 > frame::MAX_BYTES {
            return Err(format!("a tensor of {} bytes is too long", bytes.len()));
        }
        let bytes = Arc::new(bytes);
        for &to in to {
            match &self.peers[to] {
                None => {
                    let letter = (dtype, bytes.to_vec());
                    self.shared.mailbox.put(to, tag, letter);
                }
                Some(peer) => {
                    let letter = Letter::Tensor {
                        tag,
                        dtype,
                        bytes: bytes.clone(),
                    };
                    let sent = peer.queue.send(letter);
                    sent.map_err(|_| format!("rank {to} takes nothing any more"))?;
                }
            }
        }
        Ok(())
    }

    fn receive(
        &self,
        from: usize,
        tag: Tag,
        device: &Device,
    ) -> Result<(Operation, Tensor<1>), String> {
        let waits = self.shared.activity.wait();
        let (operation, (dtype, bytes)) = self.shared.mailbox.take(from, tag)?;
        drop(waits);
        Ok((operation, wire::from_bytes(dtype, &bytes, device)))
    }
}
