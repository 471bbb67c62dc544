//! Typed access to a JSON object: a key of the wrong type is an error, never a default.

use serde_json::{Map, Value};

use super::{HfConfigError, refuse};

pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// What precedes a key in messages.
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    pub(super) fn new(json: &'a Value, prefix: &'static str) -> Result<Self, HfConfigError> {
        match json.as_object() {
            Some(map) => Ok(Self { map, prefix }),
            None => refuse(format!("{prefix}expected an object, got {}", short(json))),
        }
    }

    /// Whether the key is there, null included.
    pub(super) fn contains(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Whether the key is there and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a String> {
        self.map.keys()
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, HfConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => {
                let (prefix, found) = (self.prefix, short(value));
                refuse(format!("{prefix}{key} must be {expected}, got {found}"))
            }
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<usize>, HfConfigError> {
        self.typed(key, "a whole number", |value| {
            usize::try_from(value.as_u64()?).ok()
        })
    }

    pub(super) fn real(&self, key: &str) -> Result<Option<f64>, HfConfigError> {
        self.typed(key, "a number", |value| {
            value.as_f64().filter(|x| x.is_finite())
        })
    }

    /// A number above zero.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>, HfConfigError> {
        self.typed(key, "a number above 0", |value| {
            value.as_f64().filter(|&x| x.is_finite() && x > 0.0)
        })
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, HfConfigError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, HfConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>, HfConfigError> {
        self.typed(key, "a list", Value::as_array)
    }

    /// A size that must be there, from 1 to `limit`.
    pub(super) fn size(&self, key: &str, limit: usize) -> Result<usize, HfConfigError> {
        let prefix = self.prefix;
        match self.number(key)? {
            None => refuse(format!("{prefix}{key} is missing")),
            Some(size) if (1..=limit).contains(&size) => Ok(size),
            Some(size) => refuse(format!("{prefix}{key} must be 1 to {limit}, got {size}")),
        }
    }
}

/// A value as it may stand in a message.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
