//! Building: the same bytes however it is run, interrupted or not.

mod common;

use common::{build_ok, config, contents, prose, text_files, tokenizer};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use ttt_data::{
    BadRecords, BuildConfig, DataError, Dataset, DocumentUnit, Progress, SourceSpec, Split,
    Tokenizer, build, verify,
};

#[test]
fn every_document_is_stored_once_and_ends_with_eos() {
    let dir = tempfile::tempdir().unwrap();
    let text = text_files(&dir.path().join("text"), 1, 60);
    let out = dir.path().join("out");
    let manifest = build_ok(&config(&out, &[("books", &text, 1.0)]));
    verify(&out).unwrap();

    let source = &manifest.sources[0];
    assert_eq!(source.train.documents + source.validation.documents, 60);
    assert!(
        source.validation.documents > 0,
        "seed gives no validation document"
    );
    assert!(source.train.shards.len() > 1, "one shard tests no seam");
    let bytes: u64 = (0..60)
        .map(|i| {
            std::fs::metadata(text.join(format!("{i:04}.txt")))
                .unwrap()
                .len()
        })
        .sum();
    assert_eq!(
        source.train.text_bytes + source.validation.text_bytes,
        bytes
    );

    // Reading token by token gives back exactly the documents, in some order.
    let mut stored = Vec::new();
    for split in Split::ALL {
        let dataset = Arc::new(Dataset::open(&out, split).unwrap());
        let tokenizer = dataset.tokenizer().unwrap();
        let mut ids: Vec<u32> = dataset
            .sequential(1)
            .unwrap()
            .iter()
            .map(|row| row.unwrap().input_ids[0])
            .collect();
        ids.push(manifest.eos_id); // the last token is a label only
        for document in ids.split_inclusive(|&id| id == manifest.eos_id) {
            stored.push(tokenizer.decode(document).unwrap());
        }
    }
    stored.sort();
    let mut written: Vec<_> = (0..60)
        .map(|i| std::fs::read_to_string(text.join(format!("{i:04}.txt"))).unwrap())
        .collect();
    written.sort();
    assert!(stored == written);
}

#[test]
fn bytes_do_not_depend_on_threads_or_on_where_the_inputs_lie() {
    let dir = tempfile::tempdir().unwrap();
    let one = text_files(&dir.path().join("one"), 1, 50);
    let two = text_files(&dir.path().join("elsewhere/two"), 1, 50);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    build_ok(&BuildConfig {
        threads: 1,
        ..config(&a, &[("x", &one, 1.0)])
    });
    build_ok(&BuildConfig {
        threads: 5,
        ..config(&b, &[("x", &two, 1.0)])
    });
    let without_stamp = |dir| {
        let mut files = contents(dir);
        files.retain(|(name, _)| name != "build.jsonl"); // it stamps modification times
        files
    };
    assert!(without_stamp(&a) == without_stamp(&b));
}

#[test]
fn a_text_lies_in_the_same_split_in_every_build() {
    let dir = tempfile::tempdir().unwrap();
    let text = text_files(&dir.path().join("text"), 3, 40);
    let text_of = |out: &std::path::Path| {
        let dataset = Arc::new(Dataset::open(out, Split::Validation).unwrap());
        let tokenizer = dataset.tokenizer().unwrap();
        let ids: Vec<u32> = dataset
            .sequential(1)
            .unwrap()
            .iter()
            .map(|row| row.unwrap().input_ids[0])
            .collect();
        let mut documents: Vec<_> = ids
            .split(|&id| id == dataset.manifest().eos_id)
            .map(|ids| tokenizer.decode(ids).unwrap())
            .collect();
        documents.sort();
        documents
    };
    let first = dir.path().join("first");
    build_ok(&config(&first, &[("x", &text, 1.0)]));
    // A copy of every document and other documents around them change nothing.
    for index in 0..40 {
        std::fs::copy(
            text.join(format!("{index:04}.txt")),
            text.join(format!("{index:04}-copy.txt")),
        )
        .unwrap();
    }
    let second = dir.path().join("second");
    build_ok(&config(&second, &[("x", &text, 1.0)]));
    let (first, mut second) = (text_of(&first), text_of(&second));
    second.dedup();
    assert_eq!(first, second);
}

