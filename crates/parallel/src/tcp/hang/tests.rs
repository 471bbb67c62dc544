//! Clocks that are looked at, a second apart.

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);
const ALONE: Around = Around {
    device_waits: false,
    patience: Patience::Usual,
    moves: 0,
};

/// Looks a second apart, of at most 1000, until the limit is reached; which that was. Sees beside
/// itself what `each` says.
fn ends(
    clock: &mut Clock,
    activity: &Activity,
    mut each: impl FnMut(u32) -> Around,
) -> Option<u32> {
    (1..=1000).find(|&look| {
        let around = each(look);
        let beyond = clock.look(
            &activity.look(),
            Duration::ZERO,
            &around,
            Duration::from_secs(1),
        );
        beyond.is_some()
    })
}

/// The same with a new clock, and nothing beside.
fn alone(activity: &Activity, mut each: impl FnMut(u32)) -> Option<u32> {
    ends(&mut Clock::new(DEADLINE), activity, |look| {
        each(look);
        ALONE
    })
}

#[test]
fn who_does_not_move_is_seen() {
    let activity = Activity::default();
    activity.at("step 7");
    // The first look sees the move.
    assert_eq!(alone(&activity, |_| ()), Some(21));
    let moves_twice = |look| {
        if [5, 10].contains(&look) {
            activity.at("step 8");
        }
    };
    assert_eq!(alone(&activity, moves_twice), Some(30));
}

/// While the device has marks before it, it must pass some, whatever the main thread does.
#[test]
fn a_device_that_does_not_go_on_is_seen() {
    for (left, moves_until, end) in [(1, 0, 120), (1, 500, 120), (0, 500, 520)] {
        let activity = Activity::default();
        let each = |look: u32| {
            activity.marks(u64::from(look.min(100)), left);
            if look <= moves_until {
                activity.at("another block");
            }
        };
        assert_eq!(alone(&activity, each), Some(end), "{left} {moves_until}");
    }
}

#[test]
fn who_waits_is_not() {
    let activity = Activity::default();
    activity.at("step 7");
    let wait = activity.wait();
    assert_eq!(alone(&activity, |_| ()), None);
    drop(wait);
    assert_eq!(alone(&activity, |_| ()), Some(21));
}

/// A step of 100 s whose parts take 2 s leaves the limit as it is; one whose parts take 10 s does not.
#[test]
fn the_longest_time_between_moves_counts_and_not_the_step() {
    for (part, limit) in [(2, 20), (10, 36)] {
        let activity = Activity::default();
        activity.at("step 7");
        let moves = |look: u32| {
            if look <= 100 && look.is_multiple_of(part) {
                activity.at("another block");
            }
        };
        // 10 s are seen as 9: those at whose end there was no move.
        assert_eq!(alone(&activity, moves), Some(100 + limit), "{part}");
    }
}

#[test]
fn a_long_task_has_a_longer_limit() {
    let activity = Activity::default();
    activity.at("step 7");
    let task = activity.long("saving");
    assert_eq!(alone(&activity, |_| ()), Some(201));
    // Who moves in it is left alone, and stands still for as long afterwards.
    let moves = |look: u32| {
        if look.is_multiple_of(190) && look <= 760 {
            activity.at("another file");
        }
    };
    assert_eq!(alone(&activity, moves), Some(960));
    let inner = activity.endless("telling something");
    assert_eq!(alone(&activity, |_| ()), None);
    drop((inner, task));
    assert_eq!(alone(&activity, |_| ()), Some(21));
}

/// Who neither moves nor works has no more time than in a step; nor has one whose device has to move.
#[test]
fn a_long_task_is_one_of_a_process_at_work() {
    for (works_until, left, device_waits, end) in [
        (0, 0, false, Some(21)),
        (100, 0, false, Some(120)),
        (1000, 0, false, Some(201)),
        // The task's beginning is no move of the device.
        (1000, 1, false, Some(20)),
        (0, 1, true, Some(200)),
    ] {
        let activity = Activity::default();
        let _task = activity.long("saving");
        activity.marks(0, left);
        let around = Around {
            device_waits,
            ..ALONE
        };
        let mut clock = Clock::new(DEADLINE);
        let end_seen = (1..=1000_u32).find(|&look| {
            let idle = Duration::from_secs(u64::from(look.saturating_sub(works_until)));
            let seen = activity.look();
            let beyond = clock.look(&seen, idle, &around, Duration::from_secs(1));
            beyond.is_some()
        });
        assert_eq!(end_seen, end, "{works_until} {left} {device_waits}");
    }
}

/// How long somebody stands still in a long task says nothing of what comes after it; in the first
/// step it does.
#[test]
fn the_first_step_tells_what_is_usual() {
    for (tells, limit) in [(true, 396), (false, 20)] {
        let activity = Activity::default();
        let begin = match tells {
            true => activity.first("the first step"),
            false => activity.long("the first step"),
        };
        let mut clock = Clock::new(DEADLINE);
        let mut begin = Some(begin);
        let end = ends(&mut clock, &activity, |look| {
            if look == 101 {
                begin = None;
            }
            ALONE
        });
        assert_eq!(end, Some(101 + limit), "{tells}");
    }
}

/// Whose device waits has time while others move or are at a long task. Whose does not has none of theirs.
#[test]
fn a_device_that_waits_is_waited_for() {
    let activity = Activity::default();
    activity.at("step 7");
    for (device_waits, patience, moves_until, end) in [
        (true, Patience::Usual, 0, Some(21)),
        (true, Patience::Usual, 100, Some(120)),
        (true, Patience::Long, 0, Some(201)),
        (true, Patience::Endless, 0, None),
        (false, Patience::Usual, 100, Some(21)),
        (false, Patience::Endless, 100, Some(21)),
    ] {
        let mut clock = Clock::new(DEADLINE);
        let got = ends(&mut clock, &activity, |look| Around {
            device_waits,
            patience,
            moves: u64::from(look.min(moves_until)),
        });
        assert_eq!(got, end, "{device_waits} {patience:?} {moves_until}");
    }
    // How long it waited is not how long it takes.
    let mut clock = Clock::new(DEADLINE);
    let end = ends(&mut clock, &activity, |look| Around {
        device_waits: look < 100,
        patience: Patience::Long,
        moves: u64::from(look >= 100),
    });
    // The end of the wait was a move.
    assert_eq!(end, Some(120));
    assert_eq!(clock.slowest, Duration::ZERO);
}

/// Stopped for an hour, the process has aged by two looks.
#[test]
fn who_was_stopped_has_not_aged() {
    let activity = Activity::default();
    let mut clock = Clock::new(DEADLINE);
    let hour = Duration::from_secs(3600);
    assert_eq!(
        clock.look(&activity.look(), Duration::ZERO, &ALONE, hour),
        None
    );
    assert_eq!(clock.still, Duration::from_secs(2));
}

#[test]
fn what_is_said_of_a_task() {
    let activity = Activity::default();
    activity.at("step 3");
    let said = || Said::of(&activity.look());
    assert_eq!(said().patience, Patience::Usual);
    let _task = activity.long("saving");
    assert_eq!(
        said(),
        Said {
            patience: Patience::Long,
            moves: 2,
            what: "saving".into()
        }
    );
    activity.at("a file");
    assert_eq!(said().what, "saving, a file");
    let waits = activity.wait();
    assert_eq!(said().patience, Patience::Usual);
    drop(waits);
    assert_eq!(Said::decode(&said().encode()), Some(said()));
    for wrong in [&[][..], &[2; 8], &[9; 20]] {
        assert_eq!(Said::decode(wrong), None);
    }
}
