//! Takes typed settings out of a section of the tree.
//!
//! Promises that every key of a section is taken, refused by name because its feature is not built,
//! or refused as unknown; and that reading goes on after a mistake, so that all mistakes are shown.
//! Must never know which sections there are.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::error::{Place, Problems};
use super::quantity::{bare_size, bare_time, parse_duration, parse_size};
use super::tree::{Key, Tree, Value};
use crate::policy::Window;

/// Longest any reader may be made to wait.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(300);
const NAME_BYTES_MAX: usize = 128;

/// The keys of a kind of section.
#[derive(Debug)]
pub(super) struct Keys {
    pub(super) built: &'static [&'static str],
    /// Of the design, for later.
    pub(super) not_built: &'static [&'static str],
}

/// A setting and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Set<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

/// One section, being read.
pub(super) struct Fields<'p> {
    /// Its full name, empty for the whole configuration.
    name: String,
    pub(super) place: Place,
    /// Whether it has keys and values at all; if not, that is reported already.
    pub(super) is_section: bool,
    entries: Vec<(Key, Tree)>,
    pub(super) problems: &'p Problems,
}

impl Set<Duration> {
    pub(super) fn is_default(&self) -> bool {
        matches!(self.place, Place::Default(_))
    }
}

impl<'p> Fields<'p> {
    /// Reports the keys that `keys` does not have.
    pub(super) fn open(
        name: impl Into<String>,
        tree: Tree,
        keys: &Keys,
        problems: &'p Problems,
    ) -> Self {
        let mut fields = Self::open_any(name, tree, problems);
        fields.entries.retain(|(key, _)| {
            let known = keys.built.contains(&key.name.as_str());
            if !known {
                problems.add(&key.place, refusal(&key.name, &fields.name, keys));
            }
            known
        });
        fields
    }

    /// A section whose keys are names of the user's choice.
    pub(super) fn open_any(name: impl Into<String>, tree: Tree, problems: &'p Problems) -> Self {
        let name = name.into();
        let is_section = matches!(tree.value, Value::Map(_) | Value::Null);
        let entries = match tree.value {
            Value::Map(entries) => entries,
            Value::Null => Vec::new(),
            other => {
                let section = if name.is_empty() {
                    "the configuration".to_owned()
                } else {
                    format!("`{name}`")
                };
                problems.add(
                    &tree.place,
                    format!("{section} wants keys and values, not {}", kind(&other)),
                );
                Vec::new()
            }
        };
        Self {
            name,
            place: tree.place,
            is_section,
            entries,
            problems,
        }
    }

