//! Files made to do harm, or damaged on the way, are refused with a sentence and never panic.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;
use ttt_weights::{Dtype, Folder};

/// A safetensors file from its JSON and the size of its data.
fn file(json: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 7);
    bytes
}

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, content) in files {
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn refusal(dir: &Path) -> String {
    Folder::open(dir).expect_err("must be refused").to_string()
}

fn refused_header(json: &str, data_bytes: usize) -> String {
    let dir = folder(&[("model.safetensors", &file(json, data_bytes))]);
    refusal(dir.path())
}

const SOUND: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[2,1],"data_offsets":[8,12]}}"#;

#[test]
fn the_sound_file_opens() {
    let dir = folder(&[("model.safetensors", &file(SOUND, 12))]);
    let weights = Folder::open(dir.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(weights.info("b").unwrap().dtype, Dtype::F16);
    assert_eq!(weights.info("b").unwrap().shape, [2, 1]);
    assert!(weights.info("c").is_none());
    let error = weights.read_f32("c", &mut []).unwrap_err().to_string();
    assert!(error.contains("no tensor c"), "{error}");
    let error = weights
        .read_f32("a", &mut [0.0; 3])
        .unwrap_err()
        .to_string();
    assert!(error.contains("has 2 elements, asked for 3"), "{error}");
    #[expect(clippy::reversed_empty_ranges, reason = "a caller's mistake")]
    let error = weights.read_f32_range("a", 2..1, &mut []).unwrap_err();
    assert!(error.to_string().contains("2..1 of 2"), "{error}");
}

#[test]
fn headers_that_do_not_describe_their_data_are_refused() {
    for (json, data_bytes, says) in [
        // An offset past the end, data left over, a hole, an overlap.
        (SOUND, 11, "past the 11 bytes"),
        (SOUND, 13, "take 12 bytes, 13 are there"),
        (
            &SOUND.replace("[8,12]", "[9,13]"),
            13,
            "overlaps or has a hole",
        ),
        (
            &SOUND.replace("[8,12]", "[4,8]"),
            8,
            "overlaps or has a hole",
        ),
        (&SOUND.replace("[8,12]", "[12,8]"), 12, "past the 12 bytes"),
        // A shape that does not fit its bytes, or any memory.
        (
            &SOUND.replace("[2,1]", "[3]"),
            12,
            "has 4 bytes instead of 6",
        ),
        (
            &SOUND.replace("[2,1]", "[4294967296,4294967296]"),
            12,
            "impossible shape",
        ),
        // Extreme offsets, negative ones, fractions.
        (
            &SOUND.replace("12]", "18446744073709551615]"),
            12,
            "past the 12 bytes",
        ),
        (&SOUND.replace("[8,", "[-8,"), 12, "invalid value"),
        (&SOUND.replace("[2]", "[2.5]"), 12, "invalid type"),
        // A type that is not known; a name twice; not an object; no JSON at all.
        (&SOUND.replace("F16", "F17"), 12, "unknown variant"),
        (
            &SOUND.replace(r#""b""#, r#""a""#),
            12,
            r#""a" appears twice"#,
        ),
        ("[]", 0, "expected an object of tensors"),
        ("\u{0}", 0, "its header"),
    ] {
        let error = refused_header(json, data_bytes);
        assert!(error.contains(says), "{json}: {error}");
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn repeated_metadata_is_refused() {
    let strings = r#""__metadata__":{"x":"1"}"#;
    let error = refused_header(&format!("{{{strings},{strings}}}"), 0);
    assert!(error.contains("appears twice"), "{error}");
    let error = refused_header(r#"{"__metadata__":{"x":"1","x":"2"}}"#, 0);
    assert!(error.contains("appears twice"), "{error}");
}

#[test]
fn a_header_larger_than_the_file_is_refused() {
    for (length, says) in [
        (SOUND.len() as u64 + 13, "truncated"),
        (u64::MAX, "the limit is"),
        (100_000_001, "the limit is"),
    ] {
        let mut bytes = file(SOUND, 12);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        let dir = folder(&[("model.safetensors", &bytes)]);
        let error = refusal(dir.path());
        assert!(error.contains(says), "{error}");
    }
}

fn index(map: &str) -> String {
    format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{{{map}}}}}"#)
}

#[test]
fn an_index_that_leaves_the_folder_is_refused() {
    for name in [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "a/../../secret.safetensors",
        "./a.safetensors",
        r"..\\secret.safetensors",
        "",
    ] {
        let index = index(&format!(r#""a":"{name}""#));
        let dir = folder(&[("model.safetensors.index.json", index.as_bytes())]);
        let error = refusal(dir.path());
        assert!(error.contains("leaves the folder"), "{name}: {error}");
    }
}

#[test]
fn an_index_that_does_not_match_its_shards_is_refused() {
    let sound = file(SOUND, 12);
    let both = r#""a":"x.safetensors","b":"x.safetensors""#;
    for (map, says) in [
        (
            r#""a":"x.safetensors","b":"gone.safetensors""#,
            "gone.safetensors: shard missing",
        ),
        (
            r#""a":"x.safetensors""#,
            "holds tensor b, which is not listed",
        ),
        (
            &format!(r#"{both},"c":"x.safetensors""#),
            "tensor c is said to be in x.safetensors",
        ),
        (
            &format!(r#"{both},"a":"x.safetensors""#),
            r#""a" appears twice"#,
        ),
        (&format!(r#"{both},"c":"y.safetensors""#), "is also in"),
        (r#""a":"weights.bin""#, "no safetensors file"),
        ("", "lists no tensor"),
    ] {
        let index = index(map);
        let dir = folder(&[
            ("model.safetensors.index.json", index.as_bytes()),
            ("x.safetensors", &sound),
            ("y.safetensors", &sound),
        ]);
        let error = refusal(dir.path());
        assert!(error.contains(says), "{map}: {error}");
    }
}

#[test]
fn folders_without_one_set_of_safetensors_are_refused() {
    let dir = folder(&[("pytorch_model.bin", b"x"), ("config.json", b"{}")]);
    let error = refusal(dir.path());
    assert!(
        error.contains("pytorch_model.bin: only safetensors"),
        "{error}"
    );
    let dir = folder(&[("config.json", b"{}")]);
    let error = refusal(dir.path());
    assert!(error.contains("no weights here"), "{error}");
    let dir = folder(&[
        ("model.safetensors", &file(SOUND, 12)),
        ("model.safetensors.index.json", b"{}"),
    ]);
    let error = refusal(dir.path());
    assert!(error.contains("out of date"), "{error}");
    let error = refusal(Path::new("/no/such/folder"));
    assert!(error.contains("cannot open the folder"), "{error}");
}

#[test]
fn quantised_tensors_are_refused_when_read() {
    let json = r#"{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#;
    let dir = folder(&[("model.safetensors", &file(json, 2))]);
    let weights = Folder::open(dir.path()).unwrap();
    let error = weights
        .read_f32("a", &mut [0.0; 2])
        .unwrap_err()
        .to_string();
    assert!(error.contains("a is stored as F8_E4M3"), "{error}");
}

#[test]
fn a_file_that_shrinks_while_open_is_an_error() {
    let dir = folder(&[("model.safetensors", &file(SOUND, 12))]);
    let weights = Folder::open(dir.path()).unwrap();
    fs::write(dir.path().join("model.safetensors"), b"").unwrap();
    let error = weights
        .read_f32("a", &mut [0.0; 2])
        .unwrap_err()
        .to_string();
    assert!(error.contains("changed while it was open"), "{error}");
}

#[cfg(unix)]
mod links {
    use std::os::unix::fs::symlink;

    use super::*;

    /// The layout of the hub's cache: snapshots are relative links into blobs.
    #[test]
    fn a_hub_cache_opens_through_its_links() {
        let cache = TempDir::new().unwrap();
        let model = cache.path().join("models--a--b");
        let snapshot = model.join("snapshots/0123");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(model.join("blobs")).unwrap();
        fs::write(model.join("blobs/ff00"), file(SOUND, 12)).unwrap();
        symlink("../../blobs/ff00", snapshot.join("model.safetensors")).unwrap();
        assert!(Folder::open(&snapshot).is_ok());

        // Another model's blobs are outside.
        fs::create_dir_all(cache.path().join("models--c--d/blobs")).unwrap();
        let other = cache.path().join("models--c--d/blobs/ff00");
        fs::write(other, file(SOUND, 12)).unwrap();
        fs::remove_file(snapshot.join("model.safetensors")).unwrap();
        let link = "../../../models--c--d/blobs/ff00";
        symlink(link, snapshot.join("model.safetensors")).unwrap();
        let error = refusal(&snapshot);
        assert!(error.contains("outside the folder"), "{error}");
    }

    #[test]
    fn a_link_out_of_the_folder_is_refused() {
        let outside = folder(&[("model.safetensors", &file(SOUND, 12))]);
        let dir = TempDir::new().unwrap();
        let target = outside.path().join("model.safetensors");
        symlink(target, dir.path().join("model.safetensors")).unwrap();
        let error = refusal(dir.path());
        assert!(error.contains("outside the folder"), "{error}");
        // The folder itself may be a link: its user named it.
        symlink(outside.path(), dir.path().join("link")).unwrap();
        assert!(Folder::open(&dir.path().join("link")).is_ok());
    }

    #[test]
    fn dangling_links_and_pipes_are_refused() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("model.safetensors");
        symlink("nowhere", &path).unwrap();
        let error = refusal(dir.path());
        assert!(error.contains("cannot open"), "{error}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = refusal(dir.path());
        assert!(error.contains("no regular file"), "{error}");
    }
}

/// Opens a folder with this file and, if that works, reads everything in it.
fn exercise(content: &[u8]) {
    let dir = folder(&[("model.safetensors", content)]);
    if let Ok(weights) = Folder::open(dir.path()) {
        for name in weights.names() {
            let bytes = weights.bytes(name).unwrap();
            let elements: usize = weights.info(name).unwrap().shape.iter().product();
            assert!(elements <= bytes.len() * 8);
            let _ = weights.read_f32(name, &mut vec![0.0; elements]);
        }
    }
}

/// Sound content with bytes overwritten at random places, and cut.
fn damaged(sound: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let places = prop::collection::vec((0..sound.len(), any::<u8>()), 0..4);
    let cut = prop::option::weighted(0.3, 0..sound.len());
    (places, cut).prop_map(move |(places, cut)| {
        let mut bytes = sound.clone();
        for (place, byte) in places {
            bytes[place] = byte;
        }
        bytes.truncate(cut.unwrap_or(usize::MAX));
        bytes
    })
}

proptest! {
    // Files are slow; the header's own tests run a hundred thousand cases in memory.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn damaged_files_never_panic(bytes in damaged(file(SOUND, 12))) {
        exercise(&bytes);
    }

    #[test]
    fn damaged_index_files_never_panic(
        index in damaged(index(r#""a":"x.safetensors","b":"x.safetensors""#).into_bytes()),
    ) {
        let dir = folder(&[
            ("model.safetensors.index.json", &index),
            ("x.safetensors", &file(SOUND, 12)),
        ]);
        let _ = Folder::open(dir.path());
    }
}