#[test]
fn a_lost_shard_is_restored_by_the_same_command() {
    let dir = tempfile::tempdir().unwrap();
    let a = text_files(&dir.path().join("a"), 1, 70);
    let b = text_files(&dir.path().join("b"), 2, 40);
    let out = dir.path().join("out");
    let config = config(&out, &[("a", &a, 1.0), ("b", &b, 2.0)]);
    build_ok(&config);
    let whole = contents(&out);
    let shards: Vec<_> = whole
        .iter()
        .map(|(name, _)| name.clone())
        .filter(|name| name.ends_with(".bin"))
        .collect();
    assert!(shards.len() > 6);
    for lost in &shards {
        std::fs::remove_file(out.join(lost)).unwrap();
        assert!(matches!(verify(&out), Err(DataError::MissingShard { .. })));
        build_ok(&config);
        let names = |files: &[(String, Vec<u8>)]| {
            files.iter().map(|file| file.0.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&contents(&out)), names(&whole));
        // The journal may list the shards in another order.
        for (now, before) in contents(&out)
            .iter()
            .zip(&whole)
            .filter(|(now, _)| now.0 != "build.jsonl")
        {
            assert!(now == before, "{} differs after restoring {lost}", now.0);
        }
    }
}

#[test]
fn every_cut_of_the_journal_leads_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let lines: String = (0..120)
        .map(|i| {
            format!(
                "{}\n",
                serde_json::json!({ "text": prose(i, 10 + i as usize % 40) })
            )
        })
        .collect();
    let records = dir.path().join("records.jsonl");
    std::fs::write(&records, lines).unwrap();
    let text = text_files(&dir.path().join("text"), 5, 30);
    std::fs::write(text.join("0007b.txt"), "").unwrap();
    std::fs::write(text.join("0012b.txt"), b"\0binary").unwrap();
    let out = dir.path().join("out");
    let config = config(&out, &[("records", &records, 1.0), ("text", &text, 1.0)]);
    let manifest = build_ok(&config);
    assert_eq!(manifest.sources[1].skipped.empty_documents, 1);
    assert_eq!(manifest.sources[1].skipped.binary_files, 1);
    let whole = contents(&out);
    let journal = std::fs::read(out.join("build.jsonl")).unwrap();
    for keep in (0..journal.len()).step_by(97) {
        // As a kill leaves it: no manifest, the journal's tail and the shards that it does not list lost.
        std::fs::remove_file(out.join("manifest.json")).unwrap();
        std::fs::write(out.join("build.jsonl"), &journal[..keep]).unwrap();
        std::fs::write(
            out.join("shards/text/train-00000.bin.partial"),
            "half a shard",
        )
        .unwrap();
        if keep % 2 == 0 {
            let kept = String::from_utf8_lossy(&journal[..keep]).into_owned();
            for (name, _) in whole
                .iter()
                .filter(|(name, _)| name.ends_with(".bin") && !kept.contains(name))
            {
                std::fs::remove_file(out.join(name)).unwrap();
            }
        }
        build_ok(&config);
        assert!(
            contents(&out) == whole,
            "journal cut at byte {keep} of {}",
            journal.len()
        );
    }
}

/// The process that the next test kills: builds what the environment names.
#[test]
#[ignore = "started by another test"]
fn child_that_builds() {
    let out = std::path::PathBuf::from(std::env::var_os("TEST_OUT").unwrap());
    let text = std::path::PathBuf::from(std::env::var_os("TEST_TEXT").unwrap());
    let tokenizer = std::env::var_os("TEST_TOKENIZER").unwrap();
    build_ok(&BuildConfig {
        tokenizer: tokenizer.into(),
        ..config(&out, &[("x", &text, 1.0)])
    });
}

