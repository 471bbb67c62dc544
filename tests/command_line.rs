//! The binary as a user meets it when something is wrong: one sentence, exit code 2, no backtrace.

use std::process::{Command, Output, Stdio};

fn ttt(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ttt"));
    command
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("RUST_LOG")
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> Output {
    ttt(args).output().unwrap()
}

/// stderr of a command that a user error ends.
fn refused(args: &[&str]) -> String {
    let output = output(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert!(
        !stderr.contains("panicked") && !stderr.contains("backtrace"),
        "{stderr}"
    );
    stderr
}

#[test]
fn mistakes_are_told_in_one_line() {
    let quickstart = "configs/quickstart.toml";
    for (args, message) in [
        (
            vec!["plan", "configs/none.toml"],
            "cannot read the configuration configs/none.toml: No such file or directory (os error 2)",
        ),
        (
            vec!["plan", quickstart, "--set", "train.step=3"],
            "--set train.step=3: unknown key train.step; did you mean steps?",
        ),
        (
            vec!["plan", quickstart, "--gpus", "2"],
            "run.device: is \"cpu\", and GPUs were asked for: add --set run.device=cuda",
        ),
        (
            vec!["plan", "configs/14b.toml", "--gpus", "1"],
            "no layout fits into 1 x 80.0 GiB (76.1 of each usable): replicate 1, shard 1, context 1 with",
        ),
        (
            vec!["train", quickstart, "--set", "train.steps=ten"],
            "--set train.steps=ten: train.steps: expected a whole number, 0 or more, found string \"ten\"",
        ),
        (
            vec![
                "train",
                quickstart,
                "--set",
                "optimizer.warmup_steps=1000000",
            ],
            "--set optimizer.warmup_steps=1000000: optimizer.warmup_steps: 1000000 is more than all",
        ),
    ] {
        let stderr = refused(&args);
        assert!(stderr.starts_with(&format!("error: {message}")), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[test]
fn a_wrong_option_is_refused_by_name() {
    for (args, part) in [
        (
            vec!["generate", "x", "--prompt", "a", "--top-p", "1.5"],
            "--top-p",
        ),
        (
            vec!["generate", "x", "--prompt", "a", "--temperature=-1"],
            "--temperature",
        ),
        (vec!["generate", "x"], "--prompt"),
        (vec!["eval", "x", "--rows", "0"], "--rows"),
        (vec!["data", "build", "a.txt", "--out", "x"], "--tokenizer"),
        (vec!["data", "build", "a.txt", "--config", "x"], "--config"),
        (vec!["train"], "<CONFIG>"),
        (vec!["trian", "x"], "train"),
    ] {
        assert!(refused(&args).contains(part), "{args:?}");
    }
}

#[test]
fn what_is_not_there_is_named() {
    let empty = tempfile::tempdir().unwrap();
    let folder = empty.path().to_str().unwrap();
    assert!(refused(&["eval", folder]).contains("has no manifest.json"));
    assert!(refused(&["generate", "/nowhere", "--prompt", "a"]).contains("/nowhere"));
    assert!(refused(&["data", "inspect", folder]).contains(folder));
    let stderr = refused(&[
        "data",
        "tokenizer",
        "/nowhere.txt",
        "--vocab-size",
        "300",
        "--out",
        folder,
    ]);
    assert!(stderr.contains("/nowhere.txt"), "{stderr}");
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_gpu_is_asked_for_in_vain() {
    let dir = tempfile::tempdir().unwrap();
    let run = format!("run.dir={}", dir.path().join("run").display());
    let stderr = refused(&[
        "train",
        "configs/quickstart.toml",
        "--set",
        "run.device=cuda",
        "--set",
        &run,
    ]);
    assert!(stderr.contains("--features cuda"), "{stderr}");
    assert!(
        !dir.path().join("run/data").exists(),
        "refused before any work"
    );
}

#[test]
fn a_bad_log_filter_is_refused() {
    let output = ttt(&["plan", "configs/500m.toml"])
        .env("RUST_LOG", "ttt=loud")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr.starts_with("error: RUST_LOG=ttt=loud: expected something like"),
        "{stderr}"
    );
}

#[test]
fn the_largest_model_is_planned_in_no_time() {
    let begun = std::time::Instant::now();
    let output = output(&["plan", "configs/14b.toml"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(text.contains("TTT in layers 0 6 12 18 24 30 36"), "{text}");
    assert!(
        begun.elapsed().as_secs_f64() < 5.0,
        "planning allocates nothing"
    );
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = ttt(&["plan", "configs/14b.toml"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    // Whether the process was faster than the closing of the pipe.
    assert!(
        matches!(output.status.code(), Some(0 | 141)),
        "{:?}",
        output.status
    );
}