    /// The key's full name, as errors say it.
    pub(super) fn full(&self, key: &str) -> String {
        if self.name.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.name)
        }
    }

    /// Whether somebody set it, well or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries
            .iter()
            .any(|(own, tree)| own.name == key && !matches!(tree.value, Value::Null))
    }

    /// The key's own place, the section's if it is not there.
    pub(super) fn place_of(&self, key: &str) -> Place {
        self.entries
            .iter()
            .find(|(own, _)| own.name == key)
            .map_or(&self.place, |(own, _)| &own.place)
            .clone()
    }

    pub(super) fn take(&mut self, key: &str) -> Option<Tree> {
        let at = self.entries.iter().position(|(own, _)| own.name == key)?;
        Some(self.entries.swap_remove(at).1).filter(|tree| !matches!(tree.value, Value::Null))
    }

    /// What is left, as it was written.
    pub(super) fn rest(self) -> impl Iterator<Item = (Key, Tree)> {
        self.entries.into_iter()
    }

    pub(super) fn section(&mut self, key: &str, keys: &Keys) -> Fields<'p> {
        let tree = self
            .take(key)
            .unwrap_or_else(|| Tree::null(self.place.clone()));
        Fields::open(self.full(key), tree, keys, self.problems)
    }

    pub(super) fn text(&mut self, key: &str) -> Option<Set<String>> {
        let tree = self.take(key)?;
        text(tree, &self.full(key), self.problems)
    }

    /// A text that `parse` understands.
    pub(super) fn parsed<T, E: Display>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<Set<T>> {
        let Set { value, place } = self.text(key)?;
        match parse(&value) {
            Ok(value) => Some(Set { value, place }),
            Err(reason) => {
                self.problems
                    .add(&place, format!("`{}`: {reason}", self.full(key)));
                None
            }
        }
    }

    pub(super) fn duration(
        &mut self,
        key: &str,
        range: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        let parse = |text: &str| {
            let duration = parse_duration(text)?;
            let show = |end: &Duration| humantime::format_duration(*end).to_string();
            within(duration, &range)
                .map_err(|(low, high)| format!("must be from {} to {}", show(&low), show(&high)))
        };
        self.quantity(key, bare_time, parse)
    }

    /// With its place, for settings that are compared with others.
    pub(super) fn duration_or(
        &mut self,
        key: &'static str,
        range: RangeInclusive<Duration>,
        default: Duration,
    ) -> Set<Duration> {
        let place = self.value_place(key);
        match self.duration(key, range) {
            Some(value) => Set { value, place },
            None => Set {
                value: default,
                place: Place::Default(key),
            },
        }
    }

    /// Where its value stands, the section's place if it is not there.
    pub(super) fn value_place(&self, key: &str) -> Place {
        self.entries
            .iter()
            .find(|(own, _)| own.name == key)
            .map_or(&self.place, |(_, tree)| &tree.place)
            .clone()
    }

    pub(super) fn window(&mut self, key: &str) -> Option<Window> {
        let parse = |text: &str| {
            if text == "forever" {
                Ok(Window::Forever)
            } else {
                parse_duration(text).map(Window::For)
            }
        };
        self.quantity(key, bare_time, parse)
    }

    pub(super) fn size(&mut self, key: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let parse = |text: &str| {
            let size = parse_size(text)?;
            within(size, &range)
                .map_err(|(low, high)| format!("must be from {low} to {high} bytes"))
        };
        self.quantity(key, bare_size, parse)
    }

    pub(super) fn integer(&mut self, key: &str, range: RangeInclusive<u64>) -> Option<Set<u64>> {
        let tree = self.take(key)?;
        self.whole(tree, key, &range)
    }

    /// Empty if absent.
    pub(super) fn integers(&mut self, key: &str, range: RangeInclusive<u64>) -> Vec<Set<u64>> {
        let name = format!("{key}[]");
        self.list(key)
            .into_iter()
            .filter_map(|item| self.whole(item, &name, &range))
            .collect()
    }

    pub(super) fn number(&mut self, key: &str, range: RangeInclusive<f64>) -> Option<f64> {
        let tree = self.take(key)?;
        let found = match tree.value {
            Value::Integer(integer) => Some(integer as f64),
            Value::Float(float) => Some(float),
            _ => None,
        };
        let found = found.filter(|number| range.contains(number));
        if found.is_none() {
            self.wrong(
                &tree,
                key,
                &format!("a number from {} to {}", range.start(), range.end()),
            );
        }
        found
    }

    pub(super) fn boolean(&mut self, key: &str) -> Option<bool> {
        let tree = self.take(key)?;
        if let Value::Bool(found) = tree.value {
            return Some(found);
        }
        self.wrong(&tree, key, "true or false");
        None
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> Option<Set<T>> {
        let find = |text: &str| {
            let found = choices
                .iter()
                .find(|(word, _)| *word == text)
                .map(|(_, choice)| *choice);
            let words = || {
                choices
                    .iter()
                    .map(|(word, _)| format!("`{word}`"))
                    .collect::<Vec<_>>()
                    .join(" or ")
            };
            found.ok_or_else(|| format!("`{text}` is none of {}", words()))
        };
        self.parsed(key, find)
    }

    /// Whether it is there and has no items.
    pub(super) fn is_empty_list(&self, key: &str) -> bool {
        self.entries.iter().any(|(own, tree)| {
            own.name == key && matches!(&tree.value, Value::List(items) if items.is_empty())
        })
    }

    /// Empty if absent.
    pub(super) fn list(&mut self, key: &str) -> Vec<Tree> {
        let Some(tree) = self.take(key) else {
            return Vec::new();
        };
        match tree.value {
            Value::List(items) => items,
            // As variables are usually written: `a,b`.
            Value::Text(text) if matches!(tree.place, Place::Variable(_)) => text
                .split(',')
                .map(|item| Tree::text(tree.place.clone(), item.trim()))
                .collect(),
            _ => {
                self.wrong(&tree, key, "a list");
                Vec::new()
            }
        }
    }

    pub(super) fn texts(&mut self, key: &str) -> Vec<Set<String>> {
        let name = format!("{}[]", self.full(key));
        self.list(key)
            .into_iter()
            .filter_map(|item| text(item, &name, self.problems))
            .collect()
    }

    /// A time or a size: a text, and a number is a unit forgotten.
    fn quantity<T>(
        &mut self,
        key: &str,
        bare: fn(&str) -> String,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let tree = self.take(key)?;
        let parsed = match &tree.value {
            Value::Text(text) => parse(text),
            Value::Integer(integer) => Err(bare(&integer.to_string())),
            Value::Float(float) => Err(bare(&float.to_string())),
            other => Err(format!("wants a number and its unit, not {}", kind(other))),
        };
        parsed
            .map_err(|reason| {
                self.problems
                    .add(&tree.place, format!("`{}`: {reason}", self.full(key)))
            })
            .ok()
    }

    fn whole(&self, tree: Tree, key: &str, range: &RangeInclusive<u64>) -> Option<Set<u64>> {
        let found = match tree.value {
            Value::Integer(integer) => u64::try_from(integer)
                .ok()
                .filter(|integer| range.contains(integer)),
            _ => None,
        };
        if found.is_none() {
            let wanted = format!("a whole number from {} to {}", range.start(), range.end());
            self.wrong(&tree, key, &wanted);
        }
        found.map(|value| Set {
            value,
            place: tree.place,
        })
    }

    fn wrong(&self, tree: &Tree, key: &str, wanted: &str) {
        let found = match &tree.value {
            Value::Integer(integer) => integer.to_string(),
            Value::Float(float) => float.to_string(),
            other => kind(other).to_owned(),
        };
        self.problems.add(
            &tree.place,
            format!("`{}` wants {wanted}, not {found}", self.full(key)),
        );
    }
}

