//! Damaged datasets: an error that names the file, never a panic and never wrong tokens taken for right ones.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use common::{build_ok, config, prose, text_files};
use proptest::prelude::*;
use ttt_data::{
    BadRecords, DataError, Dataset, Manifest, Progress, Split, TokenType, Tokenizer, build, verify,
};

fn small_dataset(dir: &Path) -> PathBuf {
    let text = text_files(&dir.join("text"), 1, 25);
    let out = dir.join("out");
    build_ok(&config(&out, &[("x", &text, 1.0)]));
    out
}

/// Opens and reads everything, as training would.
fn read_all(out: &Path) -> Result<(), DataError> {
    for split in Split::ALL {
        let dataset = Arc::new(Dataset::open(out, split)?);
        dataset.tokenizer()?;
        for row in dataset.sequential(13)?.iter() {
            row?;
        }
    }
    Ok(())
}

#[test]
fn missing_truncated_and_foreign_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = small_dataset(dir.path());
    read_all(&out).unwrap();
    let shard = out.join("shards/x/train-00000.bin");
    let bytes = std::fs::read(&shard).unwrap();
    let open = || Dataset::open(&out, Split::Train).unwrap_err();

    std::fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(open(), DataError::ShardSize { ref path, .. } if *path == shard));
    std::fs::remove_file(&shard).unwrap();
    assert!(matches!(open(), DataError::MissingShard { ref path } if *path == shard));
    std::fs::write(&shard, [b"X", &bytes[1..]].concat()).unwrap();
    assert!(matches!(open(), DataError::CorruptShard { .. }));
    // A changed token passes the cheap checks and fails the thorough one.
    let mut changed = bytes.clone();
    let last = changed.len() - 4;
    changed[last] ^= 1;
    std::fs::write(&shard, &changed).unwrap();
    assert!(Dataset::open(&out, Split::Train).is_ok());
    assert!(
        matches!(verify(&out), Err(DataError::CorruptShard { ref path, .. }) if *path == shard)
    );
    // An id outside the vocabulary is found when it is read.
    changed[last + 1] = 0xff;
    std::fs::write(&shard, &changed).unwrap();
    assert!(matches!(
        read_all(&out),
        Err(DataError::CorruptShard { .. })
    ));
    std::fs::write(&shard, &bytes).unwrap();
    verify(&out).unwrap();

    let manifest = out.join("manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let edited = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        std::fs::write(&manifest, text.replacen(from, to, 1)).unwrap();
        open()
    };
    let error = edited("\"weight\": 1.0", "\"weight\": 2.0");
    assert!(error.to_string().contains("edited or damaged"), "{error}");
    assert!(matches!(
        edited("\"format\": 1", "\"format\": 9"),
        DataError::ManifestVersion { found: 9, .. }
    ));
    assert!(matches!(
        edited("\"format\": 1", "\"formt\": 1"),
        DataError::BadManifest { .. }
    ));
    assert!(matches!(
        edited("\"eos_id\"", "\"eos\""),
        DataError::BadManifest { .. }
    ));
    std::fs::remove_file(&manifest).unwrap();
    let error = open();
    assert!(
        matches!(error, DataError::NoManifest { .. })
            && error.to_string().contains("ttt data build"),
        "{error}"
    );
}

#[test]
fn a_tokenizer_that_did_not_make_the_shards_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = small_dataset(dir.path());
    let own = out.join("tokenizer.json");
    let text = std::fs::read_to_string(&own).unwrap();
    let other = dir.path().join("other.json");
    std::fs::write(&other, format!("{text}\n")).unwrap();
    let dataset = Dataset::open(&out, Split::Train).unwrap();
    dataset
        .check_tokenizer(&Tokenizer::load(&own).unwrap())
        .unwrap();
    let error = dataset
        .check_tokenizer(&Tokenizer::load(&other).unwrap())
        .unwrap_err();
    assert!(
        matches!(error, DataError::TokenizerMismatch { .. }),
        "{error}"
    );
    std::fs::copy(&other, &own).unwrap();
    assert!(matches!(
        dataset.tokenizer(),
        Err(DataError::TokenizerMismatch { .. })
    ));
    assert!(matches!(
        verify(&out),
        Err(DataError::TokenizerMismatch { .. })
    ));
}

#[test]
fn the_token_type_follows_the_vocabulary() {
    assert_eq!(TokenType::for_vocab(65_536).unwrap(), TokenType::U16);
    assert_eq!(TokenType::for_vocab(65_537).unwrap(), TokenType::U32);
    assert_eq!(
        TokenType::for_vocab(u64::from(u32::MAX)).unwrap(),
        TokenType::U32
    );
    // u32::MAX is the label that the loss ignores: it is no token.
    assert!(matches!(
        TokenType::for_vocab(1 << 32),
        Err(DataError::VocabTooLarge { .. })
    ));
}

