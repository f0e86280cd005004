//! The commands on keys.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read},
};

use holdfast_proto::limits::VALUE_BYTES_MAX;

use super::{
    Outcome,
    arguments::{GetArguments, InspectArguments, KeyArgument, ScanArguments, SetArguments},
    failure::{Failure, say},
    json::{self, AnswerJson, DoneJson, GetJson, InspectJson, ReplicaJson, ScannedJson, SetJson},
    output::{self, Output, OutputFormat, safe, shown},
};
use crate::{Answer, Client, Done, Inspection, LastError, Page, Replica, State};

pub(super) async fn get(
    client: &Client,
    arguments: GetArguments,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    let fetch_on_miss = arguments.fetch_on_miss();
    let key = arguments.key.bytes()?;
    let mut get = client.get(&key).consistency(arguments.read.consistency());
    if let Some(token) = arguments.read.token {
        get = get.token(token);
    }
    if let Some(max_age) = arguments.max_age {
        get = get.max_age(max_age);
    }
    if arguments.only_if_cached {
        get = get.only_if_cached();
    }
    if arguments.no_cache {
        get = get.no_cache();
    }
    if let Some(version) = arguments.if_version_not {
        get = get.if_version_not(version);
    }
    if let Some(fetch_on_miss) = fetch_on_miss {
        get = get.fetch_on_miss(fetch_on_miss);
    }
    let found = get.await?;
    let answer = &found.answer;
    let is_unchanged = answer.stored && arguments.if_version_not == Some(answer.version);
    match (output.format, &answer.value) {
        (OutputFormat::Json | OutputFormat::Jsonl, _) => {
            let object = GetJson {
                answer: AnswerJson::with_value(answer),
                replica: (&found.replica).into(),
                token: json::token(&found.token),
            };
            output.object(&object)?;
        }
        (OutputFormat::Raw, Some(value)) => output.raw(value)?,
        (OutputFormat::Table, Some(value)) => {
            let mut fields = vec![("value", Some(output::shown_value(value)))];
            fields.extend(answer_fields(answer, &found.replica));
            output.fields(&fields)?;
        }
        (_, None) if is_unchanged => say(&format!(
            "version {} still: {}",
            answer.version,
            shown(&key)
        )),
        (_, None) => say(&format!("{}: {}", without_value(answer), shown(&key))),
    }
    Ok(if answer.is_hit() || is_unchanged {
        Outcome::Ok
    } else {
        Outcome::Miss
    })
}

/// Why there is none, in a word.
fn without_value(answer: &Answer) -> &'static str {
    match answer.state {
        State::Negative => "the upstream has none",
        State::Placeholder => "not fetched yet",
        _ => "miss",
    }
}

pub(super) async fn set(
    client: &Client,
    arguments: SetArguments,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    let value = value(arguments.value, arguments.literal)?;
    let mut set = client.set(arguments.key.bytes()?, value);
    if let Some(ttl) = arguments.ttl {
        set = set.ttl(ttl);
    }
    if let Some(at) = arguments.expires_at {
        set = set.expires_at(at);
    }
    if let Some(window) = arguments.stale_while_revalidate {
        set = set.stale_while_revalidate(window);
    }
    if let Some(window) = arguments.stale_if_error {
        set = set.stale_if_error(window);
    }
    if let Some(content_type) = arguments.content_type {
        set = set.content_type(content_type);
    }
    if let Some(version) = arguments.if_version {
        set = set.if_version(version);
    }
    if arguments.if_absent {
        set = set.if_absent();
    }
    let stored = arguments
        .tags
        .into_iter()
        .fold(set, crate::Set::tag)
        .await?;
    match output.format {
        OutputFormat::Json | OutputFormat::Jsonl => {
            let (replica, token) = ((&stored.replica).into(), json::token(&stored.token));
            output.object(&SetJson {
                version: stored.version,
                replica,
                token,
            })?;
        }
        OutputFormat::Raw => output.line(&stored.version.to_string())?,
        OutputFormat::Table => output.fields(&[("version", Some(stored.version.to_string()))])?,
    }
    Ok(Outcome::Ok)
}

