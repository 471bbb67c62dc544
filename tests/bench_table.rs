//! scripts/bench-table.py, which joins the lines of two programs.

use std::io::Write;
use std::process::{Command, Output};

fn table(lines: &str) -> Option<Output> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(lines.as_bytes()).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/bench-table.py");
    let run = Command::new("python3")
        .arg(script)
        .arg(file.path())
        .output();
    if let Err(error) = &run {
        eprintln!("skipped: python3 does not start: {error}");
    }
    run.ok()
}

#[test]
fn ratios_are_those_of_the_same_run() {
    let lines = r#"{"program": "torch", "run": "train/a/ttt-on", "tokens_per_s": 1000, "peak_mem_gib": 40.0}
{"program": "ttt", "run": "train/a/ttt-on", "tokens_per_s": 1250, "peak_mem_gib": 28.0}
{"program": "ttt", "run": "train/a/ttt-off", "tokens_per_s": 1300, "peak_mem_gib": null}
{"program": "torch", "run": "train/a/ttt-off", "error": "OOM"}
{"program": "torch", "run": "micro/attn_flex", "fwd_ms": 1.0, "fwd_bwd_ms": 4.0}
{"program": "torch", "run": "micro/attn_varlen", "fwd_ms": 1.5, "fwd_bwd_ms": 5.0}
{"program": "ttt", "run": "micro/attn_swa", "fwd_ms": 0.5, "fwd_bwd_ms": 2.0, "fwd_bwd_tflops": 480.0}
"#;
    let Some(output) = table(lines) else { return };
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for row in [
        "| train/a/ttt-on | 1,250 | 1,000 | 1.250 | - | 28.0 | 40.0 | 0.700 | - |",
        "| train/a/ttt-off | 1,300 | OOM | - | - | - | OOM | - | - |",
        "| train/a | 0.962 | - |",
        // The faster of the baseline's two.
        "| attn_swa | 0.500 | 1.000 | 2.000 | 2.000 | 4.000 | 2.000 | 480 |",
    ] {
        assert!(text.contains(row), "{row} is missing:\n{text}");
    }
}

#[test]
fn a_line_that_is_none_is_told_with_its_place() {
    let good = r#"{"program": "ttt", "run": "x"}"#;
    for bad in [
        "{",
        r#"{"program": "jax", "run": "x"}"#,
        r#"{"program": "ttt"}"#,
        "[]",
    ] {
        let Some(output) = table(&format!("{good}\n{bad}\n")) else {
            return;
        };
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(
            stderr.contains(":2: not a line of a benchmark"),
            "{bad}: {stderr}"
        );
        assert!(!stderr.contains("Traceback"), "{stderr}");
    }
}
