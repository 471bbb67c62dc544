//! Log lines on stderr, above the live progress line, or in a rank's own file; `RUST_LOG` chooses which.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use ttt_parallel::Place;
use ttt_train::progress::above_live_line;

/// Where `RUST_LOG` says nothing: our own notes, and others' warnings, but for CubeCL's that two ranks have
/// measured the same GPU's speed, which is as it should be.
const DEFAULT: &str = "warn,cubecl_runtime::throughput=error,ttt=info";

/// Where lines go instead of stderr.
static RANK_FILE: Mutex<Option<File>> = Mutex::new(None);

/// Begins to log.
pub fn start() -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(asked) if !asked.is_empty() => EnvFilter::try_new(&asked).with_context(|| {
            format!("RUST_LOG={asked}: expected something like info or ttt=debug")
        })?,
        _ => EnvFilter::new(DEFAULT),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(|| Above)
        .init();
    Ok(())
}

/// Rank 0 speaks; the log lines of another rank go to `logs/rank-N.log` in `run_dir` from now on.
pub fn of_rank(place: &Place, run_dir: &Path) -> anyhow::Result<()> {
    if place.rank == 0 {
        return Ok(());
    }
    let dir = run_dir.join("logs");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join(format!("rank-{}.log", place.rank));
    // A resumed run goes on in the file, as it does in its metrics.
    let file = OpenOptions::new().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    *RANK_FILE.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    Ok(())
}

/// The rank's file, or stderr with the live line out of the way.
struct Above;

impl Write for Above {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = RANK_FILE.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *file {
            Some(file) => file.write(bytes),
            None => above_live_line(|| io::stderr().write(bytes)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
