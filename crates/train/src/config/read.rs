//! From text and overrides to values, with the place of every mistake.
//!
//! Overrides are spliced into the parsed tree before it is turned into values. Their spans lie
//! behind the end of the file's text, one override after the other, so that one span tells whether
//! a mistake is in the file or in which override.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use super::{Config, ConfigError, Place, base, validate};

pub(super) fn parse(text: &str, path: &Path, sets: &[String]) -> Result<Config, ConfigError> {
    let mut source = Source::new(text, path, sets);
    // What the tree borrows from must outlive it.
    let base_text;
    let mut tree = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        place: source.place(error.span()),
        problem: error.message().to_string(),
    })?;
    for (set, base) in &source.sets {
        apply(tree.get_mut(), set, *base).map_err(|problem| ConfigError::Override {
            set: set.to_string(),
            problem,
        })?;
    }
    if let Some(init) = base::wanted(tree.get_ref()) {
        let (from, model) = base::read(&init).map_err(|problem| ConfigError::Value {
            place: source.place(span_of(tree.get_ref(), "init.from")),
            key: "init.from".into(),
            problem,
        })?;
        base_text = model;
        source.base = Some(from);
        base::complete(tree.get_mut(), &base_text, source.end);
    }
    let places = tree.clone();
    let config = Config::deserialize(Deserializer::from(tree))
        .map_err(|error| explain(&error, places.get_ref(), &source))?;
    validate::validate(&config).map_err(|problem| ConfigError::Invalid {
        place: span_of(places.get_ref(), &problem.key).map(|span| source.place(Some(span))),
        key: problem.key,
        problem: problem.sentence,
    })?;
    Ok(config)
}

/// What spans point into: the file, then the overrides.
struct Source<'a> {
    text: &'a str,
    path: &'a Path,
    /// Each override and the offset of its first byte.
    sets: Vec<(&'a str, usize)>,
    /// The offset behind them all, from which what `config.json` says is numbered.
    end: usize,
    /// That file.
    base: Option<PathBuf>,
}

impl<'a> Source<'a> {
    fn new(text: &'a str, path: &'a Path, sets: &'a [String]) -> Self {
        let mut base = text.len() + 1;
        let sets = sets.iter().map(|set| {
            let begin = base;
            base += set.len() + 1;
            (set.as_str(), begin)
        });
        let sets = sets.collect();
        let (end, base) = (base, None);
        Self {
            text,
            path,
            sets,
            end,
            base,
        }
    }

    fn place(&self, span: Option<Range<usize>>) -> Place {
        let Some(begin) = span.map(|span| span.start) else {
            return Place::File(self.path.to_path_buf());
        };
        if let Some(base) = self.base.as_ref().filter(|_| begin >= self.end) {
            return Place::File(base.clone());
        }
        match self.sets.iter().rev().find(|(_, base)| *base <= begin) {
            Some((set, _)) => Place::Set(set.to_string()),
            None => Place::Line {
                path: self.path.to_path_buf(),
                line: 1 + self
                    .text
                    .bytes()
                    .take(begin)
                    .filter(|&b| b == b'\n')
                    .count(),
            },
        }
    }
}

/// Puts the override `set`, whose bytes are numbered from `base`, into the tree.
fn apply<'a>(tree: &mut DeTable<'a>, set: &'a str, base: usize) -> Result<(), String> {
    let Some((path, value)) = set.split_once('=') else {
        return Err("expected section.key=value, found no \"=\"".into());
    };
    let (path, value) = (path.trim_end(), value.trim());
    if value.is_empty() {
        return Err(
            "expected section.key=value, found nothing after \"=\" (an empty text is '\"\"')"
                .into(),
        );
    }
    let value_base = base + (value.as_ptr() as usize - set.as_ptr() as usize);
    let value = match DeValue::parse(value) {
        Ok(parsed) => moved(parsed, value_base),
        // What is no TOML value is a bare word or sentence.
        Err(_) => Spanned::new(
            value_base..value_base + value.len(),
            DeValue::String(value.into()),
        ),
    };
    let mut begin = base;
    let mut keys = vec![];
    for key in path.split('.') {
        let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if key.is_empty() || !key.chars().all(known) {
            return Err(format!(
                "expected section.key=value, found the key \"{path}\""
            ));
        }
        keys.push((key, begin..begin + key.len()));
        begin += key.len() + 1;
    }
    let Some((last, sections)) = keys.split_last().filter(|(_, rest)| !rest.is_empty()) else {
        return Err(format!(
            "expected section.key=value, found no section before \"{path}\""
        ));
    };
    let mut table = tree;
    for (i, (key, span)) in sections.iter().enumerate() {
        let entry = table
            .entry(Spanned::new(span.clone(), (*key).into()))
            .or_insert_with(|| Spanned::new(span.clone(), DeValue::Table(DeTable::new())));
        table = match entry.get_mut() {
            DeValue::Table(table) => table,
            other => {
                let prefix: Vec<_> = sections[..=i].iter().map(|(key, _)| *key).collect();
                let (prefix, kind) = (prefix.join("."), other.type_str());
                return Err(format!("{prefix} is no section but {}", with_article(kind)));
            }
        };
    }
    let (key, span) = last;
    table.insert(Spanned::new(span.clone(), (*key).into()), value);
    Ok(())
}