#[test]
fn killed_at_any_moment_and_started_again_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let text = text_files(&dir.path().join("text"), 9, 400);
    let (out, reference) = (dir.path().join("out"), dir.path().join("reference"));
    build_ok(&config(&reference, &[("x", &text, 1.0)]));
    let child = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_builds", "--ignored"])
            .env("TEST_OUT", &out)
            .env("TEST_TEXT", &text)
            .env("TEST_TOKENIZER", tokenizer())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut kills = 0;
    for attempt in 0..200 {
        let mut process = child();
        std::thread::sleep(Duration::from_millis(5 + 7 * (attempt % 9)));
        if let Some(status) = process.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        process.kill().unwrap(); // SIGKILL
        process.wait().unwrap();
        kills += 1;
    }
    assert!(kills > 1, "the build is too quick to be killed");
    assert!(child().wait().unwrap().success());
    assert!(contents(&out) == contents(&reference));
    verify(&out).unwrap();
}

#[test]
fn new_weights_change_the_manifest_alone() {
    let dir = tempfile::tempdir().unwrap();
    let text = text_files(&dir.path().join("text"), 1, 30);
    let out = dir.path().join("out");
    let first = build_ok(&config(&out, &[("x", &text, 1.0)]));
    let second = build_ok(&config(&out, &[("x", &text, 3.0)]));
    assert_eq!(second.sources[0].weight, 3.0);
    assert_eq!(first.sources[0].train, second.sources[0].train);
    assert_eq!(
        Dataset::open(&out, Split::Train).unwrap().manifest(),
        &second
    );
}

#[test]
fn other_settings_or_changed_inputs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let text = text_files(&dir.path().join("text"), 1, 30);
    let out = dir.path().join("out");
    let config = config(&out, &[("x", &text, 1.0)]);
    build_ok(&config);
    let in_use = |config: &BuildConfig| {
        let error = build(config, Progress::Hidden).unwrap_err();
        assert!(matches!(error, DataError::OutputInUse { .. }), "{error}");
    };
    in_use(&BuildConfig {
        validation_fraction: 0.2,
        ..config.clone()
    });
    // Interrupted, and the input touched since, with its size unchanged.
    std::fs::remove_file(out.join("manifest.json")).unwrap();
    let touched = text.join("0003.txt");
    let content = std::fs::read(&touched).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    std::fs::write(&touched, content).unwrap();
    in_use(&config);
    // Another build at work in the folder.
    let lock = std::fs::File::create(out.join("build.lock")).unwrap();
    lock.lock().unwrap();
    let error = build(&config, Progress::Hidden).unwrap_err();
    assert!(matches!(error, DataError::BuildRunning { .. }), "{error}");
}

#[test]
fn a_directory_makes_one_document() {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("b/2.rs", "two"),
        ("b/1.py", "one\n"),
        ("a.md", "top"),
        (".git/x.txt", "no"),
        ("b/x.bin", "no"),
    ] {
        let path = dir.path().join("tree").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let out = dir.path().join("out");
    let mut config = config(&out, &[("code", &dir.path().join("tree"), 1.0)]);
    config.sources[0].document = Some(DocumentUnit::Directory);
    config.validation_fraction = 0.0;
    let manifest = build_ok(&config);
    let source = &manifest.sources[0];
    assert_eq!(
        (
            source.train.documents,
            source.skipped.hidden,
            source.skipped.other_files
        ),
        (2, 1, 1)
    );
    let dataset = Arc::new(Dataset::open(&out, Split::Train).unwrap());
    let ids: Vec<u32> = dataset
        .sequential(1)
        .unwrap()
        .iter()
        .map(|row| row.unwrap().input_ids[0])
        .collect();
    let tokenizer = dataset.tokenizer().unwrap();
    let mut documents: Vec<_> = ids
        .split(|&id| id == manifest.eos_id)
        .map(|ids| tokenizer.decode(ids).unwrap())
        .collect();
    documents.sort();
    assert_eq!(documents, ["one\n\ntwo", "top"]);
}

#[test]
fn long_documents_are_cut_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("long.txt");
    let text = prose(4, 2000);
    std::fs::write(&file, &text).unwrap();
    let out = dir.path().join("out");
    let manifest = build_ok(&BuildConfig {
        max_document_bytes: 1000,
        validation_fraction: 0.0,
        ..config(&out, &[("x", &file, 1.0)])
    });
    let source = &manifest.sources[0];
    assert_eq!(source.skipped.cut_documents, 1);
    assert_eq!(source.train.text_bytes, text.len() as u64);
    assert!(
        source.train.documents as usize >= text.len() / 1000,
        "{}",
        source.train.documents
    );
}

