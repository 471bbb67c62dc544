//! `ttt data`.

use std::path::Path;
use std::sync::Arc;

use ttt_data::{
    BadRecords, BuildConfig, Dataset, Manifest, Progress, SourceSpec, Split, train_tokenizer,
    verify,
};
use ttt_train::config::Config;
use ttt_train::data::build_recipe;
use ttt_train::human::grouped;

use crate::args::{BuildArgs, InputArgs, InspectArgs, TokenizerArgs};

pub fn build(args: &BuildArgs) -> anyhow::Result<()> {
    let mut recipe = match (&args.input.config, &args.out, &args.tokenizer) {
        (None, Some(out), Some(tokenizer)) => BuildConfig {
            validation_fraction: args.validation_fraction,
            shard_tokens: args.shard_tokens,
            ..BuildConfig::new(sources(&args.input, &args.name)?, out, tokenizer)
        },
        (Some(config), ..) => build_recipe(&Config::load(config, &args.input.sets)?)?,
        (None, ..) => anyhow::bail!("give --out and --tokenizer, or --config"),
    };
    if args.skip_bad_records {
        recipe.bad_records = BadRecords::Skip;
    }
    recipe.offline |= args.offline;
    recipe.threads = args.threads;
    let manifest = ttt_data::build(&recipe, Progress::Auto)?;
    print_manifest(&recipe.out, &manifest);
    Ok(())
}

pub fn tokenizer(args: &TokenizerArgs) -> anyhow::Result<()> {
    let trained = train_tokenizer(&sources(&args.input, "text")?, args.vocab_size, &args.out)?;
    println!(
        "{}: {} tokens, trained on {} documents, {} bytes",
        trained.path.display(),
        grouped(trained.vocab_size as u64),
        grouped(trained.documents),
        grouped(trained.text_bytes)
    );
    Ok(())
}

fn sources(args: &InputArgs, name: &str) -> anyhow::Result<Vec<SourceSpec>> {
    if let Some(config) = &args.config {
        return Ok(Config::load(config, &args.sets)?.data.sources);
    }
    let mut source = SourceSpec::new(name, &args.inputs);
    source.text_key.clone_from(&args.text_key);
    source.document = args.document.map(Into::into);
    Ok(vec![source])
}

pub fn inspect(args: &InspectArgs) -> anyhow::Result<()> {
    let dataset = Arc::new(Dataset::open(&args.dir, Split::Train)?);
    print_manifest(&args.dir, dataset.manifest());
    if args.verify {
        let bytes = verify(&args.dir)?;
        println!("\n{} bytes are as the manifest says", grouped(bytes));
    }
    if args.rows > 0 {
        let (tokenizer, rows) = (dataset.tokenizer()?, dataset.sequential(args.tokens)?);
        for index in 0..args.rows.min(rows.len()) {
            let text = tokenizer.decode(&rows.row(index)?.input_ids)?;
            println!("\nrow {index}\n{text}");
        }
    }
    Ok(())
}

fn print_manifest(dir: &Path, manifest: &Manifest) {
    println!("{}", dir.display());
    println!(
        "vocabulary {}, {} shards",
        grouped(manifest.vocab_size),
        manifest.dtype.name()
    );
    println!(
        "\n{:<20} {:>8} {:<10} {:>16} {:>12} {:>16} {:>7}",
        "source", "weight", "split", "tokens", "documents", "bytes of text", "shards"
    );
    for source in &manifest.sources {
        for split in Split::ALL {
            let info = source.split(split);
            println!(
                "{:<20} {:>8} {:<10} {:>16} {:>12} {:>16} {:>7}",
                source.name,
                source.weight,
                split.name(),
                grouped(info.tokens),
                grouped(info.documents),
                grouped(info.text_bytes),
                info.shards.len()
            );
        }
    }
}
