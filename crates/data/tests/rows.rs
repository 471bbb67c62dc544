//! Rows: what a window holds, and that rows are a pure function of (dataset, seed, index).

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use common::{build_ok, config, text_files};
use proptest::prelude::*;
use ttt_data::{DataError, Dataset, IGNORE, Loader, Row, Sampler, Split};

struct Fixture {
    _dir: tempfile::TempDir,
    train: Arc<Dataset>,
    validation: Arc<Dataset>,
    /// Token stream of each source, read one by one.
    streams: Vec<Vec<u32>>,
}

/// Three sources with weights 1, 2 and 5, in many small shards.
fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let sources = [("a", 90, 1.0), ("b", 40, 2.0), ("c", 25, 5.0)];
        let folders: Vec<_> = sources
            .iter()
            .enumerate()
            .map(|(seed, (name, documents, _))| {
                text_files(&dir.path().join(name), seed as u64, *documents)
            })
            .collect();
        let specs: Vec<_> = sources
            .iter()
            .zip(&folders)
            .map(|(s, folder)| (s.0, folder.as_path(), s.2))
            .collect();
        let out = dir.path().join("out");
        build_ok(&config(&out, &specs));
        let train = Arc::new(Dataset::open(&out, Split::Train).unwrap());
        let validation = Arc::new(Dataset::open(&out, Split::Validation).unwrap());
        let streams = (0..3)
            .map(|source| {
                let mut stream: Vec<u32> = (0..train.source_windows(source, 1))
                    .map(|window| train.window(source, window, 1).unwrap().input_ids[0])
                    .collect();
                stream.push(train.manifest().eos_id); // the last token of a stream is only ever a label
                stream
            })
            .collect();
        Fixture {
            _dir: dir,
            train,
            validation,
            streams,
        }
    })
}

