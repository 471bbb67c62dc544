//! `ttt train`, `ttt plan`, `ttt generate` and `ttt eval`.

use std::io::{Write, stdout};

use ttt_train::config::Config;
use ttt_train::generate::{Generation, Sampling};
use ttt_train::human::grouped;
use ttt_train::open::Opened;
use ttt_train::plan::Plan;

use crate::args::{EvalArgs, GenerateArgs, PlanArgs, TrainArgs};

pub fn train(args: &TrainArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config.config, &args.config.sets)?;
    Ok(ttt_train::run::train(&config, &args.resume)?)
}

pub fn plan(args: &PlanArgs) -> anyhow::Result<()> {
    let config = Config::load(&args.config.config, &args.config.sets)?;
    println!("{}", Plan::new(&config));
    Ok(())
}

pub fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    let mut opened = Opened::new(&args.checkpoint, args.device.map(Into::into))?;
    let decoder = opened.decoder()?;
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    for (i, prompt) in args.prompts.iter().enumerate() {
        // Each prompt draws from a stream of its own, so its text does not depend on the others.
        let mut generation =
            Generation::start(&decoder, &opened.tokenizer, prompt, sampling, i as u64)?;
        let mut text = opened.tokenizer.decode_stream();
        show(if i > 0 { "\n" } else { "" })?;
        show(prompt)?;
        for _ in 0..args.max_tokens {
            let Some(id) = generation.next_token()? else {
                break;
            };
            if let Some(piece) = text.push(id)? {
                show(&piece)?;
            }
        }
        show(&text.finish()?)?;
        show("\n")?;
    }
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