/// Names of nodes, secrets and upstreams stand in URLs, metrics and variables, so they are plain.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    match name {
        "" => Err("the name is empty".to_owned()),
        _ if name.len() > NAME_BYTES_MAX => Err(format!("the name is over {NAME_BYTES_MAX} bytes")),
        _ if name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) =>
        {
            Ok(())
        }
        _ => Err(format!(
            "`{name}` is no name: only letters, digits, `-`, `_` and `.` may be in one"
        )),
    }
}

pub(super) fn text(tree: Tree, name: &str, problems: &Problems) -> Option<Set<String>> {
    let found = match tree.value {
        Value::Text(value) => {
            return Some(Set {
                value,
                place: tree.place,
            });
        }
        // A variable is a text that may be meant as something else, and here it is not.
        Value::Integer(_) | Value::Float(_) | Value::Bool(_) if tree.written.is_some() => {
            return Some(Set {
                value: tree.written.unwrap_or_default(),
                place: tree.place,
            });
        }
        Value::Integer(_) | Value::Float(_) | Value::Bool(_) => {
            format!("{}: put it in quotes", kind(&tree.value))
        }
        _ => kind(&tree.value).to_owned(),
    };
    problems.add(&tree.place, format!("`{name}` wants a text, not {found}"));
    None
}

fn within<T: PartialOrd + Copy>(value: T, range: &RangeInclusive<T>) -> Result<T, (T, T)> {
    if range.contains(&value) {
        Ok(value)
    } else {
        Err((*range.start(), *range.end()))
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Integer(_) | Value::Float(_) => "a number",
        Value::Text(_) => "a text",
        Value::List(_) => "a list",
        Value::Map(_) => "keys and values",
    }
}

fn refusal(key: &str, section: &str, keys: &Keys) -> String {
    let within = if section.is_empty() {
        String::new()
    } else {
        format!(" in `{section}`")
    };
    if keys.not_built.contains(&key) {
        return format!("`{key}`{within} is not built yet");
    }
    let closest = keys
        .built
        .iter()
        .map(|known| (distance(key, known), known))
        .min();
    match closest {
        Some((distance, known)) if distance <= 1 + known.len() / 4 => {
            format!("unknown key `{key}`{within}: did you mean `{known}`?")
        }
        _ => format!("unknown key `{key}`{within}"),
    }
}

/// Letters to add, drop or change to turn one word into the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=from.len()).collect();
    for (turn, wanted) in to.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], turn + 1);
        for (at, letter) in from.iter().enumerate() {
            let changed = diagonal + usize::from(*letter != wanted);
            diagonal = row[at + 1];
            row[at + 1] = changed.min(row[at] + 1).min(diagonal + 1);
        }
    }
    row[from.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_recognised_and_a_strange_one_is_not() {
        let keys = Keys {
            built: &["ttl", "ttl_jitter", "soft_timeout"],
            not_built: &["keep"],
        };
        assert_eq!(
            refusal("tll", "policy", &keys),
            "unknown key `tll` in `policy`: did you mean `ttl`?"
        );
        assert_eq!(
            refusal("soft_timeuot", "", &keys),
            "unknown key `soft_timeuot`: did you mean `soft_timeout`?"
        );
        assert_eq!(refusal("colour", "", &keys), "unknown key `colour`");
        assert_eq!(
            refusal("keep", "policy", &keys),
            "`keep` in `policy` is not built yet"
        );
    }

    #[test]
    fn distance_counts_letters() {
        for (from, to, expected) in [
            ("", "abc", 3),
            ("abc", "", 3),
            ("abc", "abc", 0),
            ("abc", "abd", 1),
            ("abc", "xabc", 1),
            ("acb", "abc", 2),
        ] {
            assert_eq!(distance(from, to), expected, "{from} {to}");
        }
    }
}
