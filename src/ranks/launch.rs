//! `ttt launch`: as many ranks of this program as asked for, as processes of this host.
//!
//! The ranks find each other through the environment (`RANK`, `WORLD_SIZE`, ..., as torchrun has it).
//! Here they are only watched: when one ends badly the others get a moment to say so themselves,
//! then are asked to end, then killed. A signal is passed on once to each, which saves and ends the
//! run; a second ends it at once.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{self, Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use ttt_train::config::{Config, DeviceKind};
use ttt_train::device::DEVICE_VARIABLE;

use super::args::LaunchArgs;
use crate::args::{Args, Command};

/// How long the other ranks may take to notice that one is gone.
const NOTICE: Duration = Duration::from_secs(3);
/// How long they may take to end once asked to.
const GRACE: Duration = Duration::from_secs(2);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Starts the ranks of this host and waits until all have ended.
///
/// # Errors
/// If they cannot start, or one ends badly: which, and how.
pub fn launch(args: &LaunchArgs) -> anyhow::Result<()> {
    // A mistake is told once and here, not by every rank.
    let words = [OsString::from("ttt")]
        .into_iter()
        .chain(args.command.clone());
    let config = match Args::try_parse_from(words) {
        Ok(Args {
            command: Command::Train(train),
        }) => Some(Config::load(&train.config.config, &train.config.sets)?),
        Ok(Args {
            command: Command::Doctor(_),
        }) => None,
        Ok(_) => bail!(
            "what several ranks do together is `train` or `doctor`: ttt launch --nproc 2 -- train CONFIG"
        ),
        Err(error) => error.exit(),
    };
    let on_cpu = config
        .as_ref()
        .is_some_and(|config| config.run.device == DeviceKind::Cpu);
    let here = match (args.nproc, on_cpu) {
        (Some(count), _) => count,
        (None, true) => bail!("how many ranks share a CPU is yours to say: give --nproc"),
        (None, false) => match ttt_kernels::doctor::gpu_count() {
            0 => bail!("there is no GPU to start a rank for: give --nproc"),
            count => count,
        },
    };
    let size = here * args.nnodes;
    if let Some(config) = config {
        let layout = config.parallel.layout(size)?;
        config.validate_rows(layout.replicate * layout.shard)?;
    }
    let (host, port, run) = match &args.rendezvous {
        Some((host, port)) => (host.clone(), *port, format!("launch {host}:{port}")),
        None if args.nnodes > 1 => {
            bail!(
                "--nnodes {} needs --rendezvous HOST:PORT, a place on node 0",
                args.nnodes
            )
        }
        None => ("127.0.0.1".into(), free_port()?, unique()),
    };
    if args.node_rank >= args.nnodes {
        bail!(
            "--node-rank {} is none of {} nodes, which count from 0",
            args.node_rank,
            args.nnodes
        );
    }

    let signals = Signals::install().context("cannot listen for signals")?;
    let mut ranks = Ranks(vec![]);
    for local in 0..here {
        let rank = args.node_rank * here + local;
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", size.to_string()),
            ("LOCAL_RANK", local.to_string()),
            ("LOCAL_WORLD_SIZE", here.to_string()),
            ("MASTER_ADDR", host.clone()),
            ("MASTER_PORT", port.to_string()),
            ("TTT_RUN_ID", run.clone()),
        ];
        let started = start(&args.command, &variables, here);
        // Those that have started are ended as `ranks` goes.
        let process = started.with_context(|| format!("cannot start rank {rank}"))?;
        ranks.0.push(Rank {
            rank,
            process,
            ended: None,
        });
    }
    ranks.watch(&signals)
}

/// A port of the loopback that nothing listens at.
fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no port is free on the loopback")?;
    Ok(listener.local_addr()?.port())
}

/// A name that no other run has.
fn unique() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let nanos = now.map_or(0, |since| since.as_nanos());
    format!("launch {} {nanos}", process::id())
}

fn start(command: &[OsString], variables: &[(&str, String)], here: usize) -> io::Result<Child> {
    let mut process = process::Command::new(std::env::current_exe()?);
    process.args(command).stdin(Stdio::null());
    // A terminal's Ctrl-C goes to this process alone, which passes it on once.
    process.process_group(0);
    // What another starter around this one says of its own processes.
    process.env_remove("TORCHELASTIC_USE_AGENT_STORE");
    process.envs(variables.iter().map(|(name, value)| (name, value)));
    process.env(PARENT_VARIABLE, process::id().to_string());
    let unless_set = |process: &mut process::Command, name: &str, value: &str| {
        if std::env::var_os(name).is_none() {
            process.env(name, value);
        }
    };
    // The ranks share the cores, or each would start a thread for every one.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / here).max(1).to_string();
    unless_set(&mut process, "RAYON_NUM_THREADS", &threads);
    if here > 1 && std::env::var_os(DEVICE_VARIABLE).is_some() {
        // NCCL refuses two ranks on one GPU, unless it takes them for ranks of different hosts.
        let rank = &variables[0].1;
        unless_set(&mut process, "NCCL_HOSTID", &format!("rank-{rank}"));
        unless_set(&mut process, "NCCL_SOCKET_IFNAME", "lo");
    }
    process.spawn()
}