pub(super) async fn delete(
    client: &Client,
    key: KeyArgument,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    done(&client.delete(key.bytes()?).await?, output)
}

pub(super) async fn invalidate(
    client: &Client,
    key: KeyArgument,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    done(&client.invalidate(key.bytes()?).await?, output)
}

pub(super) async fn inspect(
    client: &Client,
    arguments: InspectArguments,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    let key = arguments.key.bytes()?;
    let mut inspect = client
        .inspect(&key)
        .consistency(arguments.read.consistency());
    if let Some(token) = arguments.read.token {
        inspect = inspect.token(token);
    }
    let inspection = inspect.await?;
    let miss = inspection.answer.state == State::Miss;
    let why = inspection.why.iter().map(|why| safe(why));
    match output.format {
        OutputFormat::Json | OutputFormat::Jsonl => {
            output.object(&InspectJson::from(&inspection))?
        }
        _ if miss => {
            say(&format!("miss: {}", shown(&key)));
            why.for_each(|why| say(&why));
        }
        OutputFormat::Raw => {
            for why in why {
                output.line(&why)?;
            }
        }
        OutputFormat::Table => {
            let mut fields = answer_fields(&inspection.answer, &inspection.replica);
            fields.extend(inspection_fields(&inspection));
            fields.extend(why.map(|why| ("why", Some(why))));
            output.fields(&fields)?;
        }
    }
    Ok(if miss { Outcome::Miss } else { Outcome::Ok })
}

pub(super) async fn scan(
    client: &Client,
    arguments: ScanArguments,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    let mut scan = client
        .scan()
        .prefix(arguments.prefix()?)
        .consistency(arguments.read.consistency());
    let ScanArguments {
        limit,
        cursor,
        keys_only,
        null,
        all,
        read,
        ..
    } = arguments;
    scan = limit.into_iter().fold(scan, crate::Scan::limit);
    scan = cursor.into_iter().fold(scan, crate::Scan::cursor);
    scan = read.token.into_iter().fold(scan, crate::Scan::token);
    if keys_only {
        scan = scan.keys_only();
    }
    let mut page = scan.clone().await?;
    let mut listing = Listing {
        keys_only,
        null,
        printed: 0,
        output,
    };
    listing.begin()?;
    let ended = loop {
        listing.page(&page)?;
        let Some(cursor) = page.next_cursor.clone().filter(|_| all) else {
            break Ok(Outcome::Ok);
        };
        match scan.clone().cursor(cursor).await {
            Ok(next) => page = next,
            // What was read stands, complete in its form, and says where to go on.
            Err(error) => break Err(error.into()),
        }
    };
    listing.end(&page)?;
    ended
}

/// The entries of a scan as they are printed, page by page.
struct Listing<'o> {
    keys_only: bool,
    null: bool,
    /// Entries so far.
    printed: usize,
    output: &'o mut Output,
}

