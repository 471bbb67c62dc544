//! Log lines on stderr, above the live progress line; `RUST_LOG` chooses which.

use std::io::{self, IsTerminal, Write};

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use ttt_train::progress::above_live_line;

/// Where `RUST_LOG` says nothing: our own notes, and others' warnings.
const DEFAULT: &str = "warn,ttt=info";

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

/// stderr with the live line out of the way.
struct Above;

impl Write for Above {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        above_live_line(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
