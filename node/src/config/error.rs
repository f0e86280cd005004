//! What is wrong with a configuration, and where.
//!
//! Promises `file:line: reason` for everything that came from the file, the variable's or flag's
//! name for the rest, and never a secret's text. Must never know what a setting means.

use std::cell::RefCell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Problems shown of one configuration. Whoever has more has a wrong file.
const PROBLEMS_MAX: usize = 50;

/// Where a setting came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Nobody set it: the setting's full name.
    Default(&'static str),
    /// The file as a whole.
    File(Arc<Path>),
    /// The line is counted from 1.
    Line(Arc<Path>, u64),
    Variable(Arc<str>),
    Flag(Arc<str>),
}

/// One thing to correct.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub place: Place,
    pub reason: String,
}

/// Why a configuration cannot be used: at least one problem, a line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", lines(.problems))]
pub struct ConfigError {
    pub problems: Vec<Problem>,
}

/// Collects what is wrong, so that one run of `check-config` shows all of it.
#[derive(Debug, Default)]
pub(super) struct Problems(RefCell<Vec<Problem>>);

impl ConfigError {
    /// For a setting that loads but cannot be used, such as a directory that cannot be written.
    pub fn at(place: Place, reason: impl Into<String>) -> Self {
        Self {
            problems: vec![Problem {
                place,
                reason: reason.into(),
            }],
        }
    }
}

impl Problems {
    pub(super) fn add(&self, place: &Place, reason: impl Into<String>) {
        let mut problems = self.0.borrow_mut();
        if problems.len() < PROBLEMS_MAX {
            problems.push(Problem {
                place: place.clone(),
                reason: reason.into(),
            });
        }
    }

    pub(super) fn finish(self) -> Result<(), ConfigError> {
        let mut problems = self.0.into_inner();
        if problems.is_empty() {
            return Ok(());
        }
        problems.sort_by_key(|problem| {
            if let Place::Line(_, line) = problem.place {
                line
            } else {
                u64::MAX
            }
        });
        problems.dedup();
        Err(ConfigError { problems })
    }
}

impl Place {
    pub(super) fn line(file: &Arc<Path>, line: u64) -> Self {
        Self::Line(file.clone(), line)
    }

    pub(super) fn file(path: &Path) -> Self {
        Self::File(PathBuf::from(path).into())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default(name) => write!(f, "{name} (default)"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Line(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) | Self::Flag(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.reason)
    }
}

fn lines(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(Problem::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}
