//! Ranks that fail, end, hang or vanish. A rank played by the test keeps its connections and does
//! nothing with them.

use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use super::*;
use crate::activity::Declared;
use crate::group::ProcessGroup;

/// The sentence on each of `size` ranks for a meeting with a short deadline.
fn meetings(size: usize) -> Vec<Meeting> {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = free.expect("a free port").port();
    (0..size)
        .map(|rank| Meeting {
            rank,
            size,
            host: "127.0.0.1".into(),
            port,
            run: "test".into(),
            fingerprint: 1,
            patience: Duration::from_secs(10),
            deadline: Duration::from_millis(1000),
        })
        .collect()
}

fn one() -> Tensor<1> {
    Tensor::ones([1], &Device::flex())
}

/// Three ranks, of which the last is played by `part`; what the others' barriers say.
fn with_last(part: impl FnOnce(Vec<Option<TcpStream>>) + Send) -> Vec<String> {
    let mut meetings = meetings(3);
    std::thread::scope(|scope| {
        let last = meetings.pop().expect("three");
        let others: Vec<_> = meetings
            .into_iter()
            .map(|meeting| {
                scope.spawn(move || {
                    let group = connect(&meeting).expect("all come");
                    let error = group.barrier().expect_err("the last takes no part");
                    // As the program does: the others hear why this rank ends.
                    group.transport().fail(&error.to_string());
                    error.to_string()
                })
            })
            .collect();
        scope.spawn(move || part(last.meet().expect("all come")));
        let join = |rank: std::thread::ScopedJoinHandle<String>| rank.join().expect("a rank");
        others.into_iter().map(join).collect()
    })
}

