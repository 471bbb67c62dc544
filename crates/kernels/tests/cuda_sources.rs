//! Every CUDA source compiles for the architectures that we name, wherever NVRTC can be found.

use std::process::Command;

#[test]
fn sources_compile_for_each_architecture() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compile_sources.py");
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cuda/source");
    let run = Command::new("python3")
        .args([script, sources, "sm_80", "sm_90a", "sm_100"])
        .output();
    let run = match run {
        Ok(run) => run,
        Err(error) => {
            eprintln!("skipped: python3 does not start: {error}");
            return;
        }
    };
    let text = String::from_utf8_lossy(&run.stdout);
    // The script's own code for "no NVRTC here".
    if run.status.code() == Some(77) {
        eprintln!("skipped: {text}");
        return;
    }
    assert!(
        run.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&run.stderr)
    );
}
