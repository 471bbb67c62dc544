//! Hostile headers and indexes, in memory: none panics, and what is accepted is sound.

use proptest::prelude::*;

use super::{bytes_of, json_bytes, parse};
use crate::index::WeightIndex;

const SOUND: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[2,1],"data_offsets":[8,12]}}"#;
const INDEX: &str = r#"{"metadata":{},"weight_map":{"a":"x.safetensors","b":"y.safetensors"}}"#;

/// A safetensors file from its JSON and the size of its data.
fn file(json: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 7);
    bytes
}

/// Reads a whole file's bytes as a shard is opened. Whether it was accepted.
fn read(bytes: &[u8]) -> bool {
    let Some((first, rest)) = bytes.split_first_chunk::<8>() else {
        return false;
    };
    let Ok(length) = json_bytes(*first, bytes.len() as u64) else {
        return false;
    };
    let (json, data) = rest.split_at(length as usize);
    let Ok(header) = parse(json, data.len() as u64) else {
        return false;
    };
    let mut covered = 0;
    for entry in header.tensors.values() {
        assert!(entry.begin <= entry.end && entry.end <= data.len() as u64);
        let bytes = bytes_of(entry.dtype, &entry.shape).expect("a possible shape");
        assert_eq!(bytes as u64, entry.end - entry.begin);
        covered += entry.end - entry.begin;
    }
    assert_eq!(covered, data.len() as u64);
    true
}

#[test]
fn the_sound_file_is_accepted() {
    assert!(read(&file(SOUND, 12)));
    assert!(WeightIndex::parse(INDEX.as_bytes()).is_ok());
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

/// Text of the tokens that headers and indexes are made of: gets past the parser's first bytes far
/// more often than random bytes do.
fn token_soup() -> impl Strategy<Value = String> {
    const TOKENS: [&str; 22] = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"a\"",
        "\"b\"",
        "\"dtype\"",
        "\"shape\"",
        "\"data_offsets\"",
        "\"F32\"",
        "\"F4\"",
        "\"BF16\"",
        "0",
        "4",
        "18446744073709551615",
        "-1",
        "\"__metadata__\"",
        "\"weight_map\"",
        "\"../x.safetensors\"",
        "null",
    ];
    let tokens = prop::sample::select(&TOKENS[..]);
    prop::collection::vec(tokens, 0..30).prop_map(|tokens| tokens.concat())
}

/// Well-formed headers with arbitrary numbers.
fn arbitrary_header() -> impl Strategy<Value = Vec<u8>> {
    let number = || prop_oneof![0..20u64, Just(u64::MAX), Just(u64::MAX / 2), any::<u64>()];
    let dtype = prop::sample::select(vec!["F32", "BF16", "F4", "U8", "I64", "F6_E2M3"]);
    let shape = prop::collection::vec(number(), 0..4);
    prop::collection::vec((dtype, shape, number(), number()), 0..4).prop_map(|tensors| {
        let entries: Vec<String> = tensors
            .iter()
            .enumerate()
            .map(|(i, (dtype, shape, begin, end))| {
                format!(
                    r#""{i}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#
                )
            })
            .collect();
        file(&format!("{{{}}}", entries.join(",")), 16)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40_000) })]

    #[test]
    fn damaged_headers_never_panic(bytes in damaged(file(SOUND, 12))) {
        read(&bytes);
    }

    #[test]
    fn arbitrary_headers_never_panic(bytes in arbitrary_header()) {
        read(&bytes);
    }

    #[test]
    fn header_soup_never_panics(json in token_soup()) {
        read(&file(&json, 4));
    }

    #[test]
    fn damaged_indexes_never_panic(bytes in damaged(INDEX.into())) {
        if let Ok(index) = WeightIndex::parse(&bytes) {
            for file in index.files() {
                prop_assert!(!file.split('/').any(|part| part == ".."), "{}", file);
                prop_assert!(!file.starts_with('/'), "{}", file);
            }
        }
    }

    #[test]
    fn index_soup_never_panics(json in token_soup(), bytes in prop::collection::vec(any::<u8>(), 0..20)) {
        let _ = WeightIndex::parse(json.as_bytes());
        let _ = WeightIndex::parse(&bytes);
    }
}
