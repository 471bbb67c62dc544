//! Small inputs that the tests share.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ttt_data::{BuildConfig, Manifest, Progress, SourceSpec, build, train_tokenizer};

/// Text of `words` pseudo-random words, the same for the same `seed`.
pub fn prose(seed: u64, words: usize) -> String {
    const WORDS: [&str; 16] = [
        "the",
        "Emma",
        "naïve",
        "walked",
        "1815",
        "and",
        "house,",
        "said;",
        "\n",
        "日本",
        "of",
        "carriage",
        "?\n\n",
        "to",
        "  x = f(y)\n",
        "a",
    ];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut text = format!("{seed}");
    for _ in 0..words {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.push(' ');
        text.push_str(WORDS[(state >> 33) as usize % WORDS.len()]);
    }
    text
}

/// A tokenizer of 300 tokens, trained once for all tests of a file.
pub fn tokenizer() -> PathBuf {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let text = folder.path().join("text.txt");
            std::fs::write(
                &text,
                (0..20).map(|seed| prose(seed, 200)).collect::<String>(),
            )
            .unwrap();
            let source = SourceSpec::new("text", [text.to_string_lossy()]);
            train_tokenizer(&[source], 300, folder.path()).unwrap();
            folder
        })
        .path()
        .join("tokenizer.json")
}

/// Writes `documents` text files of growing length below `dir`.
pub fn text_files(dir: &Path, seed: u64, documents: usize) -> PathBuf {
    std::fs::create_dir_all(dir).unwrap();
    for index in 0..documents {
        let text = prose(seed * 1000 + index as u64, 20 + 7 * (index % 23));
        std::fs::write(dir.join(format!("{index:04}.txt")), text).unwrap();
    }
    dir.to_path_buf()
}

/// A build of `sources` (name, inputs, weight) with small shards and a tenth for validation.
pub fn config(out: &Path, sources: &[(&str, &Path, f64)]) -> BuildConfig {
    let sources = sources
        .iter()
        .map(|(name, input, weight)| SourceSpec {
            weight: *weight,
            ..SourceSpec::new(*name, [input.to_string_lossy()])
        })
        .collect();
    BuildConfig {
        validation_fraction: 0.1,
        shard_tokens: 2000,
        threads: 2,
        ..BuildConfig::new(sources, out, tokenizer())
    }
}

pub fn build_ok(config: &BuildConfig) -> Manifest {
    build(config, Progress::Hidden).unwrap()
}

/// Every file of a folder with its content, the lock aside.
pub fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with("build.lock") {
                let name = path
                    .strip_prefix(dir)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                files.push((name, std::fs::read(path).unwrap()));
            }
        }
    }
    files.sort();
    files
}
