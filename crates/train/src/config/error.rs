//! What can be wrong with a configuration.

use std::fmt;
use std::path::PathBuf;

/// Where a setting was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of a file, counted from 1.
    Line {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },
    /// A file as a whole: what is missing has no line.
    File(PathBuf),
    /// An override on the command line.
    Set(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { path, line } => write!(f, "{}:{line}", path.display()),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Set(set) => write!(f, "--set {set}"),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is no TOML.
    #[error("{place}: not valid TOML: {problem}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        problem: String,
    },
    /// A key that no section has.
    #[error("{place}: unknown key {key}; {hint}")]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key with its section.
        key: String,
        /// The nearest known key, or all of them.
        hint: String,
    },
    /// A value of another type than the key's, or none of those it may have.
    #[error("{place}: {key}: {problem}")]
    Value {
        /// Where.
        place: Place,
        /// The key with its section.
        key: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// A key that has to be given and is not.
    #[error("{place}: {key} is missing{hint}")]
    Missing {
        /// The file, and the section's line if it has one.
        place: Place,
        /// The key with its section, or the section in brackets.
        key: String,
        /// What it is for, where there is more to say.
        hint: String,
    },
    /// An override that is not `section.key=value`, or reaches below something that is no section.
    #[error("--set {set}: {problem}")]
    Override {
        /// The override as given.
        set: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Values that are each well formed and cannot be used, alone or together.
    #[error("{}{key}: {problem}", place.as_ref().map(|place| format!("{place}: ")).unwrap_or_default())]
    Invalid {
        /// Where the key was given, if it was.
        place: Option<Place>,
        /// The key with its section.
        key: String,
        /// What does not go together and what would do.
        problem: String,
    },
    /// The configuration cannot be written as TOML.
    #[error("cannot write the configuration as TOML: {0}")]
    Write(String),
}

impl ConfigError {
    /// A value that cannot be used, for checks that need more than the configuration.
    pub fn invalid(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid {
            place: None,
            key: key.into(),
            problem: problem.into(),
        }
    }
}
