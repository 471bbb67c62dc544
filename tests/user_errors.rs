//! Every mistake of a user ends with one sentence and exit code 2.

mod support;

use support::{Run, stderr};

/// Runs and expects exit code 2 and an error that holds every word.
fn refused(run: &Run, args: &[&str], words: &[&str]) {
    let output = run.ttt(args).output().expect("run ttt");
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: no {word:?} in: {text}");
    }
    assert!(
        !text.contains("panicked") && !text.contains("backtrace"),
        "{text}"
    );
}

#[test]
fn mistakes_in_the_configuration() {
    let run = Run::new(8);
    let set = |assignment| ["train", "config.toml", "--set", assignment];
    refused(&run, &["train", "nowhere.toml"], &["nowhere.toml"]);
    refused(&run, &set("train.stepz=1"), &["stepz", "steps"]);
    refused(&run, &set("model.hidden_size=33"), &["head_dim"]);
    refused(&run, &set("model.ttt.layers=[2]"), &["layer 2", "2 layers"]);
    refused(&run, &set("train.batch_tokens=100"), &["batch_tokens"]);
    refused(&run, &set("train.steps=many"), &["train.steps", "many"]);
    refused(&run, &set("model.vocab_size=200"), &["vocab_size"]);
    if !cfg!(feature = "cuda") {
        refused(&run, &set("run.device=cuda"), &["cuda", "--features cuda"]);
    }
    refused(&run, &set("data.sources=[]"), &["shards"]);
}

#[test]
fn checkpoints_that_cannot_be_used() {
    let run = Run::new(10);
    run.train_well(&[]);
    let resume = |set| {
        [
            "train",
            "config.toml",
            "--set",
            "train.steps=20",
            "--set",
            set,
        ]
    };
    refused(
        &run,
        &resume("model.rms_norm_eps=1e-5"),
        &["rms_norm_eps", "--resume never"],
    );
    refused(&run, &resume("run.seed=9"), &["batches"]);
    refused(
        &run,
        &["train", "config.toml", "--resume", "never"],
        &["in the way"],
    );
    refused(&run, &["eval", "nowhere"], &["nowhere"]);

    // A truncated and a changed file are both noticed.
    let newest = run.newest();
    let weights = newest.join("model.safetensors");
    let whole = std::fs::read(&weights).expect("read");
    std::fs::write(&weights, &whole[..whole.len() - 1]).expect("write");
    refused(
        &run,
        &resume("train.steps=20"),
        &["model.safetensors", "damaged"],
    );
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    std::fs::write(&weights, changed).expect("write");
    refused(
        &run,
        &resume("train.steps=20"),
        &["model.safetensors", "damaged"],
    );
    std::fs::remove_file(&weights).expect("remove");
    refused(&run, &resume("train.steps=20"), &["model.safetensors"]);
}

#[test]
fn shards_that_cannot_be_used() {
    let run = Run::new(8);
    run.train_well(&[]);
    std::fs::remove_dir_all(run.path("run/checkpoints")).expect("remove");
    let shards = run.path("shards/shards/persuasion");
    let entry = std::fs::read_dir(&shards)
        .expect("shards")
        .next()
        .expect("a shard");
    let shard = entry.expect("an entry").path();
    let bytes = std::fs::read(&shard).expect("read");
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).expect("write");
    let name = shard
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    refused(
        &run,
        &["train", "config.toml", "--set", "data.sources=[]"],
        &[&name],
    );
}
