//! Several ranks as processes of this host, through the launcher: they train as one does, and end
//! together whatever happens to one of them.

mod support;

use std::process::{Child, Output};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use support::{Run, signal, signal_id, stderr};

/// No rank may outlive another that is gone by more.
const TOGETHER: Duration = Duration::from_secs(30);

/// Processes whose parent is `parent`, by rank.
fn ranks_of(parent: &Child) -> Vec<u32> {
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc").expect("Linux").flatten() {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(status) = std::fs::read_to_string(entry.path().join("status")) else {
            continue; // ended meanwhile
        };
        if !status.contains(&format!("PPid:\t{}\n", parent.id())) {
            continue;
        }
        let variables = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let rank = variables
            .split(|&byte| byte == 0)
            .find_map(|variable| variable.strip_prefix(b"RANK="))
            .expect("a rank knows its number");
        found.push((
            String::from_utf8_lossy(rank)
                .parse::<u32>()
                .expect("a number"),
            id,
        ));
    }
    found.sort_unstable();
    found.into_iter().map(|(_, id)| id).collect()
}

fn alive(id: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"));
    status.is_ok_and(|status| !status.contains("State:\tZ"))
}

/// Waits for the launcher, and checks that no rank is left.
fn end(launcher: Child, ranks: &[u32], begun: Instant) -> Output {
    let output = launcher.wait_with_output().expect("wait");
    let took = begun.elapsed();
    println!("all ended after {took:?}");
    assert!(took < TOGETHER, "the end took {took:?}");
    for &id in ranks {
        assert!(!alive(id), "process {id} is left");
    }
    output
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().expect("a number")
}

/// Losses, gradient norms and the rest of the metrics of a run on several ranks are those of one rank
/// but for the order of sums.
#[test]
fn two_and_four_ranks_train_like_one() {
    let one = Run::new(12);
    one.train_well(&[]);
    let expected = one.steps();
    for (count, sets) in [
        (2, [].as_slice()),
        (2, &["parallel.shard=2"]),
        (2, &["parallel.context=2"]),
        (4, &["parallel.shard=2", "parallel.context=2"]),
        (
            2,
            &["parallel.context=2", "parallel.shard_over_context=true"],
        ),
    ] {
        let run = Run::new(12);
        let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let output = run.launch(count, &args).output().expect("run ttt");
        assert!(output.status.success(), "{sets:?}: {}", stderr(&output));
        let got = run.steps();
        assert_eq!(got.len(), expected.len(), "{sets:?}");
        for (got, expected) in got.iter().zip(&expected) {
            // AdamW divides by the root of the second moment, so that the last bits of early gradients
            // become a few parts in 1e6 of the weights, and of the losses.
            for key in ["loss", "grad_norm"] {
                let (got, expected) = (number(got, key), number(expected, key));
                let error = (got - expected).abs() / expected;
                assert!(error < 2e-5, "{sets:?}: {key} {got} instead of {expected}");
            }
            assert_eq!(got["tokens"], expected["tokens"]);
        }
        let (got, expected) = (run.evaluation(), one.evaluation());
        let error = (got - expected).abs() / expected;
        assert!(
            error < 2e-5,
            "{sets:?}: validation loss {got} instead of {expected}"
        );
        // Rank 0 speaks, the others have their files.
        for rank in 1..count {
            let log = std::fs::read_to_string(run.path(&format!("run/logs/rank-{rank}.log")));
            assert!(log.expect("a log").contains("step 12/12"), "rank {rank}");
        }
        assert!(!run.path("run/logs/rank-0.log").exists());
        // It also tells what it sent: as planned, but where a document ends between two ranks.
        let told = stderr(&output);
        let mut table = told
            .lines()
            .skip_while(|line| !line.contains("bytes that this rank sent in step 0"));
        let total = table.find(|line| line.trim_start().starts_with("total"));
        let total = total.unwrap_or_else(|| panic!("{sets:?}: {told}"));
        let columns = total.split_whitespace().skip(1);
        let columns: Vec<f64> = columns
            .map(|number| number.replace(',', "").parse().expect("a number"))
            .collect();
        let sent = number(&run.steps()[0], "sent_bytes");
        assert_eq!(columns[0], sent, "{sets:?}: {told}");
        let shared = sets.contains(&"parallel.context=2");
        assert!(shared || sent == columns[1], "{sets:?}: {told}");
        // And what they saved is a checkpoint for one.
        run.train_well(&["--set", "train.steps=13"]);
    }
    // Control: the comparison sees other data.
    let other = Run::new(5);
    other.train_well(&["--set", "run.seed=4"]);
    let difference = number(&other.steps()[0], "loss") - number(&expected[0], "loss");
    assert!(difference.abs() > 1e-3);
}

