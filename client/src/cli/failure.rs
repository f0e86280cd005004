//! How a command that failed ends: one line or one JSON object on stderr, and the exit code.

use std::{ffi::OsString, io, io::Write as _, process::ExitCode};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use serde::Serialize;

use super::{
    json,
    output::{OutputFormat, safe, time},
};
use crate::{
    Error,
    error::{Applied, word},
};

#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// What was asked makes no sense. `field` is what of it, by its name in the `.proto` where it
    /// has one.
    #[error("{message}")]
    Usage {
        field: Option<String>,
        message: String,
    },
    #[error(transparent)]
    Call(#[from] Error),
    /// A file or stdin cannot be read.
    #[error("{what}: {why}")]
    Input { what: String, why: io::Error },
    /// stdout cannot be written.
    #[error(transparent)]
    Output(#[from] io::Error),
}

/// The contract of `-o json` for errors. Unset is null.
#[derive(Debug, Serialize)]
struct ErrorJson<'a> {
    code: &'a str,
    reason: &'a str,
    message: String,
    field: Option<&'a str>,
    applied: Option<&'a str>,
    leader: Option<&'a str>,
    upstream: Option<&'a str>,
    class: Option<&'a str>,
    status: Option<u16>,
    version: Option<u64>,
    retry_after_ms: Option<u64>,
}

impl Failure {
    pub(super) fn usage(field: &str, message: impl Into<String>) -> Self {
        Self::Usage {
            field: Some(field.to_owned()),
            message: message.into(),
        }
    }

    pub(super) fn report(&self, format: OutputFormat) -> ExitCode {
        if matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            // Whoever read us has seen enough.
            return ExitCode::SUCCESS;
        }
        say(&match format {
            OutputFormat::Json | OutputFormat::Jsonl => json_text(&self.json()),
            OutputFormat::Table | OutputFormat::Raw => self.line(),
        });
        ExitCode::from(self.exit_code())
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } => 2,
            Self::Input { .. } | Self::Output(_) => 1,
            Self::Call(error) => match error {
                Error::InvalidArgument { .. } => 2,
                Error::Overloaded { .. }
                | Error::DiskFull { .. }
                | Error::Unavailable { .. }
                | Error::UpstreamFailed { .. }
                | Error::Connect { .. } => 4,
                Error::Deadline { .. } => 5,
                Error::Conflict { .. } | Error::Membership { .. } | Error::TokenEpoch { .. } => 6,
                Error::Unauthenticated { .. } | Error::PermissionDenied { .. } => 7,
                Error::NotBuilt { .. }
                | Error::TooLarge { .. }
                | Error::NoMember { .. }
                | Error::Internal { .. } => 1,
            },
        }
    }

    fn json(&self) -> ErrorJson<'_> {
        let message = self.to_string();
        let bare = ErrorJson {
            code: "UNKNOWN",
            reason: "LOCAL",
            message,
            field: None,
            applied: None,
            leader: None,
            upstream: None,
            class: None,
            status: None,
            version: None,
            retry_after_ms: None,
        };
        match self {
            Self::Usage { field, .. } => ErrorJson {
                code: "INVALID_ARGUMENT",
                reason: "USAGE",
                field: field.as_deref(),
                ..bare
            },
            Self::Input { .. } | Self::Output(_) => bare,
            Self::Call(error) => {
                let (upstream, class, status) = upstream(error);
                ErrorJson {
                    code: word(error.code()),
                    reason: error.reason(),
                    field: error.field(),
                    applied: error.applied_if_mutation().map(Applied::as_str),
                    leader: error.leader(),
                    upstream,
                    class,
                    status,
                    version: error.version(),
                    retry_after_ms: error.retry_after().map(json::millis),
                    ..bare
                }
            }
        }
    }

    /// `error: no leader (UNAVAILABLE NO_LEADER, applied: no)`
    fn line(&self) -> String {
        let Self::Call(error) = self else {
            return format!("error: {}", safe(&self.to_string()));
        };
        let (code, reason) = (word(error.code()), error.reason());
        let mut words = vec![if code == reason {
            code.to_owned()
        } else {
            format!("{code} {reason}")
        }];
        let mut note = |name: &str, value: Option<&str>| {
            words.extend(value.map(|value| format!("{name}: {value}")))
        };
        note("field", error.field());
        note("applied", error.applied_if_mutation().map(Applied::as_str));
        note("leader", error.leader());
        let (upstream, class, status) = upstream(error);
        note("upstream", upstream);
        note("class", class);
        note("status", status.map(|status| status.to_string()).as_deref());
        let retry_after = error.retry_after().map(time);
        note("retry after", retry_after.as_deref());
        safe(&format!("error: {error} ({})", words.join(", ")))
    }
}