#[test]
fn a_rank_that_vanishes_is_named() {
    let begun = Instant::now();
    for error in with_last(drop) {
        assert!(
            error.contains("rank 2 is lost: its connection closed"),
            "{error}"
        );
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_rank_that_hangs_is_named() {
    let begun = Instant::now();
    let says = with_last(|connections| {
        std::thread::sleep(Duration::from_secs(3));
        drop(connections);
    });
    for error in says {
        assert!(
            error.contains("rank 2 is lost: nothing was heard"),
            "{error}"
        );
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_is_no_frame_loses_the_rank() {
    let says = with_last(|mut connections| {
        for stream in connections.iter_mut().flatten() {
            stream.write_all(&[7; 64]).expect("they listen");
        }
        std::thread::sleep(Duration::from_millis(500));
    });
    for error in says {
        assert!(
            error.contains("rank 2 is lost: it sent what is no frame"),
            "{error}"
        );
    }
}

/// Slow is not dead: heartbeats carry a rank over three deadlines of silence.
#[test]
fn a_rank_that_works_is_waited_for() {
    std::thread::scope(|scope| {
        for meeting in meetings(2) {
            scope.spawn(move || {
                let group = connect(&meeting).expect("all come");
                if meeting.rank == 1 {
                    std::thread::sleep(Duration::from_secs(3));
                }
                group.barrier().expect("the other works");
            });
        }
    });
}

#[test]
fn a_rank_that_fails_says_why() {
    std::thread::scope(|scope| {
        for meeting in meetings(3) {
            scope.spawn(move || {
                let group = connect(&meeting).expect("all come");
                if meeting.rank == 1 {
                    group.transport().fail("no space left on device");
                    return;
                }
                let error = group.all_reduce_sum(one()).expect_err("rank 1 failed");
                let error = error.to_string();
                let says = "rank 1 failed: no space left on device";
                assert!(error.contains(says), "{error}");
                assert_eq!(group.transport().watch().wait().as_deref(), Some(says));
            });
        }
    });
}

#[test]
fn a_rank_that_panics_is_named() {
    std::thread::scope(|scope| {
        for meeting in meetings(2) {
            scope.spawn(move || {
                let group = connect(&meeting).expect("all come");
                if meeting.rank == 1 {
                    let panics = std::thread::spawn(move || {
                        let _held = group;
                        std::panic::resume_unwind(Box::new("told to nobody"));
                    });
                    panics.join().expect_err("it panicked");
                    return;
                }
                let error = group.barrier().expect_err("rank 1 is gone").to_string();
                assert!(error.contains("rank 1 failed: it panicked"), "{error}");
            });
        }
    });
}

/// Who has ended in order is missed only by who waits for it.
#[test]
fn ranks_may_end_one_after_another() {
    std::thread::scope(|scope| {
        for meeting in meetings(3) {
            scope.spawn(move || {
                let group = connect(&meeting).expect("all come");
                let pair = group.split(&[vec![0, 1], vec![2]]).expect("all split");
                if meeting.rank == 2 {
                    return;
                }
                std::thread::sleep(Duration::from_millis(300));
                pair.all_reduce_sum(one()).expect("rank 2 has no part");
                let error = group.barrier().expect_err("rank 2 has ended").to_string();
                assert!(error.contains("rank 2 has ended"), "{error}");
            });
        }
    });
}

#[test]
fn who_stays_away_is_named() {
    let mut meetings = meetings(3);
    meetings.remove(2);
    std::thread::scope(|scope| {
        for mut meeting in meetings {
            meeting.patience = Duration::from_millis(500);
            scope.spawn(move || {
                let error = connect(&meeting)
                    .expect_err("rank 2 is missing")
                    .to_string();
                assert!(error.contains("missing: 2"), "{error}");
            });
        }
    });
}

#[test]
fn a_rank_with_other_settings_is_refused_and_all_hear() {
    std::thread::scope(|scope| {
        for mut meeting in meetings(2) {
            meeting.fingerprint = meeting.rank as u64;
            scope.spawn(move || {
                let error = connect(&meeting).expect_err("other settings").to_string();
                assert!(error.contains("rank 1 was started with another"), "{error}");
            });
        }
    });
}

/// A port scanner and a rank of another run come first.
#[test]
fn strangers_are_let_go() {
    let meetings = meetings(2);
    std::thread::scope(|scope| {
        let mut stray = meetings[1].clone();
        stray.run = "another".into();
        let at = (stray.host.clone(), stray.port);
        let [zero, one] = <[Meeting; 2]>::try_from(meetings).expect("two");
        let first = scope.spawn(move || connect(&zero).expect("rank 1 comes"));
        let mut scanner = loop {
            if let Ok(stream) = TcpStream::connect((at.0.as_str(), at.1)) {
                break stream;
            }
        };
        scanner
            .write_all(b"GET / HTTP/1.1\r\n\r\n0123456789abcdef")
            .expect("open");
        let error = connect(&stray).expect_err("another run").to_string();
        assert!(error.contains("those of run \"test\""), "{error}");
        let second = scope.spawn(move || connect(&one).expect("rank 0 waits"));
        let barriers = [first, second].map(|rank| {
            let group = rank.join().expect("a rank");
            std::thread::spawn(move || group.barrier())
        });
        for barrier in barriers {
            barrier.join().expect("a rank").expect("both are there");
        }
    });
}

/// Two ranks that stand still, as `scene` has them: what each shows of its device, and what it says that it waits
/// for; until one is said to hang. Both hear a reason with `says`.
fn both_hear(
    says: &str,
    scene: impl Fn(&Activity, bool) -> (DeviceSigns, Option<Declared>) + Sync,
) {
    let scene = &scene;
    std::thread::scope(|scope| {
        for meeting in meetings(2) {
            scope.spawn(move || {
                let group = connect(&meeting).expect("both come");
                let tcp = group.transport();
                tcp.activity().at("step 5");
                let (signs, resting) = scene(tcp.activity(), meeting.rank == 0);
                tcp.watch_over(signs).expect("a thread");
                let reason = tcp.watch().wait().expect("one hangs");
                assert!(reason.contains(says), "{reason}");
                drop(resting);
            });
        }
    });
}

/// Two ranks stand still, the device of one only because it waits for the other's: that one is named. If
/// none else is to blame, it names itself later.
#[test]
fn the_rank_that_others_wait_for_is_named() {
    for (other_moves, says) in [
        (false, "rank 1 hangs: its main thread, or its device"),
        (true, "rank 0 hangs: its device has waited for other ranks"),
    ] {
        both_hear(says, |activity, first| {
            // Moves, at first: whose clock runs longer must not decide.
            if !first && !other_moves {
                std::thread::sleep(Duration::from_millis(300));
                activity.at("step 6");
            }
            let resting = (!first && other_moves).then(|| activity.wait());
            let waits: fn() -> bool = if first { || true } else { || false };
            let signs = DeviceSigns {
                waits,
                ..DeviceSigns::NONE
            };
            (signs, resting)
        });
    }
}

/// A driver that never answers keeps no rank from saying that it hangs.
#[test]
fn a_device_that_cannot_be_asked_is_one_that_hangs() {
    fn never() -> (u64, usize) {
        loop {
            std::thread::park();
        }
    }
    both_hear("rank 1 hangs", |activity, first| match first {
        true => (DeviceSigns::NONE, Some(activity.wait())),
        false => {
            let signs = DeviceSigns {
                marks: never,
                ..DeviceSigns::NONE
            };
            (signs, None)
        }
    });
}