/// A signal to the launcher, or to any one rank, saves once on all ranks at the same step.
#[test]
fn a_signal_saves_once_and_ends_all() {
    for to in [None, Some(1)] {
        let run = Run::new(4000);
        let mut launcher = run.launch(2, &[]).spawn().expect("run ttt");
        run.wait_until(15, &mut launcher);
        let ranks = ranks_of(&launcher);
        assert_eq!(ranks.len(), 2);
        let begun = Instant::now();
        match to {
            None => signal(&launcher, "INT"),
            Some(rank) => signal_id(ranks[rank], "TERM"),
        }
        let output = end(launcher, &ranks, begun);
        assert!(output.status.success(), "{}", stderr(&output));
        let said = stderr(&output);
        let name = if to.is_none() { "SIGINT" } else { "SIGTERM" };
        assert_eq!(said.matches(&format!("{name}: saved")).count(), 1, "{said}");
        let saved = run
            .newest()
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let done: usize = saved.trim_start_matches("step-").parse().expect("a step");
        assert_eq!(
            run.steps().len(),
            done,
            "the metrics end where the state does"
        );
        // The rest of the run is there to be done.
        let steps = format!("train.steps={}", done + 1);
        run.train_well(&["--set", &steps, "--set", "parallel.timeout_s=21"]);
    }
}