/// A command line that cannot be parsed, or a plea for help.
pub(super) fn usage(error: &clap::Error, arguments: impl Iterator<Item = OsString>) -> ExitCode {
    if error.use_stderr() && wants_json(arguments) {
        return Failure::Usage {
            field: field(error),
            message: message(error),
        }
        .report(OutputFormat::Json);
    }
    // Help into a closed pipe is not an error either.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// What clap says before its tips and its usage, on one line.
fn message(error: &clap::Error) -> String {
    let rendered = error.render().to_string();
    let said = rendered.split("\n\n").next().unwrap_or_default();
    said.strip_prefix("error: ")
        .unwrap_or(said)
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// The argument that is wrong, named as in the `.proto`: `--expires-at <TIME>` is `expires_at`.
fn field(error: &clap::Error) -> Option<String> {
    let argument = match error.get(ContextKind::InvalidArg)? {
        ContextValue::String(argument) => argument,
        ContextValue::Strings(arguments) => arguments.first()?,
        _ => return None,
    };
    // That there is no such argument says nothing of those there are.
    let is_known = error.kind() != ErrorKind::UnknownArgument;
    let name = argument
        .trim_start_matches(['-', '<', '['])
        .split(['=', ' ', '>', ']', '['])
        .next()?;
    is_known.then(|| name.to_ascii_lowercase().replace('-', "_"))
}

/// The command line could not be parsed, but `-o json` on it can be seen.
fn wants_json(arguments: impl Iterator<Item = OsString>) -> bool {
    let words: Vec<String> = arguments
        .map(|word| word.to_string_lossy().to_ascii_lowercase())
        .collect();
    let is_json = |word: &str| matches!(word, "json" | "jsonl");
    let joined = words.iter().any(|word| {
        let value = word
            .strip_prefix("--output=")
            .or_else(|| word.strip_prefix("-o="));
        value
            .or_else(|| word.strip_prefix("-o"))
            .is_some_and(is_json)
    });
    joined
        || words
            .windows(2)
            .any(|pair| matches!(pair[0].as_str(), "-o" | "--output") && is_json(&pair[1]))
}

/// A word on stderr. That stderr is gone is no reason to fail.
pub(super) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

fn upstream(error: &Error) -> (Option<&str>, Option<&str>, Option<u16>) {
    match error {
        Error::UpstreamFailed {
            upstream,
            class,
            status,
            ..
        } => (upstream.as_deref(), class.as_deref(), *status),
        _ => (None, None, None),
    }
}

fn json_text(error: &ErrorJson<'_>) -> String {
    serde_json::to_string(error).expect("strings and numbers are always JSON")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use holdfast_proto::reason;
    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    fn failure(code: Code, why: &str, metadata: &[(&str, &str)], mutation: bool) -> Failure {
        let metadata: HashMap<String, String> = metadata
            .iter()
            .map(|&(k, v)| (k.into(), v.into()))
            .collect();
        let details = ErrorDetails::with_error_info(why, reason::DOMAIN, metadata);
        Error::from_status(
            &Status::with_error_details(code, "words", details),
            mutation,
        )
        .into()
    }

    #[test]
    fn an_error_is_one_json_object_of_the_contracts_fields() {
        let failure = failure(
            Code::Unavailable,
            reason::NO_LEADER,
            &[("applied", "no"), ("leader", "a:1")],
            true,
        );
        assert_eq!(
            json_text(&failure.json()),
            r#"{"code":"UNAVAILABLE","reason":"NO_LEADER","message":"words","field":null,"applied":"no","leader":"a:1","upstream":null,"class":null,"status":null,"version":null,"retry_after_ms":null}"#
        );
    }

    #[test]
    fn an_error_line_names_all_that_is_known() {
        let metadata = [
            ("upstream", "profiles"),
            ("class", "STATUS"),
            ("status", "503"),
        ];
        let line = failure(Code::Unavailable, reason::UPSTREAM_FAILED, &metadata, false).line();
        assert_eq!(
            line,
            "error: words (UNAVAILABLE UPSTREAM_FAILED, upstream: profiles, class: STATUS, status: 503)"
        );
        let line = failure(
            Code::InvalidArgument,
            reason::INVALID_FIELD,
            &[("field", "ttl"), ("applied", "no")],
            true,
        )
        .line();
        assert_eq!(
            line,
            "error: words (INVALID_ARGUMENT INVALID_FIELD, field: ttl, applied: no)"
        );
    }

    #[test]
    fn each_cause_has_the_documented_exit_code() {
        for (code, why, exit) in [
            (Code::InvalidArgument, reason::INVALID_FIELD, 2),
            (Code::Unavailable, reason::NO_LEADER, 4),
            (Code::Unavailable, reason::UPSTREAM_FAILED, 4),
            (Code::ResourceExhausted, reason::OVERLOADED, 4),
            (Code::ResourceExhausted, reason::TOO_LARGE, 1),
            (Code::DeadlineExceeded, reason::DEADLINE, 5),
            (Code::FailedPrecondition, reason::VERSION_CONFLICT, 6),
            (Code::Unauthenticated, "", 7),
            (Code::PermissionDenied, "", 7),
            (Code::Internal, reason::INTERNAL, 1),
        ] {
            assert_eq!(failure(code, why, &[], false).exit_code(), exit, "{why}");
        }
        assert_eq!(
            Failure::from(Error::connect("a:1", "refused", false)).exit_code(),
            4
        );
        assert_eq!(Failure::usage("k", "").exit_code(), 2);
    }

    #[test]
    fn a_line_that_cannot_be_parsed_is_told_by_its_field_in_one_line() {
        use clap::Parser as _;

        let told = |line: &str| {
            let error =
                super::super::arguments::Arguments::try_parse_from(line.split(' ')).unwrap_err();
            (field(&error), message(&error))
        };
        let (named, said) = told("holdfast set k v --expires-at=soon");
        assert_eq!(named.as_deref(), Some("expires_at"));
        assert!(
            said.starts_with("invalid value 'soon' for '--expires-at <TIME>': not RFC 3339"),
            "{said}"
        );
        assert_eq!(
            told("holdfast set k"),
            (
                Some("value".into()),
                "the following required arguments were not provided: <VALUE>".into()
            )
        );
        assert_eq!(
            told("holdfast get k --frob"),
            (None, "unexpected argument '--frob' found".into())
        );
    }

    #[test]
    fn json_is_recognised_on_a_line_that_cannot_be_parsed() {
        let wants = |line: &str| wants_json(line.split(' ').map(OsString::from));
        assert!(wants("get -o json"));
        assert!(wants("get --output=JSONL"));
        assert!(wants("-ojson get"));
        assert!(!wants("get json"));
        assert!(!wants("get -o table"));
    }
}
