//! The command line `holdfast`: every command is one or a few calls of the library. Data goes to
//! stdout, words to stderr, and the exit code says what became of it. Knows nothing the library
//! does not offer to everyone.

mod arguments;
mod cluster;
mod data;
mod failure;
mod json;
mod output;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use self::{
    arguments::{Arguments, Command},
    failure::Failure,
    output::Output,
};
use crate::Client;

/// What the exit codes mean; `--help` ends with it.
const EXIT_CODES: &str = "Exit codes:
  0  ok
  1  error
  2  usage, also a request that the cluster finds invalid
  3  miss: `get` or `inspect` of an absent key
  4  unavailable: no connection, no leader, no quorum, overload, or the upstream failed
  5  deadline: no answer within --timeout
  6  precondition: --if-version or --if-absent did not hold, or members cannot change that way now
  7  not authenticated, or not permitted
  8  degraded: `cluster health` found something wrong";

/// Under a second: a node that restarts is found, and who mistyped an address does not wait.
const UNREACHABLE_RETRIES: u32 = 5;

/// How a command that got its answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Ok,
    Miss,
    Degraded,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return failure::usage(&error, std::env::args_os()),
    };
    // As it was asked for, also where `--raw` contradicts it.
    let asked = arguments.output;
    let format = arguments.format().unwrap_or(asked);
    match run(arguments) {
        Ok(Outcome::Ok) => ExitCode::SUCCESS,
        Ok(Outcome::Miss) => ExitCode::from(3),
        Ok(Outcome::Degraded) => ExitCode::from(8),
        Err(failure) => failure.report(format),
    }
}

fn run(arguments: Arguments) -> Result<Outcome, Failure> {
    let mut output = Output::stdout(arguments.format()?);
    let endpoints = arguments.endpoints();
    let outcome = match arguments.command {
        Command::Completion { shell } => completion(shell, &mut output),
        command => {
            let client = Client::builder()
                .endpoints(endpoints)
                .timeout(arguments.timeout)
                .unreachable_retries(UNREACHABLE_RETRIES)
                .build();
            let client = client.map_err(|error| Failure::usage("endpoints", error.to_string()))?;
            // One call at a time: one thread is enough, and starts fastest.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(answer(command, &client, &mut output))
        }
    }?;
    output.finish()?;
    Ok(outcome)
}

async fn answer(
    command: Command,
    client: &Client,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    match command {
        Command::Get(arguments) => data::get(client, *arguments, output).await,
        Command::Set(arguments) => data::set(client, *arguments, output).await,
        Command::Del(key) => data::delete(client, key, output).await,
        Command::Invalidate(key) => data::invalidate(client, key, output).await,
        Command::Inspect(arguments) => data::inspect(client, arguments, output).await,
        Command::Scan(arguments) => data::scan(client, arguments, output).await,
        Command::Cluster { command } => cluster::cluster(client, command, output).await,
        Command::Member { command } => cluster::member(client, command, output).await,
        Command::Completion { shell } => completion(shell, output),
    }
}

fn completion(shell: clap_complete::Shell, output: &mut Output) -> Result<Outcome, Failure> {
    // Into memory first: clap_complete panics when it cannot write, as when the reader has gone.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "holdfast", &mut script);
    output.bytes(&script)?;
    Ok(Outcome::Ok)
}

#[cfg(test)]
mod tests {
    use holdfast_proto::v1;

    use super::*;
    use crate::scripted::{Node, client, token};

    async fn run(node: &Node, line: &[&str]) -> (Outcome, String) {
        let (outcome, text) = try_run(node, line).await;
        (outcome.unwrap(), text)
    }

    async fn try_run(node: &Node, line: &[&str]) -> (Result<Outcome, Failure>, String) {
        let arguments = Arguments::try_parse_from([&["holdfast"], line].concat()).unwrap();
        let (sink, written) = std::sync::mpsc::channel();
        let mut output = Output::for_test(arguments.format().unwrap(), false, sink);
        let outcome = answer(arguments.command, &client(&[node]), &mut output).await;
        output.finish().unwrap();
        (
            outcome,
            String::from_utf8(written.into_iter().flatten().collect()).unwrap(),
        )
    }