/// Stops or kills a rank some time after step `step`; the rest ends, names it, and leaves a checkpoint
/// that loads.
fn without_a_rank(rank: usize, count: usize, name: &str, step: usize, says: &str) {
    let run = Run::new(100_000);
    // Saving every few steps makes it likely that the end meets a save.
    let rows = format!("train.batch_tokens={}", 64 * 2 * count);
    let sets = ["checkpoint.every=3", "parallel.timeout_s=5", &rows];
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let mut launcher = run.launch(count, &args).spawn().expect("run ttt");
    run.wait_until(step, &mut launcher);
    let ranks = ranks_of(&launcher);
    assert_eq!(ranks.len(), count);
    // Any instant of the steps that follow.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let nanos = now.expect("a clock").subsec_nanos();
    std::thread::sleep(Duration::from_micros(u64::from(nanos / 10) % 100_000));
    let begun = Instant::now();
    signal_id(ranks[rank], name);
    let output = end(launcher, &ranks, begun);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(said.contains(says), "{said}");
    let named = format!("rank {rank} is lost");
    assert!(said.contains(&named), "no \"{named}\" in: {said}");
    assert!(!said.contains("panicked"), "{said}");
    let newest = run.newest();
    let newest = newest.to_str().expect("a UTF-8 path");
    let output = run.ttt(&["eval", newest]).output().expect("run ttt eval");
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_killed_rank_ends_all_and_is_named() {
    for (i, (rank, count)) in [(1, 2), (0, 2), (2, 3)].into_iter().enumerate() {
        let says = format!("rank {rank} was ended by signal 9 (SIGKILL)");
        without_a_rank(rank, count, "KILL", 5 + 7 * i, &says);
    }
}

#[test]
#[ignore = "minutes: the same as above, 20 times"]
fn a_killed_rank_ends_all_20_times() {
    for i in 0..20 {
        let (rank, count) = (i % 3, 3);
        let says = format!("rank {rank} was ended by signal 9 (SIGKILL)");
        without_a_rank(rank, count, "KILL", 4 + 3 * i, &says);
    }
}

#[test]
fn a_rank_that_hangs_ends_all_and_is_named() {
    without_a_rank(1, 2, "STOP", 6, "nothing was heard of it for 5 s");
}

/// A run of two ranks with `sets`, in which `scene` is rehearsed once `steps` steps are told: all end, and
/// rank 1 is named with `says`.
fn without_moves(sets: &[&str], scene: &str, steps: usize, says: &str) {
    let run = Run::new(100_000);
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let mut launch = run.launch(2, &args);
    let mut launcher = launch.env("TTT_REHEARSE", scene).spawn().expect("run");
    run.wait_until(steps, &mut launcher);
    let ranks = ranks_of(&launcher);
    let output = end(launcher, &ranks, Instant::now());
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    for says in ["rank 1 hangs", says, "rank 0 at: "] {
        assert!(said.contains(says), "{scene}: no \"{says}\" in: {said}");
    }
    assert!(!said.contains("rank 0 hangs"), "{said}");
}

/// A rank whose heartbeats go on while its main thread stands still says so itself: from the first step
/// on, and in a task that it has declared.
#[test]
fn a_rank_that_does_not_move_ends_all_and_is_named() {
    let (five, two) = ("parallel.timeout_s=5", "parallel.timeout_s=2");
    std::thread::scope(|scope| {
        // One that computes has ten times as long, as the 6 s below show.
        let task = "has not moved for 2 s at: a rehearsed task";
        scope.spawn(|| without_moves(&[two], "task:1:2", 1, task));
        let sets = [five, "parallel.shard=2"];
        without_moves(&sets, "hang:1:1", 1, "has not moved for 5 s at: step 1");
        let sets = [five, "parallel.context=2"];
        without_moves(&sets, "hang:1:8", 6, "has not moved for 5 s at: step 8");
        let (run, sets) = (Run::new(12), ["--set", two]);
        let mut launch = run.launch(2, &sets);
        let output = launch.env("TTT_REHEARSE", "task:1:8:6").output();
        let output = output.expect("run ttt");
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(run.steps().len(), 12);
    });
    // What cannot be rehearsed is refused, so the two above were.
    let run = Run::new(12);
    let mut launch = run.launch(2, &[]);
    let output = launch.env("TTT_REHEARSE", "rest:1:8").output();
    let said = stderr(&output.expect("run ttt"));
    assert!(said.contains("expected hang:RANK:STEP"), "{said}");
}

/// What a user does wrong is one sentence, whichever rank notices.
#[test]
fn what_cannot_be_is_refused() {
    let run = Run::new(5);
    for (count, set, says) in [
        (2, "parallel.shard=4", "more than the ranks there are, 2"),
        (3, "parallel.shard=1", "do not divide among the 3 ranks"),
        (
            2,
            "parallel.replicate=4",
            "there are 2 ranks: set parallel.replicate = 2",
        ),
        (2, "data.sources=[]", "shards"),
    ] {
        let output = run
            .launch(count, &["--set", set])
            .output()
            .expect("run ttt");
        assert_eq!(output.status.code(), Some(2), "{set}");
        let said = stderr(&output);
        assert_eq!(said.matches(says).count(), 1, "{set}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
    for (args, says) in [
        (
            ["launch", "--nproc", "2", "--", "plan", "config.toml"].as_slice(),
            "`train` or `doctor`",
        ),
        (&["launch", "--", "train", "config.toml"], "give --nproc"),
        (&["launch", "--nproc", "2", "--", "train"], "<CONFIG>"),
        (
            &[
                "launch",
                "--nnodes",
                "2",
                "--nproc",
                "1",
                "--",
                "train",
                "config.toml",
            ],
            "--rendezvous",
        ),
        (
            &["launch", "--rendezvous", "here", "--", "train"],
            "HOST:PORT",
        ),
    ] {
        let output = run.ttt(args).output().expect("run ttt");
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(says), "{}", stderr(&output));
    }
    let mut half = run.ttt(&["train", "config.toml"]);
    let output = half.env("RANK", "0").output().expect("run ttt");
    assert!(
        stderr(&output).contains("WORLD_SIZE is not"),
        "{}",
        stderr(&output)
    );
}

/// Two launchers with one rank each, as on two hosts.
#[test]
fn two_launchers_are_one_run() {
    let run = Run::new(6);
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
    let place = format!("127.0.0.1:{}", free.expect("a port").port());
    let launchers: Vec<Child> = ["1", "0"]
        .iter()
        .map(|node| {
            let args = [
                "launch",
                "--nproc",
                "1",
                "--nnodes",
                "2",
                "--node-rank",
                node,
                "--rendezvous",
                &place,
                "--",
                "train",
                "config.toml",
            ];
            run.ttt(&args).spawn().expect("run ttt")
        })
        .collect();
    for launcher in launchers {
        let output = launcher.wait_with_output().expect("wait");
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(run.steps().len(), 6);
}

/// Ranks that torchrun starts, or anything that sets its variables.
#[test]
fn torchrun_variables_are_enough() {
    for (seed, says) in [
        ("3", None),
        ("4", Some("rank 1 was started with another configuration")),
    ] {
        let run = Run::new(6);
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
        let port = free.expect("a port").port().to_string();
        let ranks: Vec<Child> = [("0", "3"), ("1", seed)]
            .iter()
            .map(|(rank, seed)| {
                let seed = format!("run.seed={seed}");
                let mut train = run.ttt(&["train", "config.toml", "--set", &seed]);
                train
                    .env("RANK", rank)
                    .env("WORLD_SIZE", "2")
                    .env("LOCAL_RANK", rank);
                train
                    .env("MASTER_ADDR", "localhost")
                    .env("MASTER_PORT", &port);
                train.spawn().expect("run ttt")
            })
            .collect();
        for rank in ranks {
            let output = rank.wait_with_output().expect("wait");
            let said = stderr(&output);
            match says {
                None => assert!(output.status.success(), "{said}"),
                Some(says) => assert!(said.contains(says), "{said}"),
            }
        }
        assert_eq!(run.steps().len(), if says.is_none() { 6 } else { 0 });
    }
}

/// The doctor's check of what ranks exchange.
#[test]
fn exchanges_are_checked() {
    let run = Run::new(5);
    let args = [
        "launch", "--nproc", "4", "--", "doctor", "--ranks", "--device", "cpu", "--size", "1",
    ];
    let output = run.ttt(&args).output().expect("run ttt");
    assert!(output.status.success(), "{}", stderr(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    // Six exchanges, two precisions, three kinds of groups.
    assert_eq!(said.matches("pass ").count(), 36, "{said}");
    assert!(!said.contains("FAIL"), "{said}");
    // And the ways in which ranks share rows are timed at the sizes of a configuration.
    let config = run.path("config.toml");
    let config = config.to_str().expect("a path in UTF-8");
    let args = [&args[..8], &["--context", config]].concat();
    let output = run.ttt(&args).output().expect("run ttt");
    assert!(output.status.success(), "{}", stderr(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in ["chain bf16", "nothing sent", "\"auto\" is all-to-all here"] {
        assert!(said.contains(line), "{said}");
    }
    let alone = run.ttt(&["doctor", "--ranks"]).output().expect("run ttt");
    assert!(stderr(&alone).contains("one rank exchanges nothing"));
}
