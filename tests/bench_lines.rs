//! `ttt bench` on the CPU: the lines have the PyTorch baseline's names and keys, and what goes wrong is
//! told. Rates need a GPU.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ttt"))
        .args(["bench", "--device", "cpu"])
        .args(args)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn lines(args: &[&str]) -> Vec<Value> {
    let output = bench(args);
    let (out, err) = (
        output.stdout,
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert!(output.status.success(), "{args:?}: {err}");
    let text = String::from_utf8(out).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The keys of a line of torch_baseline.py that do not name PyTorch.
const KEYS: [&str; 19] = [
    "run",
    "preset",
    "mode",
    "attn",
    "window",
    "ttt",
    "chunk",
    "target",
    "batch",
    "seq",
    "accum",
    "ckpt",
    "params_m",
    "tokens_per_s",
    "ms_per_step",
    "mfu",
    "mfu_with_ttt",
    "peak_mem_gib",
    "wall_s",
];

#[test]
fn training_lines_have_the_baselines_keys() {
    let args = "--preset tiny --attn full --seq 64 --batch 2 --ttt both --steps 1 --warmup 1";
    let lines = lines(&args.split(' ').collect::<Vec<_>>());
    let names: Vec<&Value> = lines.iter().map(|line| &line["run"]).collect();
    let expected = [
        "train/tiny/full/b2x64/ttt-on",
        "train/tiny/full/b2x64/ttt-off",
    ];
    assert_eq!(names, expected);
    for line in &lines {
        for key in KEYS
            .iter()
            .chain(&["loss_first", "loss_last", "first_step_s"])
        {
            assert!(line.get(key).is_some(), "{key} is missing: {line}");
        }
        let loss = line["loss_first"].as_f64().unwrap();
        assert!((loss - 512f64.ln()).abs() < 0.5, "{line}");
    }
}

#[test]
fn prefill_lines_have_the_baselines_keys() {
    let args = "--mode prefill --preset tiny --seq 64,96 --ttt on --steps 1 --warmup 1";
    let lines = lines(&args.split(' ').collect::<Vec<_>>());
    let names: Vec<&Value> = lines.iter().map(|line| &line["run"]).collect();
    let expected = [
        "prefill/tiny/swa/b1x64/ttt-on",
        "prefill/tiny/swa/b1x96/ttt-on",
    ];
    assert_eq!(names, expected);
    for key in KEYS {
        assert!(
            lines[0].get(key).is_some(),
            "{key} is missing: {}",
            lines[0]
        );
    }
}

#[test]
fn the_same_run_has_the_same_losses_to_the_last_bit() {
    let args = "--preset tiny --attn full --seq 64 --steps 1 --warmup 1 --deterministic";
    let hash = |args: &str| {
        let args: Vec<&str> = args.split(' ').collect();
        lines(&args)[0]["loss_hash"].as_str().unwrap().to_string()
    };
    assert_eq!(hash(args), hash(args));
    assert_ne!(hash(args), hash(&args.replace("64", "65")));
}

#[test]
fn without_a_gpu_a_profile_is_refused() {
    let output = bench(&[
        "--preset",
        "tiny",
        "--seq",
        "32",
        "--steps",
        "1",
        "--profile",
    ]);
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.starts_with("error: a profile needs a GPU"),
        "{stderr}"
    );
}
