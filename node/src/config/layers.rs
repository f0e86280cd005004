//! Stacks file, variables and flags into one tree.
//!
//! Promises that of a setting in several layers the last counts: file, then
//! `HOLDFAST__SECTION__KEY`, then flags. Must never read the process's own environment: it is
//! given.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use super::error::{ConfigError, Place, Problem};
use super::tree::{Source, Tree, bare_ipv6};

/// Variables that count begin so. Kubernetes sets `HOLDFAST_PORT` for a service of our name, which
/// must not.
const PREFIX: &str = "HOLDFAST__";
/// Largest file read at all.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The variables of the process, as its start gave them. A name that is no text is kept as near to
/// one as it comes; a value that is none is not kept.
pub(super) type Environment = BTreeMap<String, Option<String>>;

/// Settings of the command line. They go over all others.
#[derive(Debug, Clone, Default)]
pub struct Overrides(Vec<Override>);

#[derive(Debug, Clone)]
struct Override {
    flag: Arc<str>,
    /// Keys joined by dots.
    path: String,
    setting: Setting,
}

#[derive(Debug, Clone)]
enum Setting {
    Text(String),
    Yaml(String),
    Prepend(String),
}

impl Overrides {
    /// Sets `path`, such as `node.data_dir`, to a text exactly as it is. `flag` is what errors
    /// name.
    pub fn text(self, flag: &str, path: &str, text: impl Into<String>) -> Self {
        self.with(flag, path, Setting::Text(text.into()))
    }

    /// Sets `path` to a value written as YAML (or JSON, which is YAML).
    pub fn yaml(self, flag: &str, path: &str, yaml: impl Into<String>) -> Self {
        self.with(flag, path, Setting::Yaml(yaml.into()))
    }

    /// Puts the items of a list written as YAML before those of a top-level list, such as
    /// `policies`: they match first.
    pub fn prepend(self, flag: &str, list: &str, yaml: impl Into<String>) -> Self {
        self.with(flag, list, Setting::Prepend(yaml.into()))
    }

    fn with(mut self, flag: &str, path: &str, setting: Setting) -> Self {
        self.0.push(Override {
            flag: flag.into(),
            path: path.to_owned(),
            setting,
        });
        self
    }
}

pub(super) fn stack(
    file: Option<&Path>,
    environment: &Environment,
    overrides: &Overrides,
) -> Result<Tree, ConfigError> {
    let mut tree = match file {
        Some(path) => parse_file(path)?,
        None => Tree::null(Place::Default("the configuration")),
    };
    let mut problems = Vec::new();
    for (name, text) in environment {
        if let Some(path) = name.strip_prefix(PREFIX) {
            let put = put_variable(&mut tree, name, path, text.as_deref());
            problems.extend(put.err());
        }
    }
    for Override {
        flag,
        path,
        setting,
    } in &overrides.0
    {
        problems.extend(put_flag(&mut tree, flag, path, setting).err());
    }
    if problems.is_empty() {
        Ok(tree)
    } else {
        Err(ConfigError { problems })
    }
}

fn parse_file(path: &Path) -> Result<Tree, ConfigError> {
    let cannot =
        |reason: String| ConfigError::at(Place::file(path), format!("cannot be read: {reason}"));
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| cannot(error.to_string()))?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| cannot(error.to_string()))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(cannot("it is over 1 MiB".to_owned()));
    }
    let path: Arc<Path> = path.into();
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        ConfigError::at(Place::line(&path, line as u64), "is not UTF-8")
    })?;
    Tree::parse(&text, &Source::File(&path)).map_err(|problem| ConfigError {
        problems: vec![problem],
    })
}

/// What `Config::load` is given, in the form in which it is looked up.
pub(super) fn environment(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Environment {
    variables
        .into_iter()
        .map(|(name, text)| (name.to_string_lossy().into_owned(), text.into_string().ok()))
        .collect()
}

fn put_variable(
    tree: &mut Tree,
    name: &str,
    path: &str,
    text: Option<&str>,
) -> Result<(), Problem> {
    let place = Place::Variable(name.into());
    let wrong = |reason: &str| Problem {
        place: place.clone(),
        reason: reason.to_owned(),
    };
    let path = path.to_ascii_lowercase();
    let mut path: Vec<String> = path.split("__").map(str::to_owned).collect();
    if path.iter().any(String::is_empty) {
        return Err(wrong("names no key: write it like HOLDFAST__NODE__NAME"));
    }
    let text = text.ok_or_else(|| wrong("is not UTF-8"))?;
    // A variable's name has no `-`, and servers drop headers whose name has `_`.
    if let [upstreams, _, _, headers, header] = &mut path[..]
        && upstreams == "upstreams"
        && headers == "headers"
    {
        *header = header.replace('_', "-");
    }
    // An address, or several: to YAML that would be a list and something behind it.
    let value = if text.starts_with('[') && bare_ipv6(text).is_some_and(|at| text.starts_with(at)) {
        Tree::text(place, text)
    } else {
        let parsed = Tree::parse(text, &Source::Whole(place))?;
        Tree {
            written: Some(text.trim().to_owned()),
            ..parsed
        }
    };
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    tree.put(&path, value)
}

fn put_flag(
    tree: &mut Tree,
    flag: &Arc<str>,
    path: &str,
    setting: &Setting,
) -> Result<(), Problem> {
    let place = Place::Flag(flag.clone());
    let keys: Vec<&str> = path.split('.').collect();
    match setting {
        Setting::Text(text) => tree.put(&keys, Tree::text(place, text)),
        Setting::Yaml(yaml) => tree.put(&keys, Tree::parse(yaml, &Source::Whole(place))?),
        Setting::Prepend(yaml) => tree.prepend(path, Tree::parse(yaml, &Source::Whole(place))?),
    }
}
