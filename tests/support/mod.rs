//! Running the binary on a tiny model. Each test file uses what it needs of this.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A folder with a tiny configuration: two layers, both kinds, documents shorter than a row.
pub struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    /// A new folder whose configuration trains `steps` steps.
    pub fn new(steps: u64) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let repository = env!("CARGO_MANIFEST_DIR");
        let config = format!(
            r#"
[run]
dir = "run"
seed = 3

[model]
model_type = "qwen3"
vocab_size = 300
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
sliding_window = 16
tie_word_embeddings = true

[model.ttt]
enabled = true
layers = [1]
chunk = 16
lr = 0.3

[data]
path = "shards"
tokenizer_vocab_size = 300
validation_fraction = 0.1

[[data.sources]]
name = "persuasion"
inputs = ["{repository}/data/austen/persuasion"]

[train]
steps = {steps}
sequence_length = 64
batch_tokens = 256
micro_batch_rows = 2

[optimizer]
lr = 3e-3
warmup_steps = 5

[checkpoint]
every = 10
keep = 3

[eval]
every = 50
rows = 4
"#
        );
        std::fs::write(dir.path().join("config.toml"), config).expect("write the configuration");
        Self { dir }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `ttt ARGS` in the folder.
    pub fn ttt(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ttt"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// `ttt train config.toml ARGS`, to its end.
    pub fn train(&self, args: &[&str]) -> Output {
        let all: Vec<&str> = ["train", "config.toml"]
            .iter()
            .chain(args)
            .copied()
            .collect();
        self.ttt(&all).output().expect("run ttt")
    }

    /// [`Run::train`], which must succeed.
    pub fn train_well(&self, args: &[&str]) {
        let output = self.train(args);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    /// `ttt launch --nproc COUNT -- train config.toml ARGS`.
    pub fn launch(&self, count: usize, args: &[&str]) -> Command {
        let count = count.to_string();
        let mut all = vec!["launch", "--nproc", &count, "--", "train", "config.toml"];
        all.extend(args);
        self.ttt(&all)
    }

    /// Starts training and waits until step `step` is in the metrics.
    pub fn train_until(&self, step: usize) -> Child {
        let mut child = self
            .ttt(&["train", "config.toml"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("run ttt");
        self.wait_until(step, &mut child);
        child
    }

    /// Waits until `child` has brought step `step` into the metrics.
    pub fn wait_until(&self, step: usize, child: &mut Child) {
        let begun = Instant::now();
        while self.steps().len() < step {
            assert!(begun.elapsed() < Duration::from_secs(120), "training hangs");
            assert!(
                child.try_wait().expect("ask for the process").is_none(),
                "training ended before step {step}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The step lines of `metrics.jsonl`, without what depends on the clock or the machine.
    pub fn steps(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("run/metrics.jsonl")).unwrap_or_default();
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        let steps = lines.filter(|line: &Value| line.get("loss").is_some());
        steps
            .map(|mut line| {
                let map = line.as_object_mut().expect("a line is an object");
                map.retain(|key, _| {
                    ![
                        "tokens_per_s",
                        "elapsed_s",
                        "memory_gib",
                        "mfu",
                        "mfu_with_ttt",
                    ]
                    .contains(&key.as_str())
                });
                line
            })
            .collect()
    }

    /// The last validation loss of `metrics.jsonl`.
    pub fn evaluation(&self) -> f64 {
        let text = std::fs::read_to_string(self.path("run/metrics.jsonl")).expect("metrics");
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut losses = lines.filter_map(|line| line.get("validation_loss")?.as_f64());
        losses.next_back().expect("an evaluation")
    }

    /// The newest checkpoint.
    pub fn newest(&self) -> PathBuf {
        let folder = self.path("run/checkpoints");
        let entries = std::fs::read_dir(&folder).expect("checkpoints");
        let mut found: Vec<PathBuf> = entries
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("step-"))
            })
            .collect();
        found.sort();
        found.pop().expect("a checkpoint")
    }
}

/// What a command printed to stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The weights and moments of a checkpoint, byte for byte.
pub fn state(checkpoint: &Path) -> Vec<Vec<u8>> {
    ["model.safetensors", "optimizer.safetensors"]
        .iter()
        .map(|name| std::fs::read(checkpoint.join(name)).expect("a file of the checkpoint"))
        .collect()
}

/// Sends a signal.
pub fn signal(child: &Child, name: &str) {
    signal_id(child.id(), name);
}

/// Sends a signal to a process of this number.
pub fn signal_id(id: u32, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &id.to_string()])
        .status()
        .expect("run kill");
    assert!(status.success());
}
