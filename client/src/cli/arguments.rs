//! What may be written on the command line, and what each word is turned into. No call is made
//! here.

use std::{
    ffi::OsString,
    time::{Duration, SystemTime},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::{EXIT_CODES, failure::Failure, output::OutputFormat};
use crate::{Consistency, FOREVER, FetchOnMiss, Token};

const ENDPOINT_DEFAULT: &str = "127.0.0.1:7400";

/// Talks to a Holdfast cluster.
#[derive(Debug, Parser)]
#[command(name = "holdfast", version, after_help = EXIT_CODES, arg_required_else_help = true, subcommand_required = true)]
pub(super) struct Arguments {
    /// Nodes to ask, host:port; several by comma or by repeating
    #[arg(
        short,
        long,
        global = true,
        env = "HOLDFAST_ENDPOINTS",
        value_delimiter = ',',
        default_value = ENDPOINT_DEFAULT
    )]
    endpoints: Vec<String>,

    /// How to print what is answered
    #[arg(short, long, global = true, value_enum, ignore_case = true, default_value_t = OutputFormat::Table)]
    pub(super) output: OutputFormat,

    /// Total time of each call, with a unit
    #[arg(long, global = true, value_parser = timeout, allow_hyphen_values = true, default_value = "5s")]
    pub(super) timeout: Duration,

    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Read a key
    Get(Box<GetArguments>),
    /// Replace a key's value, times and tags
    Set(Box<SetArguments>),
    /// Remove a key
    #[command(visible_alias = "delete")]
    Del(KeyArgument),
    /// Make a key stale now: still served, and refreshed from its upstream
    Invalidate(KeyArgument),
    /// Everything known of a key, and why
    Inspect(InspectArguments),
    /// List keys in order
    Scan(ScanArguments),
    /// The cluster as a whole
    Cluster {
        #[command(subcommand)]
        command: ClusterCommand,
    },
    /// The cluster's members
    Member {
        #[command(subcommand)]
        command: MemberCommand,
    },
    /// Print a completion script for a shell
    Completion {
        #[arg(value_enum, ignore_case = true)]
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(super) struct KeyArgument {
    /// 1 to 1,024 bytes
    key: OsString,
    /// The key is base64, as `key_base64` in JSON: for keys that cannot be written otherwise
    #[arg(long)]
    key_base64: bool,
}

#[derive(Debug, Args)]
pub(super) struct GetArguments {
    #[command(flatten)]
    pub(super) key: KeyArgument,
    /// Print exactly the value's bytes (a newline follows on a terminal); the same as `-o raw`
    #[arg(long)]
    raw: bool,
    /// No older value will do: the upstream is asked, and what is older is not shown though that fails
    #[arg(long, value_parser = duration, allow_hyphen_values = true)]
    pub(super) max_age: Option<Duration>,
    /// Ask nobody and wait for nothing: what is stored, or a miss
    #[arg(long)]
    pub(super) only_if_cached: bool,
    /// Ask the upstream, whatever is stored
    #[arg(long, conflicts_with = "only_if_cached")]
    pub(super) no_cache: bool,
    /// Without the value if its version is this one
    #[arg(long, value_name = "VERSION")]
    pub(super) if_version_not: Option<u64>,
    /// Whether a miss waits for its fetch, instead of what the policy says
    #[arg(long, value_enum, value_name = "WHEN")]
    fetch_on_miss: Option<MissFetch>,
    #[command(flatten)]
    pub(super) read: ReadArguments,
}

#[derive(Debug, Args)]
pub(super) struct SetArguments {
    #[command(flatten)]
    pub(super) key: KeyArgument,
    /// The value; `-` reads it from stdin, `@FILE` from a file
    #[arg(allow_negative_numbers = true)]
    pub(super) value: OsString,
    /// Take the value as it is written, also `-` and what begins with `@`
    #[arg(long)]
    pub(super) literal: bool,
    /// Lifetime from now, with a unit
    #[arg(long, value_parser = duration, allow_hyphen_values = true, conflicts_with = "expires_at")]
    pub(super) ttl: Option<Duration>,
    /// Lifetime until then: RFC 3339, or `@` and seconds since 1970
    #[arg(long, value_name = "TIME", value_parser = instant, allow_hyphen_values = true)]
    pub(super) expires_at: Option<SystemTime>,
    /// How long past its lifetime the value is served at once; with a unit, or `forever`
    #[arg(long, value_name = "TIME", value_parser = window, allow_hyphen_values = true)]
    pub(super) stale_while_revalidate: Option<Duration>,
    /// How long past its lifetime the value is served if no better one can be had; with a unit, or
    /// `forever`
    #[arg(long, value_name = "TIME", value_parser = window, allow_hyphen_values = true)]
    pub(super) stale_if_error: Option<Duration>,
    /// A tag; may be repeated
    #[arg(long = "tag", value_name = "TAG")]
    pub(super) tags: Vec<String>,
    /// What the value is, as in HTTP
    #[arg(long, value_name = "TYPE")]
    pub(super) content_type: Option<String>,
    /// Only if the key has no value that would be served
    #[arg(long, conflicts_with = "if_version")]
    pub(super) if_absent: bool,
    /// Only if the key's version is this one
    #[arg(long, value_name = "VERSION")]
    pub(super) if_version: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct InspectArguments {
    #[command(flatten)]
    pub(super) key: KeyArgument,
    #[command(flatten)]
    pub(super) read: ReadArguments,
}

#[derive(Debug, Args)]
pub(super) struct ScanArguments {
    /// Only keys that begin with this
    #[arg(default_value = "")]
    prefix: OsString,
    /// The prefix is base64
    #[arg(long)]
    prefix_base64: bool,
    /// End each key with a NUL byte instead of a newline, as `xargs -0` takes them; only with
    /// `-o raw`, which it stands for
    #[arg(short = '0', long)]
    pub(super) null: bool,
    /// Entries a page [default: 100, at most 1000]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) limit: Option<u32>,
    /// Where the page before ended
    #[arg(long, value_parser = cursor)]
    pub(super) cursor: Option<Bytes>,
    /// Without values
    #[arg(long)]
    pub(super) keys_only: bool,
    /// All pages, one after the other
    #[arg(long)]
    pub(super) all: bool,
    #[command(flatten)]
    pub(super) read: ReadArguments,
}

#[derive(Debug, Args)]
pub(super) struct ReadArguments {
    /// How much the read must have seen
    #[arg(long, value_enum, ignore_case = true, default_value_t = ReadConsistency::Session)]
    consistency: ReadConsistency,
    /// See at least what this token, from an earlier answer, has seen
    #[arg(long, value_parser = token)]
    pub(super) token: Option<Token>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MissFetch {
    /// Wait for the value
    Sync,
    /// Show the policy's placeholder
    Async,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ReadConsistency {
    /// At least what --token has seen
    Session,
    /// What the node has, however old
    Local,
    /// Every write acknowledged before
    Linearizable,
}

#[derive(Debug, Subcommand)]
pub(super) enum ClusterCommand {
    /// What the cluster is and how its nodes are
    Status,
    /// Whether the cluster keeps its promises; exit 8 if not
    Health,
    /// Hand leadership on, to the voter named or to the one that is furthest
    TransferLeader { to: Option<String> },
}

#[derive(Debug, Subcommand)]
pub(super) enum MemberCommand {
    /// The members
    List,
    /// Admit a node as a learner; usually nodes join by themselves
    Add { name: String, address: String },
    /// Make a learner a voter
    Promote { name: String },
    /// Remove a member; its id is never used again
    Remove { name: String },
}

impl Arguments {
    /// The nodes to ask. A variable that is set to nothing, as deployment tools do, is not set, and
    /// a comma at the end names no node.
    pub(super) fn endpoints(&self) -> Vec<String> {
        let mut named = self.endpoints.iter().map(|endpoint| endpoint.trim());
        let named: Vec<String> = named
            .by_ref()
            .filter(|endpoint| !endpoint.is_empty())
            .map(str::to_owned)
            .collect();
        if named.is_empty() {
            vec![ENDPOINT_DEFAULT.to_owned()]
        } else {
            named
        }
    }

    /// `--raw`, `--null` and `-o` must not contradict each other.
    pub(super) fn format(&self) -> Result<OutputFormat, Failure> {
        let contradicted = |name| {
            let message = format!("--{name} contradicts -o json and -o jsonl");
            Err(Failure::usage(name, message))
        };
        match (&self.command, self.output) {
            (Command::Get(get), OutputFormat::Json | OutputFormat::Jsonl) if get.raw => {
                contradicted("raw")
            }
            (Command::Scan(scan), OutputFormat::Json | OutputFormat::Jsonl) if scan.null => {
                contradicted("null")
            }
            (Command::Get(get), _) if get.raw => Ok(OutputFormat::Raw),
            (Command::Scan(scan), _) if scan.null => Ok(OutputFormat::Raw),
            (_, output) => Ok(output),
        }
    }
}

impl GetArguments {
    pub(super) fn fetch_on_miss(&self) -> Option<FetchOnMiss> {
        Some(match self.fetch_on_miss? {
            MissFetch::Sync => FetchOnMiss::Sync,
            MissFetch::Async => FetchOnMiss::Async,
        })
    }
}

impl KeyArgument {
    pub(super) fn bytes(self) -> Result<Vec<u8>, Failure> {
        bytes("key", self.key, self.key_base64)
    }
}

impl ScanArguments {
    pub(super) fn prefix(&self) -> Result<Vec<u8>, Failure> {
        bytes("prefix", self.prefix.clone(), self.prefix_base64)
    }
}

/// As written, or from base64: the standard alphabet that JSON answers use, or the URL's, with or
/// without padding.
fn bytes(field: &str, written: OsString, base64: bool) -> Result<Vec<u8>, Failure> {
    let written = written.into_encoded_bytes();
    if !base64 {
        return Ok(written);
    }
    let plain = written.trim_ascii_end();
    let unpadded = plain.strip_suffix(b"==").or(plain.strip_suffix(b"="));
    let unpadded = unpadded.unwrap_or(plain);
    let decoded = STANDARD_NO_PAD.decode(unpadded);
    decoded
        .or_else(|_| URL_SAFE_NO_PAD.decode(unpadded))
        .map_err(|_| Failure::usage(field, format!("the {field} is not base64")))
}

impl ReadArguments {
    pub(super) fn consistency(&self) -> Consistency {
        match self.consistency {
            ReadConsistency::Session => Consistency::Session,
            ReadConsistency::Local => Consistency::Local,
            ReadConsistency::Linearizable => Consistency::Linearizable,
        }
    }
}

/// A negative one is let through to here, so that it is refused as what it is and not as an option
/// that there is not.
fn duration(text: &str) -> Result<Duration, String> {
    if text.starts_with('-') && !text.starts_with("--") {
        return Err("a time is not negative".to_owned());
    }
    // humantime lets a bare 0 pass.
    if text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        return Err(format!("a time needs a unit: {text}s, {text}ms, {text}min"));
    }
    humantime::parse_duration(text).map_err(|error| error.to_string())
}

fn timeout(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|timeout| {
        if timeout.is_zero() {
            Err("no time at all".to_owned())
        } else {
            Ok(timeout)
        }
    })
}

fn window(text: &str) -> Result<Duration, String> {
    if text.eq_ignore_ascii_case("forever") {
        Ok(FOREVER)
    } else {
        duration(text)
    }
}

/// RFC 3339 with any offset, or `@` and seconds since 1970.
fn instant(text: &str) -> Result<SystemTime, String> {
    let invalid =
        || "not RFC 3339, as 2030-01-31T12:00:00Z, and not @ and seconds since 1970".to_owned();
    if let Some(seconds) = text.strip_prefix('@') {
        let seconds = seconds.parse().map_err(|_| invalid())?;
        return SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))
            .ok_or_else(invalid);
    }
    let (local, east, offset) = split_offset(text).ok_or_else(invalid)?;
    let local = humantime::parse_rfc3339(&format!("{local}Z")).map_err(|_| invalid())?;
    let instant = if east {
        local.checked_sub(offset)
    } else {
        local.checked_add(offset)
    };
    instant.ok_or_else(invalid)
}

