//! Training and using tokenizers.

mod common;

use common::{prose, tokenizer};
use proptest::prelude::*;
use ttt_data::{DataError, SourceSpec, Tokenizer, train_tokenizer};

#[test]
fn the_same_text_gives_the_same_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..30)
        .map(|seed| {
            let file = dir.path().join(format!("{seed}.txt"));
            std::fs::write(&file, prose(seed, 300)).unwrap();
            file.to_string_lossy().into_owned()
        })
        .collect();
    let train = |name: &str, files: Vec<String>| {
        let out = dir.path().join(name);
        let training = train_tokenizer(&[SourceSpec::new("x", files)], 310, &out).unwrap();
        assert_eq!((training.vocab_size, training.documents), (310, 30));
        std::fs::read(out.join("tokenizer.json")).unwrap()
    };
    let first = train("a", files.clone());
    assert!(first == train("b", files.clone()));
    assert!(
        first == train("c", files.into_iter().rev().collect()),
        "the order of the files matters"
    );
}

#[test]
fn eos_is_found_by_config_by_name_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokenizer.json");
    let config = dir.path().join("tokenizer_config.json");
    std::fs::copy(tokenizer(), &file).unwrap();
    let by_name = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(Some(by_name.eos_id()), by_name.token_to_id("<|endoftext|>"));
    assert_eq!(by_name.vocab_size(), 300);
    std::fs::write(&config, r#"{"eos_token": {"content": "a"}}"#).unwrap();
    let by_config = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(Some(by_config.eos_id()), by_config.token_to_id("a"));
    std::fs::write(&config, r#"{"eos_token": "<nope>"}"#).unwrap();
    assert!(matches!(
        Tokenizer::load(dir.path()),
        Err(DataError::BadTokenizer { .. })
    ));
    std::fs::remove_file(&config).unwrap();
    let text = std::fs::read_to_string(&file)
        .unwrap()
        .replace("<|endoftext|>", "<|stop|>");
    std::fs::write(&file, text).unwrap();
    let error = Tokenizer::load(&file).unwrap_err();
    assert!(
        matches!(error, DataError::NoEos { .. }) && error.to_string().contains("eos_token"),
        "{error}"
    );
    assert!(Tokenizer::load_with_eos(&file, Some("<|stop|>"), true).is_ok());
    std::fs::write(&file, "{").unwrap();
    assert!(matches!(
        Tokenizer::load(&file),
        Err(DataError::BadTokenizer { .. })
    ));
    assert!(matches!(
        Tokenizer::load(&dir.path().join("no.json")),
        Err(DataError::Io { .. })
    ));
}

#[test]
fn impossible_training_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.txt");
    std::fs::write(&file, "").unwrap();
    let source = [SourceSpec::new("x", [file.to_string_lossy()])];
    assert!(matches!(
        train_tokenizer(&source, 256, dir.path()),
        Err(DataError::BadSetting { .. })
    ));
    assert!(matches!(
        train_tokenizer(&source, 300, dir.path()),
        Err(DataError::EmptyDataset { .. })
    ));
    assert!(!dir.path().join("tokenizer.json").exists());
}

#[test]
fn long_text_is_tokenised_as_a_whole() {
    // Longer than several pieces, with line ends, spaces and other scripts at the seams.
    let tokenizer = Tokenizer::load(&tokenizer()).unwrap();
    let text = prose(11, 120_000);
    assert!(text.len() > 4 * (128 << 10), "{}", text.len());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.txt");
    std::fs::write(&file, &text).unwrap();
    let out = dir.path().join("out");
    let config = ttt_data::BuildConfig {
        validation_fraction: 0.0,
        ..common::config(&out, &[("x", &file, 1.0)])
    };
    common::build_ok(&config);
    let dataset = ttt_data::Dataset::open(&out, ttt_data::Split::Train).unwrap();
    let whole = tokenizer.encode(&text).unwrap();
    assert_eq!(dataset.tokens(), whole.len() as u64 + 1);
    assert!(dataset.window(0, 0, whole.len()).unwrap().input_ids == whole);
}

proptest! {
    #[test]
    fn text_comes_back_at_once_and_token_by_token(text in "\\PC{0,60}|[a-zA-Z é日\u{1f600}\n]{0,80}") {
        let tokenizer = Tokenizer::load(&tokenizer()).unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(&tokenizer.decode(&ids).unwrap(), &text);
        let mut stream = tokenizer.decode_stream();
        let mut shown = String::new();
        for id in ids {
            if let Some(new) = stream.push(id).unwrap() {
                prop_assert!(!new.is_empty());
                shown.push_str(&new);
            }
        }
        shown.push_str(&stream.finish().unwrap());
        prop_assert_eq!(shown, text);
    }

    /// An untrained model gives any ids: broken characters become U+FFFD, nothing is an error.
    #[test]
    fn any_ids_decode_in_a_stream(ids in prop::collection::vec(0u32..300, 0..60)) {
        let tokenizer = Tokenizer::load(&tokenizer()).unwrap();
        let mut stream = tokenizer.decode_stream();
        for id in ids {
            stream.push(id).unwrap();
        }
        stream.finish().unwrap();
    }
}
