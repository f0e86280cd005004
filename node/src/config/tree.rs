//! YAML as a tree in which everything knows where it came from, and the layers put over one
//! another.
//!
//! Promises that a later layer takes the place of what an earlier one said at the same path, whole.
//! Must never know which keys there are. Not printable: an inline secret may be in it.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::Path;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{MessageFormatter, Spanned, UserMessageFormatter};

use super::error::{Place, Problem};

/// A value and where it stands.
#[derive(Clone)]
pub(super) struct Tree {
    pub(super) place: Place,
    pub(super) value: Value,
    /// All of a variable, as it was before YAML made a number of it.
    pub(super) written: Option<String>,
}

#[derive(Clone)]
pub(super) enum Value {
    /// Nothing: as if the key were not there.
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Tree>),
    Map(Vec<(Key, Tree)>),
}

#[derive(Clone)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) place: Place,
}

/// Where a piece of text came from.
pub(super) enum Source<'a> {
    File(&'a Arc<Path>),
    /// Everything in it has the one place.
    Whole(Place),
}

impl Tree {
    pub(super) fn parse(text: &str, source: &Source<'_>) -> Result<Self, Problem> {
        let options = serde_saphyr::options! {
            strict_booleans: true, // `no` is a country
            with_snippet: false,   // a snippet may show an inline secret
        };
        match serde_saphyr::from_str_with_options::<Spanned<Parsed>>(text, options) {
            Ok(parsed) => Ok(parsed.value.located(line_of(&parsed.referenced), source)),
            Err(error) => {
                let line = error.location().map_or(1, |location| line_of(&location));
                // The parser may find out a line later.
                let read = text.lines().enumerate().take(line as usize + 1);
                let bare = read.filter_map(|(index, text)| Some((index, bare_ipv6(text)?)));
                let (line, reason) = match bare.last() {
                    Some((index, address)) => (
                        index as u64 + 1,
                        format!(
                            "`{address}` is a list to YAML: put it in quotes, as `\"{address}\"`"
                        ),
                    ),
                    None => (line, reason(&error)),
                };
                Err(Problem {
                    place: source.place(line),
                    reason,
                })
            }
        }
    }

    pub(super) fn null(place: Place) -> Self {
        Self {
            place,
            value: Value::Null,
            written: None,
        }
    }

    pub(super) fn text(place: Place, text: &str) -> Self {
        Self {
            place,
            value: Value::Text(text.to_owned()),
            written: None,
        }
    }

    /// Puts `tree` at `path`, in the place of what is there. A list on the way is an error: its
    /// items have no names.
    pub(super) fn put(&mut self, path: &[&str], tree: Self) -> Result<(), Problem> {
        let Some((name, rest)) = path.split_first() else {
            *self = tree;
            return Ok(());
        };
        if let Value::List(_) = self.value {
            let reason = format!(
                "`{name}` is looked for in a list: give the list whole, such as `[{{…}}, {{…}}]`"
            );
            return Err(Problem {
                place: tree.place,
                reason,
            });
        }
        if !matches!(self.value, Value::Map(_)) {
            *self = Self {
                place: tree.place.clone(),
                value: Value::Map(Vec::new()),
                written: None,
            };
        }
        let Value::Map(entries) = &mut self.value else {
            return Ok(());
        };
        let at = position(entries, name).unwrap_or_else(|| {
            let key = Key {
                name: (*name).to_owned(),
                place: tree.place.clone(),
            };
            entries.push((key, Self::null(tree.place.clone())));
            entries.len() - 1
        });
        if rest.is_empty() {
            entries[at].0.place = tree.place.clone();
        }
        entries[at].1.put(rest, tree)
    }

    /// Puts the items of `list` before those of the list at the top-level key `name`.
    pub(super) fn prepend(&mut self, name: &str, list: Self) -> Result<(), Problem> {
        let earlier = match &mut self.value {
            Value::Map(entries) => entries
                .iter_mut()
                .find(|(key, _)| key.name == name)
                .map(|(_, tree)| tree),
            _ => None,
        };
        match (earlier.map(|tree| &mut tree.value), list) {
            (
                Some(Value::List(items)),
                Self {
                    value: Value::List(mut first),
                    ..
                },
            ) => {
                first.append(items);
                *items = first;
                Ok(())
            }
            (_, list) => self.put(&[name], list),
        }
    }
}

/// A variable's name has no case, so it finds a key in any, the exact one first.
fn position(entries: &[(Key, Tree)], name: &str) -> Option<usize> {
    let exact = entries.iter().position(|(key, _)| key.name == name);
    exact.or_else(|| {
        entries
            .iter()
            .position(|(key, _)| key.name.eq_ignore_ascii_case(name))
    })
}

impl Source<'_> {
    pub(super) fn place(&self, line: u64) -> Place {
        match self {
            Self::File(path) => Place::line(path, line),
            Self::Whole(place) => place.clone(),
        }
    }
}

/// The first line is 1, also of what has no place at all, such as an empty file.
fn line_of(location: &serde_saphyr::Location) -> u64 {
    location.line().max(1)
}

fn reason(error: &serde_saphyr::Error) -> String {
    match error.without_snippet() {
        serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("key `{key}` is here twice")
        }
        serde_saphyr::Error::DuplicateMappingKey { key: None, .. } => {
            "a key is here twice".to_owned()
        }
        error => {
            let message = UserMessageFormatter.format_message(error).into_owned();
            format!("not valid YAML: {message}")
        }
    }
}

/// An IPv6 address and its port in a line, in no quotes: `[::1]:7400`.
pub(super) fn bare_ipv6(line: &str) -> Option<&str> {
    line.match_indices('[').find_map(|(start, _)| {
        let end = start + line[start..].find("]:")?;
        line[start + 1..end].parse::<Ipv6Addr>().ok()?;
        let port = line[end + 2..]
            .bytes()
            .take_while(u8::is_ascii_digit)
            .count();
        let is_quoted = line[..start].ends_with(['"', '\'']);
        (port > 0 && !is_quoted).then(|| &line[start..end + 2 + port])
    })
}

/// A value whose parts know their line.
enum Parsed {
    Scalar(Value),
    List(Vec<Spanned<Self>>),
    Map(Vec<(Spanned<String>, Spanned<Self>)>),
}

impl Parsed {
    fn located(self, line: u64, source: &Source<'_>) -> Tree {
        let value = match self {
            Self::Scalar(value) => value,
            Self::List(items) => Value::List(
                items
                    .into_iter()
                    .map(|item| item.value.located(line_of(&item.referenced), source))
                    .collect(),
            ),
            Self::Map(entries) => Value::Map(
                entries
                    .into_iter()
                    .map(|(key, tree)| {
                        let place = source.place(line_of(&key.referenced));
                        (
                            Key {
                                name: key.value,
                                place,
                            },
                            tree.value.located(line_of(&tree.referenced), source),
                        )
                    })
                    .collect(),
            ),
        };
        Tree {
            place: source.place(line),
            value,
            written: None,
        }
    }
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ParsedVisitor)
    }
}

struct ParsedVisitor;

impl<'de> Visitor<'de> for ParsedVisitor {
    type Value = Parsed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Value::Integer(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Value::Integer(value.into())))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Value::Integer(value)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Value::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Value::Text(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Parsed, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Parsed::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Parsed, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Parsed::Map(map))
    }
}
