//! The first signal asks, the second ends. Each case runs in a process of its own.

use std::process::Command;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::raise;
use ttt_train::signals::{Signal, Signals};

const CASE: &str = "TTT_SIGNALS_CASE";

/// Runs only where [`in_child`] asks for it.
#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let signals = Signals::install().unwrap();
    assert_eq!(signals.received(), None);
    for signal in case.split(' ') {
        let (signal, expected) = match signal {
            "INT" => (SIGINT, Signal::Interrupt),
            _ => (SIGTERM, Signal::Terminate),
        };
        raise(signal).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(signals.received(), Some(expected));
    }
}

fn in_child(case: &str) -> Option<i32> {
    let exe = std::env::current_exe().unwrap();
    let output = Command::new(exe)
        .args(["--exact", "child"])
        .env(CASE, case)
        .output()
        .unwrap();
    output.status.code()
}

#[test]
fn one_signal_is_a_request() {
    assert_eq!(in_child("INT"), Some(0));
    assert_eq!(in_child("TERM"), Some(0));
}

#[test]
fn a_second_one_ends_the_process() {
    assert_eq!(in_child("INT INT"), Some(130));
    assert_eq!(in_child("INT TERM"), Some(143));
    assert_eq!(in_child("TERM TERM"), Some(143));
}
