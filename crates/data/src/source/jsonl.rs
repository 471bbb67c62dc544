//! JSON Lines: one JSON object a line, its text under one key.

use std::borrow::Cow;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use super::decompress;
use super::discover::InputFile;
use super::read::{Content, Event, RawDocument, ReadOptions, Sink};
use crate::DataError;

/// A longer line is taken for a mistake in the choice of file.
const MAX_LINE_BYTES: u64 = 1 << 30;

/// Hands out the non-blank lines of `file`, not yet parsed.
pub(super) fn read(
    file: &InputFile,
    options: &ReadOptions,
    sink: &mut Sink<'_>,
) -> Result<bool, DataError> {
    let path: Arc<str> = file.path.to_string_lossy().into();
    let mut reader =
        BufReader::with_capacity(1 << 20, decompress::open(file, &options.bytes_read)?);
    for line in 1.. {
        let mut bytes = Vec::new();
        let count = (&mut reader)
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(DataError::io(&file.path, "read"))?;
        if count == 0 {
            break;
        }
        if count as u64 > MAX_LINE_BYTES {
            return Err(DataError::LineTooLong {
                location: format!("{path}:{line}"),
                limit: MAX_LINE_BYTES,
            });
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let content = Content::JsonLine(bytes);
        if !sink(Event::Document(RawDocument {
            content,
            path: Arc::clone(&path),
            line,
        }))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The string under `text_key` of the object in `line`; its other values are passed over without being built.
pub(super) fn text_of<'l>(
    line: &'l [u8],
    text_key: &str,
    location: impl Fn() -> String,
) -> Result<Cow<'l, str>, DataError> {
    let line = std::str::from_utf8(line).map_err(|error| DataError::InvalidUtf8 {
        location: location(),
        byte: error.valid_up_to() as u64,
    })?;
    let line = line.trim_start_matches('\u{feff}');
    let mut parser = serde_json::Deserializer::from_str(line);
    let found = TextSeed { text_key }
        .deserialize(&mut parser)
        .and_then(|found| parser.end().map(|()| found))
        .map_err(|error| DataError::InvalidJson {
            location: location(),
            reason: error.to_string(),
        })?;
    let missing = |found: &str| DataError::MissingText {
        location: location(),
        key: text_key.to_string(),
        found: found.to_string(),
    };
    match found {
        Found::Text(text) => Ok(text),
        Found::Other(kind) => Err(missing(&format!("it holds {kind}"))),
        Found::Missing(keys) if keys.is_empty() => Err(missing("the object is empty")),
        Found::Missing(keys) => Err(missing(&format!("the keys are {}", keys.join(", ")))),
    }
}

enum Found<'l> {
    Text(Cow<'l, str>),
    Other(&'static str),
    Missing(Vec<String>),
}

struct TextSeed<'k> {
    text_key: &'k str,
}

impl<'l> DeserializeSeed<'l> for TextSeed<'_> {
    type Value = Found<'l>;

    fn deserialize<D: serde::Deserializer<'l>>(
        self,
        deserializer: D,
    ) -> Result<Found<'l>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'l> Visitor<'l> for TextSeed<'_> {
    type Value = Found<'l>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'l>>(self, mut map: A) -> Result<Found<'l>, A::Error> {
        const KEYS_IN_MESSAGE: usize = 8;
        let (mut text, mut keys) = (None, Vec::new());
        while let Some(key) = map.next_key::<Key<'l>>()? {
            if key.0 == self.text_key {
                text = Some(map.next_value_seed(ValueSeed)?);
            } else {
                map.next_value::<IgnoredAny>()?;
                if text.is_none() && keys.len() < KEYS_IN_MESSAGE {
                    keys.push(key.0.into_owned());
                }
            }
        }
        Ok(text.unwrap_or(Found::Missing(keys)))
    }
}

/// A key, borrowed from the line where it has no escapes.
#[derive(serde::Deserialize)]
struct Key<'l>(#[serde(borrow)] Cow<'l, str>);

/// The value under the text key: a string, or the name of what is there instead.
struct ValueSeed;

impl<'l> DeserializeSeed<'l> for ValueSeed {
    type Value = Found<'l>;

    fn deserialize<D: serde::Deserializer<'l>>(
        self,
        deserializer: D,
    ) -> Result<Found<'l>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'l> Visitor<'l> for ValueSeed {
    type Value = Found<'l>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_borrowed_str<E>(self, text: &'l str) -> Result<Found<'l>, E> {
        Ok(Found::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Found<'l>, E> {
        Ok(Found::Text(Cow::Owned(text.to_string())))
    }

    fn visit_unit<E>(self) -> Result<Found<'l>, E> {
        Ok(Found::Other("null"))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Found<'l>, E> {
        Ok(Found::Other("a boolean"))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Found<'l>, E> {
        Ok(Found::Other("a number"))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Found<'l>, E> {
        Ok(Found::Other("a number"))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Found<'l>, E> {
        Ok(Found::Other("a number"))
    }

    fn visit_seq<A: serde::de::SeqAccess<'l>>(self, mut list: A) -> Result<Found<'l>, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Found::Other("a list"))
    }

    fn visit_map<A: MapAccess<'l>>(self, mut map: A) -> Result<Found<'l>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Found::Other("an object"))
    }
}