#[test]
fn text_that_spells_eos_does_not_end_a_document() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.txt");
    std::fs::write(&file, "before <|endoftext|> after, and more").unwrap();
    let out = dir.path().join("out");
    build_ok(&BuildConfig {
        validation_fraction: 0.0,
        ..config(&out, &[("x", &file, 1.0)])
    });
    let dataset = Arc::new(Dataset::open(&out, Split::Train).unwrap());
    let eos = dataset.manifest().eos_id;
    let ids: Vec<u32> = dataset
        .sequential(1)
        .unwrap()
        .iter()
        .map(|row| row.unwrap().input_ids[0])
        .collect();
    assert!(!ids.contains(&eos));
    assert_eq!(
        Tokenizer::load(&tokenizer()).unwrap().decode(&ids).unwrap(),
        "before <|endoftext|> after, and more"
    );
}

#[test]
fn formats_and_compressions_give_the_same_documents() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..40).map(|seed| prose(seed, 30)).collect();
    let jsonl: String = texts
        .iter()
        .map(|text| {
            format!(
                "{}\n",
                serde_json::json!({ "id": [1, {"text": 2}], "body": text, "z": null })
            )
        })
        .collect();
    let gz = |bytes: &[u8]| {
        // Two members, as concatenated files have.
        let mut all = Vec::new();
        for half in [&bytes[..bytes.len() / 2], &bytes[bytes.len() / 2..]] {
            let mut encoder = flate2::write::GzEncoder::new(&mut all, Default::default());
            encoder.write_all(half).unwrap();
            encoder.finish().unwrap();
        }
        all
    };
    let zst = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
    let parquet = parquet_of(&texts);
    let mut reference = None;
    for (name, bytes) in [
        ("a.jsonl", jsonl.clone().into_bytes()),
        ("a.jsonl.gz", gz(jsonl.as_bytes())),
        ("a.ndjson.zst", zst(jsonl.as_bytes())),
        ("a.parquet", parquet.clone()),
        ("a.parquet.gz", gz(&parquet)),
        ("a.parquet.zst", zst(&parquet)),
    ] {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        let out = dir.path().join(format!("out-{name}"));
        let mut config = config(&out, &[("x", &file, 1.0)]);
        config.sources[0].text_key = "body".into();
        let manifest = build_ok(&config);
        let shards: Vec<_> = contents(&out)
            .into_iter()
            .filter(|(name, _)| name.ends_with(".bin"))
            .collect();
        assert_eq!(
            manifest.documents(Split::Train) + manifest.documents(Split::Validation),
            40
        );
        assert!(
            reference.get_or_insert_with(|| shards.clone()) == &shards,
            "{name}"
        );
    }
}

