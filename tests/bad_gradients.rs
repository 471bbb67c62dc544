//! What a run does when a gradient is not finite. A learning rate of 1e20 makes the second one NaN.

mod support;

use support::{Run, stderr};

const BREAK: [&str; 4] = [
    "--set",
    "optimizer.lr=1e20",
    "--set",
    "checkpoint.every=100",
];

#[test]
fn skipping_goes_on_and_says_so() {
    let run = Run::new(8);
    run.train_well(&BREAK);
    let skipped: Vec<bool> = run
        .steps()
        .iter()
        .map(|step| step["skipped"].as_bool().expect("a flag"))
        .collect();
    assert_eq!(skipped[..2], [false, true]);
    assert_eq!(skipped.len(), 8);

    // Control: at the usual rate nothing is skipped.
    let sound = Run::new(8);
    sound.train_well(&[]);
    assert!(sound.steps().iter().all(|step| step["skipped"] == false));
}

#[test]
fn aborting_names_the_step_and_saves_nothing() {
    let run = Run::new(8);
    let output = run.train(&[&BREAK[..], &["--set", "train.on_bad_gradient=abort"]].concat());
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("error: step 1: the gradient norm is NaN"),
        "{text}"
    );
    assert!(!run.path("run/checkpoints").exists());
}
