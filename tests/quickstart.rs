//! The README's training command, cut short, learns more than how often tokens occur; so does the
//! same model without fast weights, the control for everything that is said about them.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use ttt_data::{Dataset, Split};

/// `configs/quickstart.toml` cut to 110 steps in `dir`.
fn train(dir: &Path, more: &[&str]) -> Output {
    start(&[], dir, &[&["--set", "train.steps=110"], more].concat())
}

/// `configs/quickstart.toml` in `dir`, behind the words `before`.
fn start(before: &[&str], dir: &Path, more: &[&str]) -> Output {
    let set = |key: &str, name: &str| format!("{key}={}", dir.join(name).display());
    Command::new(env!("CARGO_BIN_EXE_ttt"))
        .args(before)
        .args(["train", "configs/quickstart.toml"])
        .args([
            "--set",
            &set("run.dir", "run"),
            "--set",
            &set("data.path", "shards"),
        ])
        .args(more)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("run ttt")
}

/// The last validation loss of a run.
fn validation_loss(dir: &Path) -> f64 {
    let text = std::fs::read_to_string(dir.join("run/metrics.jsonl")).expect("metrics");
    let mut losses = text.lines().filter_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        line.get("validation_loss")?.as_f64()
    });
    losses.next_back().expect("an evaluation at the end")
}

#[test]
fn quickstart_beats_token_frequencies_with_and_without_fast_weights() {
    let runs = [vec![], vec!["--set", "model.ttt.enabled=false"]];
    std::thread::scope(|scope| {
        let threads = runs.map(|more| {
            scope.spawn(move || {
                let dir = tempfile::tempdir().expect("a temporary folder");
                let output = train(dir.path(), &more);
                assert!(output.status.success(), "{}", support::stderr(&output));
                let shards = Dataset::open(&dir.path().join("shards"), Split::Validation);
                let frequencies = shards.expect("shards").unigram_entropy().expect("tokens");
                let loss = validation_loss(dir.path());
                // Half of the run; the whole of it ends 1.1 nats below what frequencies give.
                assert!(
                    loss < frequencies - 0.4,
                    "{more:?}: {loss} against {frequencies}"
                );
                let printed = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(printed.contains("sample: It was a truth"), "{printed}");
            })
        });
        for thread in threads {
            thread.join().expect("both runs hold");
        }
    });
}

/// The losses of a run, step by step.
fn losses(dir: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(dir.join("run/metrics.jsonl")).expect("metrics");
    let lines = text.lines().filter_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        line.get("loss")?.as_f64()
    });
    lines.collect()
}

/// Two processes through the launcher train it to the losses of one.
#[test]
fn two_processes_train_it_like_one() {
    let brief = ["--set", "train.steps=12", "--set", "eval.every=0"];
    let run = |before: &[&str]| {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let output = start(before, dir.path(), &brief);
        assert!(output.status.success(), "{}", support::stderr(&output));
        losses(dir.path())
    };
    let (one, two) = (run(&[]), run(&["launch", "--nproc", "2", "--"]));
    assert_eq!((one.len(), two.len()), (12, 12));
    for (step, (one, two)) in one.iter().zip(&two).enumerate() {
        // Sums in another order, which AdamW turns into a few parts in 1e6 of the weights.
        let error = (one - two).abs() / one;
        assert!(error < 2e-5, "step {step}: {two} instead of {one}");
    }
}
