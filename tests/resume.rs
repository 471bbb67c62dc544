//! A run that was stopped goes on as if it never had been.

mod support;

use support::{Run, signal, state, stderr};

/// 100 steps equal 100 steps stopped twice by a signal, in every loss and every byte of the state.
#[test]
fn two_resumes_change_nothing() {
    let whole = Run::new(100);
    whole.train_well(&[]);

    let parts = Run::new(100);
    for (stop, name) in [(30, "TERM"), (65, "INT")] {
        let mut child = parts.train_until(stop);
        signal(&child, name);
        assert!(
            child.wait().expect("wait").success(),
            "a signal ends a run well"
        );
        assert!(
            parts.steps().len() < 100,
            "the signal came too late to test anything"
        );
    }
    parts.train_well(&[]);

    let (expected, got) = (whole.steps(), parts.steps());
    assert_eq!(expected.len(), 100);
    for (expected, got) in expected.iter().zip(&got) {
        assert_eq!(expected, got);
    }
    assert_eq!(expected.len(), got.len());
    assert!(
        state(&whole.newest()) == state(&parts.newest()),
        "the final states differ"
    );

    // Control: the comparison sees a run on another seed.
    let other = Run::new(100);
    other.train_well(&["--set", "run.seed=4"]);
    assert!(state(&whole.newest()) != state(&other.newest()));
}

/// A model that computes in bf16, whose weights a run holds in halves, goes on from a checkpoint in f32.
#[test]
fn bf16_weights_are_resumed_bit_for_bit() {
    let bf16 = ["--set", "train.compute=bf16"];
    let run = Run::new(14);
    run.train_well(&bf16);
    let (last, end) = (run.newest(), state(&run.newest()));
    std::fs::remove_dir_all(&last).expect("remove the last checkpoint");
    let again = run.train(&bf16);
    let told = format!(
        "{}{}",
        String::from_utf8_lossy(&again.stdout),
        stderr(&again)
    );
    assert!(told.contains("at step 10"), "{told}");
    assert!(state(&last) == end, "four steps again end elsewhere");

    // Control: f32 ends elsewhere.
    let other = Run::new(14);
    other.train_well(&[]);
    assert!(state(&other.newest()) != end);
}

/// Recomputing activations changes memory, not numbers.
#[test]
fn recomputed_activations_give_the_same_run() {
    let keep = Run::new(12);
    keep.train_well(&[]);
    let recompute = Run::new(12);
    recompute.train_well(&["--set", "train.activations=recompute"]);
    assert_eq!(keep.steps(), recompute.steps());
    assert!(state(&keep.newest()) == state(&recompute.newest()));
}

/// A process killed at any moment leaves a checkpoint that loads, and the run goes on from it to the
/// same end.
#[test]
fn kill_leaves_a_checkpoint_that_loads() {
    let whole = Run::new(60);
    whole.train_well(&["--set", "checkpoint.every=1"]);

    let killed = Run::new(60);
    for step in [3, 11, 24, 37, 50] {
        // Saving every step makes it likely that the kill meets a save.
        let mut child = killed
            .ttt(&["train", "config.toml", "--set", "checkpoint.every=1"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("run ttt");
        while killed.steps().len() < step && child.try_wait().expect("ask").is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().expect("kill");
        child.wait().expect("wait");
        let newest = killed.newest();
        let output = killed
            .ttt(&["eval", newest.to_str().expect("a UTF-8 path")])
            .output()
            .expect("run ttt eval");
        assert!(output.status.success(), "{}", stderr(&output));
    }
    killed.train_well(&["--set", "checkpoint.every=1"]);
    assert_eq!(whole.steps(), killed.steps());
    assert!(state(&whole.newest()) == state(&killed.newest()));
}
