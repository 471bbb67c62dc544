//! `metrics.jsonl` after a resume is the file of a run that was never interrupted.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use ttt_train::metrics::{
    EvalMetrics, Line, METRICS_FILE, MetricsWriter, StepMetrics, peak_flops_of, read,
};

fn step(step: u64, loss: f64) -> StepMetrics {
    StepMetrics {
        step,
        tokens: 1024 * (step + 1),
        loss,
        lr: 1e-3 / 3.0,
        grad_norm: loss / 7.0,
        tokens_per_s: 1234.5,
        mfu: None,
        mfu_with_ttt: Some(0.1),
        skipped: false,
        ttt_state_ratio: [(0, 0.25), (12, loss * 1e-9)].into(),
        sent_bytes: (loss > 1.0).then_some(1 << 40),
        memory_gib: Some(1.0 / 3.0),
        elapsed_s: 0.1,
    }
}

fn write(dir: &Path, from: u64, to: u64) {
    let mut writer = MetricsWriter::open(dir, from).unwrap();
    for i in from..to {
        writer.step(&step(i, 1.0 / (i + 3) as f64)).unwrap();
        if (i + 1) % 2 == 0 {
            let metrics = EvalMetrics {
                step: i + 1,
                validation_loss: 2.0,
                tokens: 10,
            };
            writer.evaluation(&metrics).unwrap();
        }
    }
}

#[test]
fn a_resumed_file_is_that_of_an_uninterrupted_run() {
    let (whole, resumed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(whole.path(), 0, 9);
    write(resumed.path(), 0, 7);
    write(resumed.path(), 4, 6); // the evaluation after step 4 was written and stays
    // A crash while writing leaves part of a line.
    let path = resumed.path().join(METRICS_FILE);
    let torn = fs::read_to_string(&path).unwrap() + "{\"step\":6,\"tok";
    fs::write(&path, torn).unwrap();
    write(resumed.path(), 6, 9);
    let text = |dir: &tempfile::TempDir| fs::read_to_string(dir.path().join(METRICS_FILE)).unwrap();
    assert_eq!(text(&resumed), text(&whole));
    assert_eq!(read(&path).unwrap().len(), 9 + 4);
    let left: Vec<_> = fs::read_dir(resumed.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing is left beside the file");
}

#[test]
fn a_new_run_in_an_old_folder_begins_an_empty_file() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0, 5);
    MetricsWriter::open(dir.path(), 0).unwrap();
    assert_eq!(fs::read(dir.path().join(METRICS_FILE)).unwrap(), b"");
}

#[test]
fn a_file_of_something_else_is_refused_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(METRICS_FILE);
    fs::write(&path, "{\"step\": 1, \"epoch\": 3}\n").unwrap();
    let error = MetricsWriter::open(dir.path(), 5).unwrap_err().to_string();
    assert!(error.contains("line 1 is no line of metrics"), "{error}");
    assert!(path.exists());
}

#[test]
fn what_is_not_finite_reads_back_as_nan() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = MetricsWriter::open(dir.path(), 0).unwrap();
    writer.step(&step(0, f64::NAN)).unwrap();
    let lines = read(&dir.path().join(METRICS_FILE)).unwrap();
    let Line::Step(metrics) = &lines[0] else {
        panic!("{lines:?}")
    };
    assert!(metrics.loss.is_nan() && metrics.grad_norm.is_nan());
}

proptest! {
    #[test]
    fn numbers_are_written_to_the_last_bit(loss in any::<f64>().prop_filter("finite", |x| x.is_finite())) {
        let dir = tempfile::tempdir().unwrap();
        MetricsWriter::open(dir.path(), 0).unwrap().step(&step(0, loss)).unwrap();
        let text = fs::read_to_string(dir.path().join(METRICS_FILE)).unwrap();
        let written = |key: &str| -> f64 {
            let (_, rest) = text.split_once(&format!("\"{key}\":")).unwrap();
            rest[..rest.find(',').unwrap()].parse().unwrap()
        };
        prop_assert_eq!(written("loss").to_bits(), loss.to_bits());
        prop_assert_eq!(written("grad_norm").to_bits(), (loss / 7.0).to_bits());
    }
}

#[test]
fn peaks_are_found_by_whole_words() {
    for (name, peak) in [
        ("NVIDIA H100 80GB HBM3", Some(989e12)),
        ("NVIDIA H100 PCIe", Some(756e12)),
        ("NVIDIA H200", Some(989e12)),
        ("NVIDIA GH200 480GB", Some(989e12)),
        ("NVIDIA A100-SXM4-80GB", Some(312e12)),
        ("NVIDIA L4", Some(121e12)),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
        ("Some GPU of next year", None),
    ] {
        assert_eq!(peak_flops_of(name), peak, "{name}");
    }
}