/// Holds the launcher's process id, so that a rank ends with it.
const PARENT_VARIABLE: &str = "TTT_LAUNCHER";

/// In a rank that a launcher has started: asks for SIGTERM when the launcher is gone, killed perhaps,
/// so that no rank is left behind.
pub fn end_with_launcher() -> anyhow::Result<()> {
    let Some(launcher) = std::env::var(PARENT_VARIABLE).ok() else {
        return Ok(());
    };
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if parent.as_deref() != Some(&launcher) {
        // Started by something that the launcher started, or the launcher is gone already.
        return Ok(());
    }
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .context("cannot ask to end with the launcher")
}

/// Signals to this process, counted.
struct Signals {
    count: Arc<AtomicUsize>,
    last: Arc<AtomicUsize>,
}

impl Signals {
    fn install() -> io::Result<Self> {
        let (count, last) = (Arc::default(), Arc::default());
        let signals = Self { count, last };
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register_usize(signal, signals.last.clone(), signal as usize)?;
        }
        Ok(signals)
    }

    /// A signal that has come since the last call.
    fn next(&self) -> Option<Signal> {
        let number = self.last.swap(0, Ordering::Relaxed) as i32;
        let signal = match number {
            0 => return None,
            SIGINT => Signal::INT,
            _ => Signal::TERM,
        };
        self.count.fetch_add(1, Ordering::Relaxed);
        Some(signal)
    }
}

/// A process that was started.
struct Rank {
    rank: usize,
    process: Child,
    ended: Option<End>,
}

/// How a rank ended.
#[derive(Clone, Copy)]
struct End {
    status: ExitStatus,
    /// Whether it was asked to, because of another.
    asked: bool,
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}", self.rank)?;
        let Some(End { status, asked }) = self.ended else {
            return write!(f, " runs");
        };
        match (status.signal(), status.code()) {
            (Some(signal), _) if asked => write!(f, " did not end when asked to (signal {signal})"),
            (Some(signal), _) => {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("unknown");
                write!(f, " was ended by signal {signal} ({name})")
            }
            (None, Some(code)) => write!(f, " ended with exit code {code}"),
            (None, None) => write!(f, " ended ({status})"),
        }
    }
}

impl Rank {
    fn failed(&self) -> bool {
        self.ended.is_some_and(|end| !end.status.success())
    }

    fn signal(&self, signal: Signal) {
        if self.ended.is_none()
            && let Some(pid) = Pid::from_raw(self.process.id() as i32)
            && let Err(error) = kill_process(pid, signal)
        {
            tracing::debug!("rank {} takes no signal: {error}", self.rank);
        }
    }
}

/// The ranks of this host. None outlives this.
struct Ranks(Vec<Rank>);

impl Ranks {
    fn watch(&mut self, signals: &Signals) -> anyhow::Result<()> {
        // When the first failed, and what has been done about it.
        let mut failure: Option<Instant> = None;
        let mut asked: Option<Instant> = None;
        while self.0.iter().any(|rank| rank.ended.is_none()) {
            self.collect(asked.is_some())?;
            if let Some(signal) = signals.next() {
                self.signal(signal);
            }
            if failure.is_none() && self.0.iter().any(Rank::failed) {
                failure = Some(Instant::now());
            }
            let late = |since: Option<Instant>, limit| since.is_some_and(|t| t.elapsed() > limit);
            match asked {
                None if late(failure, NOTICE) => {
                    self.signal(Signal::TERM);
                    asked = Some(Instant::now());
                }
                Some(_) if late(asked, GRACE) => self.signal(Signal::KILL),
                _ => {}
            }
            std::thread::sleep(LOOK);
        }
        self.verdict()
    }

    /// Sees who has ended.
    fn collect(&mut self, asked: bool) -> anyhow::Result<()> {
        for rank in self.0.iter_mut().filter(|rank| rank.ended.is_none()) {
            let status = rank.process.try_wait();
            let status = status.with_context(|| format!("cannot watch rank {}", rank.rank))?;
            rank.ended = status.map(|status| End { status, asked });
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        for rank in &self.0 {
            rank.signal(signal);
        }
    }

    /// Which ranks ended badly, those first that did so by themselves and by a signal.
    fn verdict(&self) -> anyhow::Result<()> {
        let mut failed: Vec<&Rank> = self.0.iter().filter(|rank| rank.failed()).collect();
        failed.sort_by_key(|rank| {
            let end = rank.ended.expect("all have ended");
            (end.asked, end.status.signal().is_none(), rank.rank)
        });
        if failed.is_empty() {
            return Ok(());
        }
        let told = |rank: &&&Rank| rank.to_string();
        let few: Vec<_> = failed.iter().take(4).map(|rank| told(&rank)).collect();
        let more = match failed.len() - few.len() {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        bail!("{}{more}", few.join("; "))
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        for rank in self.0.iter_mut().filter(|rank| rank.ended.is_none()) {
            let _ended = rank.process.wait();
        }
    }
}
