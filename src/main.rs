//! The command line of `ttt`: pretrain, resume, evaluate and sample In-Place TTT language models.

mod args;
mod data;
mod gpu;
mod logging;
mod model;
mod ranks;

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command, DataCommand};

fn main() -> ExitCode {
    quiet_broken_pipe();
    if let Err(error) = with_libraries() {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    let args = Args::parse();
    match logging::start().and_then(|()| run(args.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::from(BROKEN_PIPE),
        Err(error) => {
            let text = with_causes(error.as_ref());
            if let Some(line) = model::told_by_rank(&error, &text) {
                eprintln!("error: {line}");
            }
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Train(args) => model::train(&args),
        Command::Launch(args) => ranks::launch(&args),
        Command::Plan(args) => model::plan(&args),
        Command::Generate(args) => model::generate(&args),
        Command::Export(args) => model::export(&args),
        Command::Import(args) => model::import(&args),
        Command::Eval(args) => model::eval(&args),
        Command::Data(DataCommand::Build(args)) => data::build(&args),
        Command::Doctor(args) if args.ranks => ranks::check(&args),
        Command::Doctor(_) => gpu::doctor(),
        Command::Bench(args) => gpu::bench(&args),
        Command::Data(DataCommand::Tokenizer(args)) => data::tokenizer(&args),
        Command::Data(DataCommand::Inspect(args)) => data::inspect(&args),
    }
}

/// Starts this program again in its own place if `TTT_CUDA_LIBS` names folders that the loader does not
/// look into yet: it reads its path when a process starts, and never after.
fn with_libraries() -> Result<(), String> {
    use ttt_kernels::libraries::{APPLIED, Environment, FOLDERS, LOADER, cache_folder, find};
    if !cfg!(feature = "cuda") {
        return Ok(());
    }
    let [folders, applied, loader] = [FOLDERS, APPLIED, LOADER].map(std::env::var_os);
    let environment = Environment {
        folders: folders.as_deref(),
        applied: applied.as_deref(),
        loader: loader.as_deref(),
    };
    let links = cache_folder().map(|folder| folder.join("links"));
    let Some(path) = find(environment, links.as_deref())? else {
        return Ok(());
    };
    let program = std::env::current_exe().map_err(|error| {
        format!("{FOLDERS}: cannot start again, where this program lies is unknown: {error}")
    })?;
    let mut again = std::process::Command::new(&program);
    again
        .args(std::env::args_os().skip(1))
        .env(LOADER, path)
        .env(APPLIED, folders.unwrap_or_default());
    // Returns only if it fails.
    let error = std::os::unix::process::CommandExt::exec(&mut again);
    Err(format!(
        "{FOLDERS}: cannot start {} again: {error}",
        program.display()
    ))
}

/// The error on one line, followed by those of its causes that it does not tell itself.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text += &format!("\n  caused by: {message}");
        }
        cause = error.source();
    }
    text
}

/// The exit code with which a shell reports SIGPIPE.
const BROKEN_PIPE: u8 = 141;

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// `ttt plan ... | head` ends without a word: Rust's `println!` panics when nobody reads any more.
fn quiet_broken_pipe() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let message = info.payload_as_str().unwrap_or_default();
        if message.starts_with("failed printing to std") && message.contains("Broken pipe") {
            std::process::exit(BROKEN_PIPE.into());
        }
        default(info);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let io = std::io::Error::other("disk full");
        let told = anyhow::Error::new(io).context("cannot write a: disk full");
        assert_eq!(with_causes(told.as_ref()), "cannot write a: disk full");
        let untold =
            anyhow::Error::new(std::io::Error::other("disk full")).context("cannot write a");
        assert_eq!(
            with_causes(untold.as_ref()),
            "cannot write a\n  caused by: disk full"
        );
    }
}