/// What the window must hold, worked out token by token from the stream.
fn expected(stream: &[u32], eos: u32, window: usize, n: usize) -> Row {
    let at = window * n;
    let begins = |position: usize| position == 0 || stream[position - 1] == eos;
    Row {
        input_ids: stream[at..at + n].to_vec(),
        labels: (at..at + n)
            .map(|i| if begins(i + 1) { IGNORE } else { stream[i + 1] })
            .collect(),
        document_starts: (0..n as u32)
            .filter(|&i| i == 0 || begins(at + i as usize))
            .collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn windows_hold_the_stream_and_mark_its_documents(n in 1usize..700, source in 0usize..3) {
        let Fixture { train, streams, .. } = fixture();
        let windows = train.source_windows(source, n);
        prop_assert_eq!(windows as usize, (streams[source].len() - 1) / n);
        for window in 0..windows {
            let row = train.window(source, window, n).unwrap();
            prop_assert_eq!(row, expected(&streams[source], train.manifest().eos_id, window as usize, n));
        }
        let beyond = train.window(source, windows, n);
        let refused = matches!(beyond, Err(DataError::RowOutOfRange { .. }));
        prop_assert!(refused);
    }

    #[test]
    fn an_epoch_of_a_source_reads_every_window_once(n in 16usize..200, seed in any::<u64>()) {
        let Fixture { train, .. } = fixture();
        let sampler = Sampler::new(Arc::clone(train), n, 4, seed).unwrap();
        let mut seen = vec![Vec::new(); 3];
        // Enough rows for more than one epoch of each source.
        for index in 0..3 * 1024 {
            let (source, window) = sampler.locate(index);
            seen[source].push(window);
        }
        // Rows inside a block are permuted, so a window may come early or late by a block; whole blocks sum up exactly.
        for (source, windows) in seen.into_iter().enumerate() {
            let (count, drawn) = (train.source_windows(source, n), windows.len() as u64);
            let mut times = BTreeMap::new();
            windows.into_iter().for_each(|window| *times.entry(window).or_insert(0u64) += 1);
            let full = drawn / count;
            let even = (0..count).all(|window| {
                let times = times.get(&window).copied().unwrap_or(0);
                times == full || times == full + 1
            });
            prop_assert!(even, "source {source}");
        }
    }

    #[test]
    fn a_batch_is_the_same_however_ranks_share_it(
        seed in any::<u64>(), step in 0u64..1 << 30, rows in 1usize..24, cut in 0usize..24,
    ) {
        let sampler = Sampler::new(Arc::clone(&fixture().train), 32, rows, seed).unwrap();
        let cut = cut % (rows + 1);
        let whole = sampler.batch(step, 0..rows).unwrap();
        let parts = [sampler.batch(step, 0..cut).unwrap(), sampler.batch(step, cut..rows).unwrap()].concat();
        prop_assert_eq!(&whole, &parts);
        for (i, row) in whole.iter().enumerate() {
            prop_assert_eq!(row, &sampler.row(step * rows as u64 + i as u64).unwrap());
        }
        // Another number of rows per step reads the same global rows.
        let ones = Sampler::new(Arc::clone(&fixture().train), 32, 1, seed).unwrap();
        prop_assert_eq!(&ones.batch(step * rows as u64, 0..1).unwrap()[0], &whole[0]);
    }
}

#[test]
fn sources_are_drawn_by_weight_and_epochs_differ() {
    let Fixture { train, .. } = fixture();
    let sampler = Sampler::new(Arc::clone(train), 64, 8, 1).unwrap();
    let mut counts = [0; 3];
    let mut orders: Vec<Vec<u64>> = vec![Vec::new(); 3];
    for index in 0..1024 {
        let (source, window) = sampler.locate(index);
        counts[source] += 1;
        orders[source].push(window);
    }
    assert_eq!(counts, [128, 256, 640]); // 1 : 2 : 5, exact in a block of 1024
    let windows = train.source_windows(2, 64) as usize;
    assert!(orders[2].len() > 2 * windows, "no second epoch");
    assert_ne!(orders[2][..windows], orders[2][windows..2 * windows]);
    let share = sampler.epochs(2, 128); // 1024 rows
    assert!((share - 640.0 / windows as f64).abs() < 1e-9, "{share}");
}

#[test]
fn another_seed_gives_other_rows_and_another_fingerprint() {
    let Fixture {
        train, validation, ..
    } = fixture();
    let sampler = |n, rows, seed| Sampler::new(Arc::clone(train), n, rows, seed).unwrap();
    let base = sampler(32, 8, 1);
    assert_eq!(base.fingerprint(), sampler(32, 8, 1).fingerprint());
    for other in [sampler(32, 8, 2), sampler(33, 8, 1), sampler(32, 7, 1)] {
        assert_ne!(base.fingerprint(), other.fingerprint());
    }
    let same = (0..512)
        .filter(|&i| base.locate(i) == sampler(32, 8, 2).locate(i))
        .count();
    assert!(
        same < 40,
        "{same} of 512 rows are the same under another seed"
    );
    assert_ne!(
        base.fingerprint(),
        Sampler::new(Arc::clone(validation), 32, 8, 1).map_or(String::new(), |s| s.fingerprint())
    );
}

#[test]
fn unigram_entropy_is_that_of_the_token_counts() {
    let Fixture { train, streams, .. } = fixture();
    let mut counts = BTreeMap::new();
    streams
        .iter()
        .flatten()
        .for_each(|id| *counts.entry(id).or_insert(0.0) += 1.0);
    let total: f64 = counts.values().sum();
    let expected: f64 = counts
        .values()
        .map(|count| count / total * (total / count).ln())
        .sum();
    assert_eq!(total as u64, train.tokens());
    assert!((train.unigram_entropy().unwrap() - expected).abs() < 1e-9);
}

#[test]
fn validation_rows_come_in_order_over_all_sources() {
    let Fixture { validation, .. } = fixture();
    let rows = validation.sequential(50).unwrap();
    let all: Vec<_> = rows.iter().map(Result::unwrap).collect();
    assert_eq!(all.len() as u64, rows.len());
    let mut next = 0;
    for source in 0..3 {
        assert_eq!(rows.source_rows(source).start, next);
        for (window, index) in rows.source_rows(source).enumerate() {
            assert_eq!(
                all[index as usize],
                validation.window(source, window as u64, 50).unwrap()
            );
        }
        next = rows.source_rows(source).end;
    }
    assert_eq!(next, rows.len());
    assert!(matches!(
        rows.row(next),
        Err(DataError::RowOutOfRange { .. })
    ));
}

#[test]
fn a_split_without_a_row_is_refused_with_a_reason() {
    let Fixture {
        train, validation, ..
    } = fixture();
    let error = validation.sequential(1_000_000).unwrap_err();
    assert!(error.to_string().contains("validation_fraction"), "{error}");
    let error = Sampler::new(Arc::clone(train), 1_000_000, 1, 0).unwrap_err();
    assert!(matches!(error, DataError::TooFewTokens { .. }), "{error}");
    assert!(error.to_string().contains("source `a`"), "{error}");
    assert!(Sampler::new(Arc::clone(train), 0, 1, 0).is_err());
    assert!(Sampler::new(Arc::clone(train), 8, 0, 0).is_err());
}

#[test]
fn the_loader_delivers_the_sampler_s_batches_in_order() {
    let sampler = Arc::new(Sampler::new(Arc::clone(&fixture().train), 32, 6, 3).unwrap());
    let mut loader = Loader::new(Arc::clone(&sampler), 2..5, 17, 3).unwrap();
    for step in 17..40 {
        let batch = loader.next_batch().unwrap();
        assert_eq!(
            (batch.step, &batch.rows),
            (step, &sampler.batch(step, 2..5).unwrap())
        );
    }
    drop(loader); // ends the thread that is waiting to send
    assert!(matches!(
        Loader::new(Arc::clone(&sampler), 2..7, 0, 1),
        Err(DataError::RowOutOfRange { .. })
    ));

    // A step beyond the last row number: an error that is delivered, then the loader has stopped.
    let mut loader = Loader::new(sampler, 0..6, u64::MAX / 6 - 1, 2).unwrap();
    assert!(loader.next_batch().is_ok());
    let error = loop {
        match loader.next_batch() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, DataError::RowOutOfRange { .. }), "{error}");
    assert!(matches!(loader.next_batch(), Err(DataError::LoaderStopped)));
}