/// A small file of every format, whole.
fn inputs() -> &'static [(&'static str, Vec<u8>)] {
    use arrow::array::{ArrayRef, RecordBatch, StringArray};
    static INPUTS: OnceLock<Vec<(&str, Vec<u8>)>> = OnceLock::new();
    INPUTS.get_or_init(|| {
        let texts: Vec<String> = (0..6).map(|seed| prose(seed, 20)).collect();
        let jsonl: String = texts
            .iter()
            .map(|text| format!("{}\n", serde_json::json!({ "text": text })))
            .collect();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        gz.write_all(jsonl.as_bytes()).unwrap();
        let column: ArrayRef = Arc::new(StringArray::from_iter_values(&texts));
        let batch = RecordBatch::try_from_iter([("text", column)]).unwrap();
        let mut parquet = Vec::new();
        let mut writer =
            parquet::arrow::ArrowWriter::try_new(&mut parquet, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        vec![
            ("x.txt", texts.concat().into_bytes()),
            ("x.jsonl", jsonl.clone().into_bytes()),
            ("x.jsonl.gz", gz.finish().unwrap()),
            (
                "x.jsonl.zst",
                zstd::encode_all(jsonl.as_bytes(), 3).unwrap(),
            ),
            ("x.parquet.zst", zstd::encode_all(&parquet[..], 3).unwrap()),
            ("x.parquet", parquet),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes anywhere in any file of a dataset: an error or, where the cheap checks cannot tell, rows of ids that
    /// lie inside the vocabulary.
    #[test]
    fn corrupted_files_never_panic(
        file in 0usize..4,
        place in any::<prop::sample::Index>(),
        bytes in prop::collection::vec(any::<u8>(), 1..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        thread_local! {
            static DATASET: (tempfile::TempDir, PathBuf) = {
                let dir = tempfile::tempdir().unwrap();
                let out = small_dataset(dir.path());
                (dir, out)
            };
        }
        DATASET.with(|(_, out)| {
            let name = ["manifest.json", "tokenizer.json", "shards/x/train-00000.bin", "shards/x/validation-00000.bin"];
            let path = out.join(name[file]);
            let whole = std::fs::read(&path).unwrap();
            let mut damaged = whole.clone();
            let at = place.index(damaged.len());
            for (to, byte) in damaged[at..].iter_mut().zip(&bytes) {
                *to = *byte;
            }
            if let Some(cut) = cut {
                damaged.truncate(cut.index(damaged.len()));
            }
            std::fs::write(&path, &damaged).unwrap();
            let result = read_all(out);
            let verified = verify(out);
            std::fs::write(&path, &whole).unwrap();
            // A manifest with other white space says the same.
            let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).ok();
            let same = damaged == whole || (file == 0 && json(&damaged) == json(&whole));
            if !same {
                prop_assert!(verified.is_err(), "verify does not see the damage");
            }
            if let Err(error) = result {
                prop_assert!(!error.to_string().is_empty());
            }
            Ok(())
        })?;
    }

    /// Any bytes anywhere in an input file: a build that fails names the file, and none panics.
    #[test]
    fn corrupted_inputs_never_panic(
        kind in 0usize..6,
        place in any::<prop::sample::Index>(),
        bytes in prop::collection::vec(any::<u8>(), 1..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
        skip in any::<bool>(),
    ) {
        let (name, whole) = &inputs()[kind];
        let dir = tempfile::tempdir().unwrap();
        let mut damaged = whole.clone();
        let at = place.index(damaged.len());
        for (to, byte) in damaged[at..].iter_mut().zip(&bytes) {
            *to = *byte;
        }
        if let Some(cut) = cut {
            damaged.truncate(cut.index(damaged.len()));
        }
        let input = dir.path().join(name);
        std::fs::write(&input, damaged).unwrap();
        let mut config = config(&dir.path().join("out"), &[("x", &input, 1.0)]);
        if skip {
            config.bad_records = BadRecords::Skip;
        }
        match build(&config, Progress::Hidden) {
            Ok(_) => {
                verify(&config.out).unwrap();
            }
            Err(DataError::EmptyDataset { .. }) => {}
            Err(error) => prop_assert!(error.to_string().contains(name), "{}", error),
        }
    }

    #[test]
    fn random_text_is_no_manifest(text in ".{0,200}") {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("manifest.json"), text).unwrap();
        prop_assert!(Manifest::load(dir.path()).is_err());
    }
}