    fn page(keys: &[&'static str], next_cursor: &'static str) -> v1::ScanResponse {
        let answer = v1::Answer {
            value: Some("v".into()),
            state: v1::State::Fresh as i32,
            ..Default::default()
        };
        let entries = keys
            .iter()
            .map(|&key| v1::ScanEntry {
                key: key.into(),
                answer: Some(answer.clone()),
            })
            .collect();
        v1::ScanResponse {
            entries,
            next_cursor: next_cursor.into(),
            replica: Some(v1::Replica::default()),
            token: token(1).encode(),
        }
    }

    #[tokio::test]
    async fn a_miss_prints_nothing_but_in_json_is_an_object() {
        let node = Node::start([]).await;
        assert_eq!(
            run(&node, &["get", "k"]).await,
            (Outcome::Miss, String::new())
        );
        assert_eq!(
            run(&node, &["get", "k", "--raw"]).await,
            (Outcome::Miss, String::new())
        );
        let (outcome, text) = run(&node, &["get", "k", "-o", "json"]).await;
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (outcome, &json["state"], &json["value"]),
            (Outcome::Miss, &"MISS".into(), &serde_json::Value::Null)
        );
    }

    #[tokio::test]
    async fn a_hit_is_shown_to_people_safely_and_raw_is_its_bytes() {
        let node = Node::start([]).await;
        let hit = v1::Answer {
            value: Some("a\x1b\n".into()),
            state: v1::State::Stale as i32,
            version: 4,
            age_ms: 61_000,
            ttl_ms: Some(-1_000),
            stored: true,
            upstream: "profiles".into(),
            ..Default::default()
        };
        node.answer(hit);
        let lines =
            "value     a\\u{1b}\\n\nstate     STALE\nage       1m 1s\nttl       -1s\nversion   4\n";
        let by = "by        node 0 (unknown), revision 0, lag unknown\nupstream  profiles\n";
        assert_eq!(
            run(&node, &["get", "k"]).await,
            (Outcome::Ok, format!("{lines}{by}"))
        );
        assert_eq!(
            run(&node, &["get", "k", "-o", "RAW"]).await,
            (Outcome::Ok, "a\x1b\n".to_owned())
        );
    }

    #[tokio::test]
    async fn a_set_says_its_version_and_token() {
        let node = Node::start([]).await;
        let (outcome, text) = run(&node, &["set", "k", "v", "-o", "jsonl"]).await;
        assert_eq!((outcome, text.lines().count()), (Outcome::Ok, 1));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&json["version"], &json["token"]),
            (&7.into(), &"AQEABw".into())
        );
        assert_eq!(run(&node, &["set", "k", "v", "-o", "raw"]).await.1, "7\n");
    }

    #[tokio::test]
    async fn a_scan_of_all_pages_is_one_json_document() {
        let node = Node::start([]).await;
        for messages in [
            vec![page(&[], "1")],
            vec![page(&["a", "b"], "2")],
            vec![page(&["c"], "")],
        ] {
            node.page(messages);
        }
        let (_, text) = run(&node, &["scan", "--all", "-o", "json"]).await;
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (
                json["entries"].as_array().unwrap().len(),
                &json["next_cursor"]
            ),
            (3, &serde_json::Value::Null)
        );
        assert_eq!(
            (&json["entries"][0]["key"], &json["entries"][0]["value"]),
            (&"a".into(), &"v".into())
        );

        // The second page fails: what came stands as a document that says where to go on.
        node.page(vec![page(&["a", "b"], "2")]);
        let (outcome, text) = try_run(&node, &["scan", "--all", "-o", "json"]).await;
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(matches!(outcome, Err(Failure::Call(_))));
        assert_eq!(
            (
                json["entries"].as_array().unwrap().len(),
                &json["next_cursor"]
            ),
            (2, &"Mg".into())
        );

        for messages in [vec![page(&["a\n\u{e9}"], "2")], vec![page(&["b"], "")]] {
            node.page(messages);
        }
        let (_, text) = run(&node, &["scan", "--all", "-0"]).await;
        assert_eq!(text, "a\n\u{e9}\0b\0");

        for messages in [vec![page(&["a"], "2")], vec![page(&["b"], "")]] {
            node.page(messages);
        }
        let (_, text) = run(&node, &["scan", "--all"]).await;
        assert_eq!(text.matches("KEY").count(), 1, "{text}");

        node.page(vec![page(&["a"], "x")]);
        let (_, text) = run(&node, &["scan", "-o", "json", "--keys-only"]).await;
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&json["next_cursor"], json["entries"][0].get("value")),
            (&"eA".into(), None)
        );
    }
}
