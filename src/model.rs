//! `ttt train`, `ttt plan`, `ttt generate`, `ttt eval`, `ttt export` and `ttt import`.

use std::io::{Write, stdout};

use ttt_parallel::{CommError, Place};
use ttt_train::TrainError;
use ttt_train::checkpoint;
use ttt_train::config::Config;
use ttt_train::generate::chat::{ChatTemplate, Message};
use ttt_train::generate::stop::StopStrings;
use ttt_train::generate::{Generation, Sampling};
use ttt_train::human::grouped;
use ttt_train::interop::{ExportOptions, export as export_checkpoint, import as import_folder};
use ttt_train::open::Opened;
use ttt_train::plan::{Gpus, Plan, propose};

use crate::logging;
use crate::ranks::end_with_launcher;

use crate::args::{EvalArgs, ExportArgs, GenerateArgs, ImportArgs, PlanArgs, TrainArgs};

pub fn train(args: &TrainArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config.config, &args.config.sets)?;
    let place = Place::of_process()?;
    end_with_launcher()?;
    logging::of_rank(&place, &config.run.dir)?;
    let trained = ttt_train::run::train(&config, &args.resume, &place);
    trained.map_err(|error| RankError { place, error }.into())
}

/// An error of one rank of several.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
struct RankError {
    place: Place,
    #[source]
    error: TrainError,
}

/// What stderr is to hear of an error: of several ranks only one repeats that another is lost. The
/// rank's own log has it in any case.
pub fn told_by_rank(error: &anyhow::Error, text: &str) -> Option<String> {
    let Some(RankError { place, error }) = error.downcast_ref() else {
        return Some(text.into());
    };
    let (rank, size) = (place.rank, place.size);
    if rank > 0 {
        tracing::error!("{text}");
    }
    let own = match error {
        TrainError::OtherRank { .. } => false,
        TrainError::Comm(CommError::Failed { reason, .. }) => {
            // The first who is not the lost one itself.
            rank == 1 && reason.starts_with("rank 0 is lost")
        }
        _ => true,
    };
    match (rank, own) {
        (0, _) => Some(text.into()),
        (_, true) if text.starts_with("rank ") => Some(text.into()),
        (_, true) => Some(format!("rank {rank} of {size}: {text}")),
        (_, false) => None,
    }
}

pub fn plan(args: &PlanArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config.config, &args.config.sets)?;
    match args.gpus {
        None => println!("{}", Plan::new(&config)),
        Some(count) => {
            let memory_bytes = args.memory as f64;
            let gpus = Gpus {
                count,
                memory_bytes,
            };
            let given = match config.parallel.asks() {
                true => Some(config.parallel.layout(count)?),
                false => None,
            };
            println!("{}", propose(&config, gpus, given)?);
        }
    }
    Ok(())
}

pub fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    let mut opened = Opened::new(&args.checkpoint, args.device.map(Into::into))?;
    if args.clip.is_some() {
        opened.config.model.ttt.clip = args.clip;
    }
    let template = match args.chat {
        true => Some(ChatTemplate::load(&opened.path)?),
        false => None,
    };
    let ends = opened.end_ids()?;
    let decoder = opened.decoder()?;
    let tokenizer = &opened.tokenizer;
    let sampling = Sampling {
        temperature: if args.greedy { 0.0 } else { args.temperature },
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    for (i, prompt) in args.prompts.iter().enumerate() {
        show(if i > 0 { "\n" } else { "" })?;
        let ids = match &template {
            Some(template) => {
                let messages = conversation(args.system.as_deref(), prompt);
                tokenizer.encode_special(&template.render(&messages)?)?
            }
            None => {
                show(prompt)?;
                let ids = tokenizer.encode_prompt(prompt)?;
                // Nothing to read is read as the end of an earlier document.
                let empty = ids.is_empty().then(|| tokenizer.eos_id());
                ids.into_iter().chain(empty).collect()
            }
        };
        // Each prompt draws from a stream of its own, so its text does not depend on the others.
        let mut generation = Generation::start_ids(&decoder, &ids, &ends, sampling, i as u64)?;
        let mut text = tokenizer.decode_stream();
        let mut stop = StopStrings::new(&args.stop);
        for _ in 0..args.max_tokens {
            let Some(id) = generation.next_token()? else {
                break;
            };
            if let Some(piece) = text.push(id)? {
                show(&stop.push(&piece))?;
            }
            if stop.stopped() {
                break;
            }
        }
        show(&stop.push(&text.finish()?))?;
        show(&stop.finish())?;
        show("\n")?;
    }
    Ok(())
}

/// What a user says, behind what the system says.
fn conversation(system: Option<&str>, user: &str) -> Vec<Message> {
    let message = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    let system = system.map(|text| message("system", text));
    system.into_iter().chain([message("user", user)]).collect()
}

pub fn export(args: &ExportArgs) -> anyhow::Result<()> {
    let path = match args.checkpoint.join("manifest.json").is_file() {
        true => args.checkpoint.clone(),
        // An error about a folder that is neither names what was given.
        false => checkpoint::list(&args.checkpoint)?
            .pop()
            .unwrap_or_else(|| args.checkpoint.clone()),
    };
    let options = ExportOptions {
        dtype: args.dtype.into(),
        ..ExportOptions::default()
    };
    let exported = export_checkpoint(&path, &args.out, &options)?;
    let bytes: u64 = exported.files.iter().map(|file| file.bytes).sum();
    println!(
        "{}: {} bytes of weights from {}",
        args.out.display(),
        grouped(bytes),
        path.display()
    );
    for note in &exported.notes {
        println!("note: {note}");
    }
    Ok(())
}

pub fn import(args: &ImportArgs) -> anyhow::Result<()> {
    import_folder(&args.dir, &args.out)?;
    println!(
        "{}: a checkpoint of {}",
        args.out.display(),
        args.dir.display()
    );
    Ok(())
}

/// Prints text at once, so that it is seen while it is being made.
fn show(text: &str) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

pub fn eval(args: &EvalArgs) -> anyhow::Result<()> {
    let mut opened = Opened::new(&args.checkpoint, args.device.map(Into::into))?;
    let result = opened.evaluate(args.data.as_deref(), args.rows, args.sequence_length)?;
    println!(
        "validation loss {:.4} nats per token, perplexity {:.3}, over {} tokens",
        result.loss,
        result.loss.exp(),
        grouped(result.tokens)
    );
    if args.by_position {
        println!(
            "\n{:>8} {:>8} {:>10} {:>14}",
            "from", "to", "loss", "tokens"
        );
        for part in &result.by_position {
            let tokens = grouped(part.tokens);
            println!(
                "{:>8} {:>8} {:>10.4} {tokens:>14}",
                part.from, part.to, part.loss
            );
        }
    }
    Ok(())
}
