//! What a command takes: where its words may stand, values byte by byte, times and tags, and what
//! it refuses by its name.

use std::{ffi::OsString, os::unix::ffi::OsStringExt as _, process::Command, time::Duration};

use anyhow::{Context as _, ensure};
use holdfast_proto::limits::{KEY_BYTES_MAX, VALUE_BYTES_DEFAULT, VALUE_BYTES_MAX};
use serde_json::{Value, json};
use tracing::info;

use super::{User, holdfast, nobody, run};
use crate::{PROGRAMS, in_process};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_to_ask_and_how_to_print_is_said_anywhere_on_the_line_or_by_the_environment()
-> anyhow::Result<()> {
    let cluster = in_process().nodes(1, 1).start().await?;
    let live = cluster.addresses(0).client;
    let (_held, dead) = nobody()?;
    cluster.client(0).set("k", "v").await?;
    let says = async |line: &str, environment: &str| {
        let mut command = holdfast(line.split_whitespace());
        if !environment.is_empty() {
            command.env("HOLDFAST_ENDPOINTS", environment);
        }
        let ran = run(&mut command, b"").await?;
        ensure!(
            ran.code == Some(0) && ran.stderr.is_empty() && ran.text().contains("FRESH"),
            "{line}: {ran:?}"
        );
        anyhow::Ok(ran)
    };

    info!("--- before and after the command");
    for line in [
        format!("-e {live} -o json --timeout 2s get k"),
        format!("get -e {live} -o json --timeout 2s k"),
        format!("get k -e {live} -o json --timeout 2s"),
        format!("get k --endpoints={live} --output=json --timeout=2s"),
        format!("-e {live} get k -o JSON"),
        format!("-o Json get k --consistency LINEARIZABLE -e http://{live}"),
    ] {
        assert_eq!(says(&line, "").await?.json()?["value"], "v", "{line}");
    }
    let nested = run(
        &mut holdfast(format!("cluster -o jsonl status -e {live}").split(' ')),
        b"",
    )
    .await?;
    assert_eq!(
        nested.json()?["nodes"][0]["client_address"],
        live.to_string()
    );

    info!("--- the environment, and the line over it");
    says("get k", &live.to_string()).await?;
    says("get k", &format!("{dead},{live}")).await?;
    says(&format!("-e {live} get k"), &dead.to_string()).await?;
    says(&format!("get k -e {live}"), &dead.to_string()).await?;

    info!("--- several, the first of them dead");
    says(&format!("-e {dead},{live} get k"), "").await?;
    says(&format!("get k -e {dead} -e {live}"), "").await?;
    let set = run(
        &mut holdfast(format!("-e {dead},{live} set k again").split(' ')),
        b"",
    )
    .await?;
    assert_eq!(set.code, Some(0), "{set:?}");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_is_given_back_byte_by_byte() -> anyhow::Result<()> {
    let cluster = in_process().nodes(1, 1).start().await?;
    let user = User::of(&cluster, 0);
    let raw = async |key: &str| anyhow::Ok(user.says(["get", "--raw", "--", key]).await?.stdout);
    let bytes: Vec<u8> = (0..=255).chain([0, b'\n', 0, 0xff]).collect();
    let file = cluster.dir().join("value");

    info!("--- from stdin, a pipe, a file");
    for value in [&bytes[..], b"line\n", b"no newline", b"\0", b""] {
        let stored = run(
            &mut holdfast(["-e", &user.endpoint, "set", "k", "-"]),
            value,
        )
        .await?;
        ensure!(
            stored.code == Some(0) && raw("k").await? == value,
            "{value:?} is {:?}",
            raw("k").await?
        );
        std::fs::write(&file, value)?;
        user.says(["set", "k", &format!("@{}", file.display())])
            .await?;
        ensure!(
            raw("k").await? == value,
            "{value:?} is {:?}",
            raw("k").await?
        );
    }
    let line = r#"printf 'a\0b' | "$0" -e "$1" set k -"#;
    let piped = run(
        Command::new("sh").args(["-c", line, PROGRAMS.holdfast, &user.endpoint]),
        b"",
    )
    .await?;
    ensure!(
        piped.code == Some(0) && raw("k").await? == b"a\0b",
        "{:?}",
        raw("k").await?
    );
    let largest = vec![0x5a; VALUE_BYTES_DEFAULT];
    std::fs::write(&file, &largest)?;
    user.says(["set", "k", &format!("@{}", file.display())])
        .await?;
    ensure!(
        raw("k").await? == largest,
        "the largest value there may be is another"
    );

    info!("--- from the line");
    for (words, key, value) in [
        (vec!["set", "k", ""], "k", ""),
        (vec!["set", "k", "-5"], "k", "-5"),
        (vec!["set", "k", "--", "-v"], "k", "-v"),
        (vec!["set", "k", "--ttl", "1h", "--", "--ttl"], "k", "--ttl"),
        (vec!["set", "--", "-k", "--v"], "-k", "--v"),
        (vec!["set", "--literal", "k", "--", "-"], "k", "-"),
        (
            vec!["set", "k", "@not-a-file", "--literal"],
            "k",
            "@not-a-file",
        ),
        (vec!["set", "a key", "two words\n"], "a key", "two words\n"),
    ] {
        let stored = user.says(&words).await?;
        ensure!(
            stored.code == Some(0) && raw(key).await? == value.as_bytes(),
            "{words:?}: {stored:?}, {:?}",
            raw(key).await?
        );
    }
    assert_eq!(user.json("get k").await?["value"], "@not-a-file");
    for words in [
        ["inspect", "--", "-k"],
        ["scan", "--", "-k"],
        ["invalidate", "--", "-k"],
        ["del", "--", "-k"],
    ] {
        assert_eq!(user.says(words).await?.code, Some(0), "{words:?}");
    }
    assert_eq!(
        user.says(["get", "--", "-k"]).await?.code,
        Some(3),
        "it is deleted"
    );

    info!("--- what is no text stands as base64");
    let odd = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    user.says(["set".into(), odd(b"\xffkey"), odd(b"\xfe\xff")])
        .await?;
    let found = user
        .says(["get".into(), odd(b"\xffkey"), "-o".into(), "json".into()])
        .await?
        .json()?;
    assert_eq!(
        (found.get("value"), &found["value_base64"]),
        (None, &json!("/v8="))
    );
    let found = user
        .says(["scan".into(), odd(b"\xff"), "-o".into(), "jsonl".into()])
        .await?
        .json()?;
    assert_eq!(
        (
            found.get("key"),
            &found["key_base64"],
            &found["value_base64"]
        ),
        (None, &json!("/2tleQ=="), &json!("/v8="))
    );
    let shown = user.says(["get".into(), odd(b"\xffkey")]).await?.text();
    ensure!(shown.starts_with("value    \\xfe\\xff\n"), "{shown}");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_and_tags_are_taken_as_they_are_said() -> anyhow::Result<()> {
    let cluster = in_process().nodes(1, 1).start().await?;
    let user = User::of(&cluster, 0);
    user.done("set k v --ttl 1h --tag a --tag b --stale-if-error 30min --content-type text/plain")
        .await?;
    let found = user.json("inspect k").await?;
    assert_eq!(
        (&found["entry"]["tags"], &found["answer"]["content_type"]),
        (&json!(["a", "b"]), &json!("text/plain"))
    );
    let at = |found: &Value, name: &str| {
        found["entry"][name]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("{name} in {found}"))
    };
    ensure!(
        at(&found, "fresh_until")? == at(&found, "stale_until")?
            && at(&found, "expires_at")? > at(&found, "fresh_until")?,
        "{found}"
    );
    let ttl = user.json("get k").await?["ttl_ms"]
        .as_i64()
        .context("a ttl")?;
    ensure!((3_500_000..=3_600_000).contains(&ttl), "{ttl}");

    user.done("set until v --expires-at 2090-01-31T14:00:00+02:00")
        .await?;
    assert_eq!(
        at(&user.json("inspect until").await?, "expires_at")?,
        "2090-01-31T12:00:00.000Z"
    );
    user.done("set until v --expires-at @4102444800").await?;
    assert_eq!(
        at(&user.json("inspect until").await?, "expires_at")?,
        "2100-01-01T00:00:00.000Z"
    );
    user.done("set kept v --ttl 1h --stale-if-error FOREVER")
        .await?;
    assert_eq!(user.json("get kept").await?["expires_in_ms"], Value::Null);
    info!("--- one that is over already");
    user.done("set gone v --expires-at @1").await?;
    assert_eq!(user.types("get gone").await?.code, Some(3));

    info!("--- and time goes on");
    cluster.advance(Duration::from_secs(3600)).await?;
    let found = user.json("get k").await?;
    ensure!(
        found["state"] == "STALE_ON_ERROR" && found["ttl_ms"].as_i64().is_some_and(|ttl| ttl <= 0),
        "{found}"
    );
    cluster.advance(Duration::from_secs(3600)).await?;
    assert_eq!(user.types("get k").await?.code, Some(3));
    user.done("get kept").await?;
    user.done("get until").await?;
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_with_its_field_and_changes_nothing() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let user = User::of(&cluster, cluster.follower().await?);
    user.done("set k kept").await?;
    let before = user.json("get k --consistency linearizable").await?;
    let long = "k".repeat(KEY_BYTES_MAX + 1);
    let long = long.as_str();
    let refused = async |words: &[&str], stdin: &[u8], exit: i32, code: &str, field: &str| {
        let ran = run(
            holdfast(["-e", &user.endpoint, "-o", "json"]).args(words),
            stdin,
        )
        .await?;
        let error = ran.error()?;
        let told = (ran.code, error["code"].as_str(), error["field"].as_str());
        ensure!(
            told == (Some(exit), Some(code), Some(field)),
            "{words:?}: {told:?}: {error}"
        );
        ensure!(
            error["message"]
                .as_str()
                .is_some_and(|message| !message.is_empty()),
            "{words:?}: {error}"
        );
        anyhow::Ok(error)
    };
    let usage =
        async |words: &[&str], field: &str| refused(words, b"", 2, "INVALID_ARGUMENT", field).await;

    info!("--- keys");
    for key in ["", long] {
        for command in ["get", "del", "invalidate", "inspect"] {
            usage(&[command, key], "key").await?;
        }
        assert_eq!(usage(&["set", key, "v"], "key").await?["applied"], "no");
    }
    usage(&["scan", long], "prefix").await?;
    usage(&["get"], "key").await?;
    usage(&["set", "k"], "value").await?;

    info!("--- values");
    for size in [VALUE_BYTES_DEFAULT + 1, VALUE_BYTES_MAX + 1] {
        let error = refused(
            &["set", "k", "-"],
            &vec![0; size],
            1,
            "RESOURCE_EXHAUSTED",
            "value",
        )
        .await?;
        assert_eq!(
            (&error["reason"], &error["applied"]),
            (&json!("TOO_LARGE"), &json!("no"))
        );
    }

    info!("--- times");
    for ttl in ["0", "5", "1.5", "0s", "-1s", "soon", "", "5 parsecs"] {
        usage(&["set", "k", "v", "--ttl", ttl], "ttl").await?;
        usage(&["set", "k", "v", &format!("--ttl={ttl}")], "ttl").await?;
    }
    let said = usage(&["set", "k", "v", "--ttl", "5"], "ttl").await?;
    ensure!(
        said["message"]
            .as_str()
            .is_some_and(|message| message.contains("needs a unit") && message.contains("5s")),
        "{said}"
    );
    for bare in ["stale-while-revalidate", "stale-if-error"] {
        usage(
            &["set", "k", "v", &format!("--{bare}"), "5"],
            &bare.replace('-', "_"),
        )
        .await?;
        usage(
            &["set", "k", "v", &format!("--{bare}"), "-5s"],
            &bare.replace('-', "_"),
        )
        .await?;
    }
    for instant in ["tomorrow", "5", "-1", "@99999999999999"] {
        usage(&["set", "k", "v", "--expires-at", instant], "expires_at").await?;
    }
    usage(
        &[
            "set",
            "k",
            "v",
            "--ttl",
            "5s",
            "--expires-at",
            "@4102444800",
        ],
        "ttl",
    )
    .await?;
    for timeout in ["5", "0s", "-5s"] {
        usage(&["get", "k", "--timeout", timeout], "timeout").await?;
    }

    info!("--- the rest");
    usage(&["set", "k", "v", "--tag", ""], "tags").await?;
    usage(
        &["set", "k", "v", "--if-absent", "--if-version", "1"],
        "if_absent",
    )
    .await?;
    usage(&["set", "k", "v", "--if-version", "first"], "if_version").await?;
    usage(&["get", "k", "--consistency", "strange"], "consistency").await?;
    usage(&["get", "k", "--token", "nonsense"], "token").await?;
    usage(&["scan", "--limit", "1001"], "limit").await?;
    usage(&["scan", "--limit", "0"], "limit").await?;
    usage(&["scan", "--cursor", "nonsense"], "cursor").await?;
    usage(&["scan", "--cursor", "!"], "cursor").await?;

    let after = user.json("get k --consistency linearizable").await?;
    assert_eq!(
        (&after["value"], &after["version"]),
        (&json!("kept"), &before["version"])
    );
    assert_eq!(
        after["replica"]["revision"], before["replica"]["revision"],
        "nothing changed"
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_carries_a_session_from_one_command_to_the_next() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let users: Vec<User> = (0..3).map(|node| User::of(&cluster, node)).collect();
    for round in 0..10 {
        let token = users[round % 3].json(&format!("set k {round}")).await?["token"]
            .as_str()
            .context("a token")?
            .to_owned();
        let reader = &users[(round + 1) % 3];
        assert_eq!(
            reader
                .done(&format!("get k --raw --token {token}"))
                .await?
                .text(),
            round.to_string()
        );
        assert_eq!(
            reader.json(&format!("inspect k --token {token}")).await?["answer"]["state"],
            "FRESH"
        );
        assert_eq!(
            reader.json(&format!("scan k --token {token}")).await?["entries"][0]["value"],
            round.to_string()
        );
        assert_eq!(
            users[(round + 2) % 3]
                .done("get k --raw --consistency linearizable")
                .await?
                .text(),
            round.to_string()
        );
    }
    info!("--- it is what the node is asked with: of another epoch, and of what is not yet");
    for command in ["get", "inspect", "scan"] {
        let old = users[0]
            .types(&format!("{command} k --token AU0ABw -o json"))
            .await?;
        ensure!(
            old.code == Some(6) && old.error()?["reason"] == "TOKEN_EPOCH",
            "{old:?}"
        );
        let early = users[0]
            .types(&format!(
                "{command} k --token AQEAfw --timeout 500ms -o json"
            ))
            .await?;
        ensure!(matches!(early.code, Some(4 | 5)), "{early:?}");
    }
    cluster.stop().await
}
