//! What `ttt launch` and `ttt doctor --ranks` take.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::args::{DeviceArg, at_least_one};

#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Check what ranks exchange instead, against values computed on the host, and how fast: behind
    /// `ttt launch --nproc N --`.
    #[arg(long)]
    pub ranks: bool,
    /// What the ranks compute on; by default the GPUs.
    #[arg(long, requires = "ranks", value_enum, default_value_t = DeviceArg::Cuda)]
    pub device: DeviceArg,
    /// The largest tensor of a rank, in MiB.
    #[arg(long, requires = "ranks", value_name = "MIB", default_value_t = 64, value_parser = at_least_one)]
    pub size: usize,
    /// Instead, time the ways in which ranks that share the rows of this configuration exchange fast
    /// weights, keys and heads: what to choose for parallel.context_states and context_attention.
    #[arg(long, requires = "ranks", value_name = "CONFIG")]
    pub context: Option<PathBuf>,
    /// Change a setting of that configuration: section.key=value. Repeatable.
    #[arg(long = "set", requires = "context", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub struct LaunchArgs {
    /// Ranks on this host; by default one for each GPU. The CPU's ranks share its cores.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub nproc: Option<usize>,
    /// Hosts, each of which runs this command with the same number of ranks.
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = at_least_one)]
    pub nnodes: usize,
    /// This host's number, from 0.
    #[arg(long, value_name = "R", default_value_t = 0, requires = "rendezvous")]
    pub node_rank: usize,
    /// Where the ranks meet: a name of host 0 that all hosts know, and a port that is free there.
    #[arg(long, value_name = "HOST:PORT", value_parser = rendezvous)]
    pub rendezvous: Option<(String, u16)>,
    /// What the ranks do: `train` or `doctor` with its arguments, behind `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

fn rendezvous(text: &str) -> Result<(String, u16), String> {
    let parts = text.rsplit_once(':');
    let parts = parts.and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    match parts {
        // [::1]:29500 is how an IPv6 address is written with a port.
        Some((host, port)) if !host.is_empty() && port > 0 => {
            Ok((host.trim_matches(['[', ']']).into(), port))
        }
        _ => Err("expected HOST:PORT".into()),
    }
}