impl Listing<'_> {
    fn begin(&mut self) -> io::Result<()> {
        match self.output.format {
            OutputFormat::Json => self.output.bytes(b"{\"entries\":[\n"),
            _ => Ok(()),
        }
    }

    fn page(&mut self, page: &Page) -> io::Result<()> {
        match self.output.format {
            OutputFormat::Table => self.table(page)?,
            OutputFormat::Json => {
                for (index, entry) in page.entries.iter().enumerate() {
                    if self.printed + index > 0 {
                        self.output.bytes(b",\n")?;
                    }
                    self.output
                        .object_inline(&ScannedJson::new(entry, self.keys_only))?;
                }
            }
            OutputFormat::Jsonl => {
                for entry in &page.entries {
                    self.output
                        .object(&ScannedJson::new(entry, self.keys_only))?;
                }
            }
            // Each key as it is.
            OutputFormat::Raw => {
                for entry in &page.entries {
                    self.output.bytes(&entry.key)?;
                    self.output.bytes(if self.null { b"\0" } else { b"\n" })?;
                }
            }
        }
        self.printed += page.entries.len();
        // What is read is shown, and a reader that has gone is noticed, before more is asked for.
        self.output.flush()
    }

    /// `last`: the page that was read last.
    fn end(&mut self, last: &Page) -> io::Result<()> {
        let cursor = last.next_cursor.as_deref().map(json::url_safe);
        if self.output.format == OutputFormat::Json {
            self.output.bytes(b"\n],\"next_cursor\":")?;
            self.output.object_inline(&cursor)?;
            self.output.bytes(b",\"replica\":")?;
            self.output
                .object_inline(&ReplicaJson::from(&last.replica))?;
            self.output.bytes(b",\"token\":")?;
            self.output.object_inline(&json::token(&last.token))?;
            self.output.bytes(b"}\n")?;
        }
        self.output.flush()?;
        if let Some(cursor) = cursor.filter(|_| self.output.format != OutputFormat::Json) {
            say(&format!("more: --cursor {cursor}"));
        }
        Ok(())
    }

    fn table(&mut self, page: &Page) -> io::Result<()> {
        let keys_only = self.keys_only;
        let row = |entry: &crate::Scanned| {
            let answer = &entry.answer;
            let mut row = vec![
                shown(&entry.key),
                answer.state.as_str().to_owned(),
                answer.version.to_string(),
                output::time(answer.age),
            ];
            if !keys_only {
                let value = answer.value.as_deref();
                row.extend([
                    value.map_or_else(String::new, |value| value.len().to_string()),
                    value.map_or_else(String::new, output::cell),
                ]);
            }
            row
        };
        let header = ["KEY", "STATE", "VERSION", "AGE", "SIZE", "VALUE"];
        let columns = if keys_only { 4 } else { header.len() };
        let rows = page.entries.iter().map(row);
        if self.printed == 0 {
            self.output.table(&header[..columns], rows)
        } else {
            self.output.rows(rows)
        }
    }
}

fn done(done: &Done, output: &mut Output) -> Result<Outcome, Failure> {
    match output.format {
        OutputFormat::Json | OutputFormat::Jsonl => {
            let (replica, token) = ((&done.replica).into(), json::token(&done.token));
            output.object(&DoneJson {
                existed: done.existed,
                replica,
                token,
            })?;
        }
        OutputFormat::Raw => output.line(&done.existed.to_string())?,
        OutputFormat::Table => output.fields(&[("existed", Some(done.existed.to_string()))])?,
    }
    Ok(Outcome::Ok)
}

fn answer_fields(answer: &Answer, replica: &Replica) -> Vec<(&'static str, Option<String>)> {
    vec![
        ("state", Some(answer.state.as_str().to_owned())),
        ("age", Some(output::time(answer.age))),
        ("ttl", Some(output::ttl(answer.ttl))),
        ("version", Some(answer.version.to_string())),
        ("by", Some(served_by(replica))),
        ("type", answer.content_type.as_deref().map(safe)),
        ("upstream", answer.upstream.as_deref().map(safe)),
        ("failing", answer.last_error.as_ref().map(failing)),
        (
            "stored",
            (!answer.stored).then(|| "no: it could not be written down".to_owned()),
        ),
    ]
}