/// The same value with all spans moved by `base`.
pub(super) fn moved<'a>(value: Spanned<DeValue<'a>>, base: usize) -> Spanned<DeValue<'a>> {
    let shift = |span: Range<usize>| span.start + base..span.end + base;
    let span = shift(value.span());
    let value = match value.into_inner() {
        DeValue::Array(items) => {
            DeValue::Array(items.into_iter().map(|item| moved(item, base)).collect())
        }
        DeValue::Table(table) => {
            let entries = table.into_iter().map(|(key, value)| {
                let span = shift(key.span());
                (Spanned::new(span, key.into_inner()), moved(value, base))
            });
            DeValue::Table(entries.collect())
        }
        plain => plain,
    };
    Spanned::new(span, value)
}

/// Turns serde's message into one in the words of the configuration.
fn explain(error: &toml::de::Error, tree: &DeTable<'_>, source: &Source<'_>) -> ConfigError {
    let message = error.message();
    let span = error.span();
    let key = span
        .as_ref()
        .and_then(|span| key_at(tree, span))
        .unwrap_or_default();
    let place = source.place(span.filter(|_| !key.is_empty()));
    if let Some((_, known)) = expectation(message, "unknown field `") {
        let given = key.rsplit('.').next().unwrap_or(&key);
        let section = key.rsplit_once('.').map(|(section, _)| section);
        let hint = match (nearest(given, &known), section) {
            (Some(near), _) => format!("did you mean {near}?"),
            (None, Some(section)) => format!("[{section}] has {}", known.join(", ")),
            (None, None) => format!("the sections are {}", known.join(", ")),
        };
        return ConfigError::UnknownKey { place, key, hint };
    }
    if let Some((given, known)) = expectation(message, "unknown variant `") {
        let mut problem = format!("expected {}, found \"{given}\"", alternatives(&known));
        if let Some(near) = nearest(given, &known) {
            problem += &format!("; did you mean \"{near}\"?");
        }
        return ConfigError::Value {
            place,
            key,
            problem,
        };
    }
    if let Some(field) = message.strip_prefix("missing field `") {
        let field = field.trim_end_matches('`');
        let (key, hint) = match key.is_empty() {
            true => (format!("the section [{field}]"), String::new()),
            false => (
                format!("{key}.{field}"),
                format!("; add {field} = ... to [{key}]"),
            ),
        };
        return ConfigError::Missing { place, key, hint };
    }
    ConfigError::Value {
        place,
        key,
        problem: in_plain_words(message),
    }
}

/// The name and the alternatives of serde's "unknown ... `name`, expected one of `a`, `b`".
fn expectation<'a>(message: &'a str, prefix: &str) -> Option<(&'a str, Vec<&'a str>)> {
    let rest = message.strip_prefix(prefix)?;
    let (given, known) = rest
        .rsplit_once("`, expected ")
        .or_else(|| Some((rest.rsplit_once("`, there are no ")?.0, "")))?;
    Some((given, known.split('`').skip(1).step_by(2).collect()))
}

fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    let given = given.to_lowercase().replace('-', "_");
    let scored = known
        .iter()
        .map(|known| (strsim::jaro_winkler(&given, known), *known));
    scored
        .filter(|(score, _)| *score > 0.78)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

fn alternatives(known: &[&str]) -> String {
    let quoted: Vec<String> = known.iter().map(|known| format!("\"{known}\"")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

/// "invalid type: string "x", expected u64" as "expected a whole number, found string "x"".
fn in_plain_words(message: &str) -> String {
    let found = ["invalid type: ", "invalid value: "]
        .iter()
        .find_map(|prefix| message.strip_prefix(prefix)?.rsplit_once(", expected "));
    let Some((found, expected)) = found else {
        return message.to_string();
    };
    let expected = match expected {
        "u64" | "usize" | "u32" => "a whole number, 0 or more",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "a text in quotes",
        "a sequence" => "a list in brackets",
        other if other.starts_with("struct ") => "a section",
        other => other,
    };
    format!("expected {expected}, found {}", found.replace('`', ""))
}

fn with_article(kind: &str) -> String {
    let article = if kind.starts_with(['a', 'i', 'o']) {
        "an"
    } else {
        "a"
    };
    format!("{article} {kind}")
}

/// The dotted path of what has exactly this span, a key or a value.
fn key_at(tree: &DeTable<'_>, span: &Range<usize>) -> Option<String> {
    tree.iter().find_map(|(key, value)| {
        let name = key.get_ref().to_string();
        // Tables first look inside: a table made by an override shares its key's span.
        if let Some(inner) = key_in(value, span) {
            return Some(name + &inner);
        }
        (key.span() == *span || value.span() == *span).then_some(name)
    })
}

/// The rest of the path, with its dot or index, below `value`.
fn key_in(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> Option<String> {
    match value.get_ref() {
        DeValue::Table(table) => key_at(table, span).map(|inner| format!(".{inner}")),
        DeValue::Array(items) => items.iter().enumerate().find_map(|(i, item)| {
            if let Some(inner) = key_in(item, span) {
                return Some(format!("[{i}]{inner}"));
            }
            (item.span() == *span).then(|| format!("[{i}]"))
        }),
        _ => None,
    }
}

/// Where the value of a dotted path, or the longest part of it that is there, was given.
fn span_of(tree: &DeTable<'_>, path: &str) -> Option<Range<usize>> {
    let mut table = tree;
    let mut span = None;
    for key in path.split('.') {
        let name = key.split('[').next().unwrap_or(key);
        let Some(value) = table.get(name) else { break };
        span = Some(value.span());
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    span
}
