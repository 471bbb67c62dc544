//! The text that ships with the repository, and the figures that `data/README.md` gives for it.

use std::path::{Path, PathBuf};

use ttt_data::{
    BuildConfig, Dataset, DocumentUnit, Progress, SourceSpec, Split, build, train_tokenizer,
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/austen")
}

/// All chapters, sorted by path.
fn chapters() -> Vec<String> {
    let mut paths: Vec<_> = std::fs::read_dir(folder())
        .unwrap()
        .flat_map(|novel| std::fs::read_dir(novel.unwrap().path()).unwrap())
        .map(|chapter| chapter.unwrap().path())
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect()
}

#[test]
fn the_text_is_plain_and_as_described() {
    let chapters = chapters();
    assert_eq!(chapters.len(), 269);
    let text = chapters.concat();
    assert_eq!(text.len(), 4_022_002);
    assert!(
        text.chars()
            .all(|c| c == '\n' || c == '£' || !c.is_control() && c.is_ascii())
    );
    for foreign in ["Gutenberg", "Signet", "http", "End volume"] {
        assert!(!text.contains(foreign), "{foreign}");
    }
    let mut counts = [0u32; 256];
    text.bytes().for_each(|byte| counts[usize::from(byte)] += 1);
    let shares = counts
        .iter()
        .filter(|&&count| count > 0)
        .map(|&count| f64::from(count) / text.len() as f64);
    let entropy: f64 = shares.map(|share| -share * share.ln()).sum();
    assert!((entropy - 3.091).abs() < 0.0005, "{entropy} nats per byte");
}

#[test]
fn a_tokenizer_of_2048_gives_the_entropies_described() {
    let dir = tempfile::tempdir().unwrap();
    let source = SourceSpec::new("austen", [folder().to_string_lossy()]);
    let tokenizer = dir.path().join("tokenizer");
    train_tokenizer(std::slice::from_ref(&source), 2048, &tokenizer).unwrap();
    let config = BuildConfig {
        validation_fraction: 0.05,
        ..BuildConfig::new(
            vec![source.clone()],
            dir.path().join("chapters"),
            &tokenizer,
        )
    };
    let manifest = build(&config, Progress::Hidden).unwrap();
    for (split, documents, per_token, per_byte) in [
        (Split::Train, 248, 6.333, 1.877),
        (Split::Validation, 21, 6.311, 1.861),
    ] {
        let dataset = Dataset::open(&config.out, split).unwrap();
        assert_eq!(manifest.documents(split), documents);
        let entropy = dataset.unigram_entropy().unwrap();
        assert!(
            (entropy - per_token).abs() < 0.001,
            "{} nats per token of {}",
            entropy,
            split.name()
        );
        let entropy = entropy * dataset.tokens() as f64 / manifest.text_bytes(split) as f64;
        assert!(
            (entropy - per_byte).abs() < 0.001,
            "{} nats per byte of {}",
            entropy,
            split.name()
        );
    }

    // Read by directory, a document is a novel.
    let novels = SourceSpec {
        document: Some(DocumentUnit::Directory),
        ..source
    };
    let config = BuildConfig {
        validation_fraction: 0.0,
        ..BuildConfig::new(vec![novels], dir.path().join("novels"), &tokenizer)
    };
    assert_eq!(
        build(&config, Progress::Hidden)
            .unwrap()
            .documents(Split::Train),
        6
    );
}