fn inspection_fields(inspection: &Inspection) -> Vec<(&'static str, Option<String>)> {
    let entry = inspection.entry.as_ref();
    let tags = entry
        .filter(|entry| !entry.tags.is_empty())
        .map(|entry| safe(&entry.tags.join(", ")));
    vec![
        (
            "shard",
            Some(format!("{} (slot {})", inspection.shard, inspection.slot)),
        ),
        ("now", inspection.now.map(json::instant)),
        ("origin", entry.map(|entry| entry.origin.clone())),
        (
            "size",
            entry.map(|entry| {
                format!(
                    "{} bytes, {}",
                    entry.size_bytes,
                    if entry.in_memory {
                        "in memory"
                    } else {
                        "on disk"
                    }
                )
            }),
        ),
        ("changed", entry.map(|entry| entry.changed.to_string())),
        (
            "hash",
            entry.map(|entry| format!("{:016x}", entry.content_hash)),
        ),
        ("tags", tags),
        (
            "fetched",
            entry.and_then(|entry| entry.fetched_at).map(json::instant),
        ),
        (
            "refresh",
            entry.and_then(|entry| entry.refresh_at).map(json::instant),
        ),
        (
            "fresh until",
            entry.and_then(|entry| entry.fresh_until).map(json::instant),
        ),
        (
            "stale until",
            entry.and_then(|entry| entry.stale_until).map(json::instant),
        ),
        (
            "expires",
            entry.and_then(|entry| entry.expires_at).map(json::instant),
        ),
        (
            "tombstone",
            inspection
                .tombstone_revision
                .map(|revision| revision.to_string()),
        ),
        (
            "policy",
            inspection
                .policy
                .as_ref()
                .map(|policy| safe(&policy.pattern)),
        ),
    ]
}

fn served_by(replica: &Replica) -> String {
    let region = if replica.region.is_empty() {
        String::new()
    } else {
        format!(", {}", safe(&replica.region))
    };
    let lag = replica
        .lag
        .map_or_else(|| "unknown".to_owned(), output::time);
    format!(
        "node {} ({}{region}), revision {}, lag {lag}",
        replica.node_id,
        replica.role.as_str(),
        replica.revision
    )
}

fn failing(error: &LastError) -> String {
    let status = error
        .status
        .map_or_else(String::new, |status| format!(" {status}"));
    let next = error.next_attempt.map_or_else(String::new, |at| {
        format!(", next attempt {}", json::instant(at))
    });
    format!("{}{status}, {} in a row{next}", error.class, error.count)
}

/// The value as written, from stdin (`-`) or from a file (`@FILE`).
fn value(written: OsString, literal: bool) -> Result<Vec<u8>, Failure> {
    let written = written.into_encoded_bytes();
    match written.as_slice() {
        _ if literal => Ok(written),
        b"-" => bounded(io::stdin().lock()).map_err(|why| Failure::Input {
            what: "stdin".to_owned(),
            why,
        }),
        [b'@', ..] => {
            let path = String::from_utf8(written[1..].to_vec())
                .map_err(|_| Failure::usage("value", "the file's name is not UTF-8"))?;
            File::open(&path)
                .and_then(bounded)
                .map_err(|why| Failure::Input { what: path, why })
        }
        _ => Ok(written),
    }
}

/// One byte more than the largest value is enough for the client to refuse it.
fn bounded(source: impl Read) -> io::Result<Vec<u8>> {
    let mut value = Vec::new();
    source
        .take(VALUE_BYTES_MAX as u64 + 1)
        .read_to_end(&mut value)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_comes_from_a_file_or_is_what_is_written() {
        // Tests run in their package, whichever checkout they were built in.
        let here = "@Cargo.toml";
        assert!(value(here.into(), false).unwrap().starts_with(b"[package]"));
        assert_eq!(value(here.into(), true).unwrap(), here.as_bytes());
        assert_eq!(value("-".into(), true).unwrap(), b"-");
        assert_eq!(value("plain".into(), false).unwrap(), b"plain");
        assert!(matches!(
            value("@/no/such/file".into(), false),
            Err(Failure::Input { .. })
        ));
    }

    #[test]
    fn reading_a_value_is_bounded() {
        assert_eq!(bounded(io::repeat(7)).unwrap().len(), VALUE_BYTES_MAX + 1);
    }
}