/// The local part, whether the offset is east of Greenwich, and how far.
fn split_offset(text: &str) -> Option<(&str, bool, Duration)> {
    if let Some(local) = text.strip_suffix(['Z', 'z']) {
        return Some((local, true, Duration::ZERO));
    }
    let (local, offset) = text.split_at_checked(text.len().checked_sub("+00:00".len())?)?;
    let (sign, offset) = offset.split_at_checked(1)?;
    let (hours, minutes) = offset.split_once(':')?;
    let number = |digits: &str, below: u64| {
        digits
            .parse()
            .ok()
            .filter(|&n: &u64| digits.len() == 2 && n < below)
    };
    let offset = Duration::from_secs(number(hours, 24)? * 3600 + number(minutes, 60)? * 60);
    match sign {
        "+" => Some((local, true, offset)),
        "-" => Some((local, false, offset)),
        _ => None,
    }
}

fn token(text: &str) -> Result<Token, String> {
    let invalid = "not a token that an answer gave";
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| invalid)?;
    Token::decode(&bytes)
        .map_err(|_| invalid)?
        .ok_or_else(|| invalid.to_owned())
}

fn cursor(text: &str) -> Result<Bytes, String> {
    URL_SAFE_NO_PAD
        .decode(text)
        .map(Bytes::from)
        .map_err(|_| "not a cursor that a page gave".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once(&"holdfast").chain(line))
    }

    fn is_refused(line: &[&str]) -> bool {
        parse(line).is_err_and(|error| error.exit_code() == 2)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn globals_stand_before_or_after_the_command_and_ignore_case() {
        for line in [
            ["-e", "a:1,b:2", "-o", "JSON", "--timeout", "2s", "get", "k"],
            ["get", "k", "-o", "json", "--timeout", "2s", "-e", "a:1,b:2"],
        ] {
            let arguments = parse(&line).unwrap();
            assert_eq!(arguments.endpoints(), ["a:1", "b:2"]);
            assert_eq!(
                (arguments.output, arguments.timeout),
                (OutputFormat::Json, Duration::from_secs(2))
            );
        }
        assert_eq!(
            parse(&["-e", "a:1", "-e", "b:2", "cluster", "status"])
                .unwrap()
                .endpoints(),
            ["a:1", "b:2"]
        );
        assert!(parse(&["get", "k", "--consistency", "LINEARIZABLE"]).is_ok());
    }

    #[test]
    fn an_empty_list_of_endpoints_is_the_default_and_a_last_comma_names_none() {
        let endpoints = |list: &str| parse(&["-e", list, "get", "k"]).unwrap().endpoints();
        assert_eq!(endpoints(""), [ENDPOINT_DEFAULT]);
        assert_eq!(endpoints(","), [ENDPOINT_DEFAULT]);
        assert_eq!(endpoints("a:1,"), ["a:1"]);
        assert_eq!(endpoints("a:1, b:2"), ["a:1", "b:2"]);
    }

    #[test]
    fn any_key_can_be_written_in_base64() {
        let key = |written: &str| {
            let Command::Del(key) = parse(&["del", "--key-base64", "--", written])
                .unwrap()
                .command
            else {
                panic!()
            };
            key.bytes()
        };
        assert_eq!(key("AP8K").unwrap(), b"\x00\xff\n");
        assert_eq!(key("+/8=").unwrap(), [0xfb, 0xff]);
        assert_eq!(key("-_8").unwrap(), [0xfb, 0xff]);
        assert_eq!(key("_w==").unwrap(), [0xff]);
        assert!(key("no base64!").is_err());
    }

    #[test]
    fn a_bare_number_is_no_time() {
        for bad in ["5", "0", "1.5", "0s", "-5s", "soon"] {
            assert!(
                is_refused(&["get", "k", &format!("--timeout={bad}")]),
                "{bad}"
            );
        }
        for bad in ["60", "0", "-1s", ""] {
            assert!(
                is_refused(&["set", "k", "v", &format!("--ttl={bad}")]),
                "{bad}"
            );
        }
        assert!(parse(&["set", "k", "v", "--ttl", "1m 30s"]).is_ok());
    }

    #[test]
    fn what_excludes_each_other_is_refused() {
        assert!(is_refused(&[
            "set",
            "k",
            "v",
            "--ttl",
            "5s",
            "--expires-at",
            "@1"
        ]));
        assert!(is_refused(&[
            "set",
            "k",
            "v",
            "--if-absent",
            "--if-version",
            "1"
        ]));
        assert!(
            parse(&["get", "k", "--raw", "-o", "json"])
                .unwrap()
                .format()
                .is_err()
        );
        assert_eq!(
            parse(&["get", "k", "--raw"]).unwrap().format().unwrap(),
            OutputFormat::Raw
        );
    }

    #[test]
    fn instants_are_rfc_3339_with_any_offset_or_unix_seconds() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(instant("@1700000000"), Ok(at(1_700_000_000)));
        assert_eq!(instant("2023-11-14T22:13:20Z"), Ok(at(1_700_000_000)));
        assert_eq!(instant("2023-11-15T00:13:20+02:00"), Ok(at(1_700_000_000)));
        assert_eq!(instant("2023-11-14T16:43:20-05:30"), Ok(at(1_700_000_000)));
        assert_eq!(
            instant("2023-11-14T22:13:20.5Z"),
            Ok(at(1_700_000_000) + Duration::from_millis(500))
        );
        for bad in [
            "",
            "@",
            "@-1",
            "tomorrow",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-11-14T22:13:20+2:00",
            "2023-11-14T22:13:20+24:00",
            "ü+00:00",
        ] {
            assert!(instant(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_survives_the_command_line_and_nonsense_does_not() {
        let mut seen = Token::new(3);
        seen.see(0, 12);
        assert_eq!(token(&URL_SAFE_NO_PAD.encode(seen.encode())), Ok(seen));
        assert!(token("").is_err());
        assert!(token("%%%").is_err());
        assert!(token("AAAA").is_err());
    }

    #[test]
    fn values_and_keys_may_look_odd() {
        let Command::Set(set) = parse(&["set", "k", "-"]).unwrap().command else {
            panic!()
        };
        assert_eq!((set.value, set.literal), ("-".into(), false));
        let Command::Set(set) = parse(&["set", "k", "-5", "--tag", "a", "--tag", "b"])
            .unwrap()
            .command
        else {
            panic!()
        };
        assert_eq!((set.value, set.tags.len()), ("-5".into(), 2));
        let Command::Set(set) = parse(&["set", "--", "-k", "--v"]).unwrap().command else {
            panic!()
        };
        assert_eq!(
            (set.key.bytes().unwrap(), set.value),
            (b"-k".to_vec(), "--v".into())
        );
    }

    #[test]
    fn help_documents_every_exit_code() {
        let help = Arguments::command().render_help().to_string();
        for code in 0..=8 {
            assert!(help.contains(&format!("\n  {code}  ")), "{code}");
        }
    }
}