fn parquet_of(texts: &[String]) -> Vec<u8> {
    use arrow::array::{ArrayRef, Int32Array, RecordBatch, StringArray};
    let body: ArrayRef = Arc::new(StringArray::from_iter_values(texts));
    let id: ArrayRef = Arc::new(Int32Array::from_iter_values(0..texts.len() as i32));
    let batch = RecordBatch::try_from_iter([("id", id), ("body", body)]).unwrap();
    let mut bytes = Vec::new();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn bad_records_are_named_or_skipped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let good = serde_json::json!({ "text": prose(1, 50) }).to_string();
    let file = dir.path().join("x.jsonl");
    let bad: [(&[u8], &str); 6] = [
        (b"{\"text\": \"open", "not a JSON object"),
        (b"[\"text\"]", "not a JSON object"),
        (b"{\"text\": \"a\"} more", "not a JSON object"),
        (b"{\"content\": \"a\"}", "the keys are content"),
        (b"{\"text\": 3}", "a number"),
        (b"{\"text\": \"\xff\"}", "UTF-8"),
    ];
    for (index, (line, message)) in bad.iter().enumerate() {
        std::fs::write(
            &file,
            [good.as_bytes(), b"\n\n", line, b"\n", good.as_bytes()].concat(),
        )
        .unwrap();
        let config = config(
            &dir.path().join(format!("out{index}")),
            &[("x", &file, 1.0)],
        );
        let error = build(&config, Progress::Hidden).unwrap_err().to_string();
        assert!(
            error.contains(message) && error.contains("x.jsonl:3"),
            "{error}"
        );
        let skip = BuildConfig {
            bad_records: BadRecords::Skip,
            out: dir.path().join(format!("skip{index}")),
            ..config
        };
        assert_eq!(build_ok(&skip).sources[0].skipped.bad_records, 1);
    }
    // A text file that is not UTF-8 names the byte; skipped, it is counted.
    let latin = dir.path().join("latin.txt");
    std::fs::write(&latin, b"caf\xe9").unwrap();
    let mut config = config(
        &dir.path().join("latin"),
        &[("x", &latin, 1.0), ("y", &file, 1.0)],
    );
    config.bad_records = BadRecords::Skip;
    let error = build(&config, Progress::Hidden).unwrap_err();
    assert!(
        matches!(error, DataError::EmptyDataset { ref sources } if sources == "x"),
        "{error}"
    );
    config.bad_records = BadRecords::Refuse;
    config.out = dir.path().join("latin-refused");
    let error = build(&config, Progress::Hidden).unwrap_err().to_string();
    assert!(
        error.contains("latin.txt") && error.contains("byte at 3"),
        "{error}"
    );
}

#[test]
fn impossible_settings_and_inputs_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let text = text_files(&dir.path().join("text"), 1, 5);
    let base = config(&dir.path().join("out"), &[("x", &text, 1.0)]);
    let error = |change: &dyn Fn(&mut BuildConfig)| {
        let mut config = base.clone();
        change(&mut config);
        build(&config, Progress::Hidden).unwrap_err().to_string()
    };
    for (change, message) in [
        (
            &(|c: &mut BuildConfig| c.sources.clear()) as &dyn Fn(&mut BuildConfig),
            "at least one source",
        ),
        (
            &|c: &mut BuildConfig| c.sources[0].name = "../x".into(),
            "becomes a folder",
        ),
        (
            &|c: &mut BuildConfig| c.sources.push(c.sources[0].clone()),
            "names two sources",
        ),
        (
            &|c: &mut BuildConfig| c.sources[0].weight = f64::NAN,
            "not a positive number",
        ),
        (
            &|c: &mut BuildConfig| c.validation_fraction = 1.0,
            "validation_fraction",
        ),
        (&|c: &mut BuildConfig| c.shard_tokens = 0, "shard_tokens"),
        (
            &|c: &mut BuildConfig| c.sources[0].inputs = vec!["/no/such/file".into()],
            "`/no/such/file` matches no file",
        ),
        (
            &|c: &mut BuildConfig| c.sources[0].inputs = vec!["/no/such/*.txt".into()],
            "matches no file",
        ),
        (
            &|c: &mut BuildConfig| c.sources[0].inputs = vec!["a[".into()],
            "not a valid glob",
        ),
        (
            &|c: &mut BuildConfig| c.sources[0].inputs = vec!["hub:nothing".into()],
            "not a hub name",
        ),
        (
            &|c: &mut BuildConfig| c.sources[0].document = Some(DocumentUnit::Record),
            "matches no file",
        ),
        (
            &|c: &mut BuildConfig| c.tokenizer = "/no/tokenizer.json".into(),
            "/no/tokenizer.json",
        ),
        (
            &|c: &mut BuildConfig| c.eos_token = Some("<nope>".into()),
            "<nope>",
        ),
        (
            &|c: &mut BuildConfig| c.out = text.join("0001.txt").join("out"),
            "0001.txt",
        ),
        (
            &|c: &mut BuildConfig| {
                let twice = text.join("*.txt").to_string_lossy().into_owned();
                c.sources[0].inputs.push(twice);
            },
            "matched by two inputs",
        ),
    ] {
        let text = error(change);
        assert!(text.contains(message), "{text}\nlacks: {message}");
    }
    let _ = SourceSpec::new("x", ["y"]);
}
