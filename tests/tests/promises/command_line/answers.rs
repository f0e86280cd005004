//! What a command prints: data on stdout and nothing else, in every format, with the contract's
//! names and types.

use anyhow::{Context as _, ensure};
use holdfast_tests::origin::{Behaviour, Origin};
use serde_json::{Value, json};
use tracing::info;

use super::{User, with_users};
use crate::in_process;

/// Names and types of a document: `{age_ms: uint, value: string}`. A list has the shape of its
/// first item.
fn shape(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        Value::Number(number) if number.is_u64() => "uint".to_owned(),
        Value::Number(_) => "number".to_owned(),
        Value::String(_) => "string".to_owned(),
        Value::Array(items) => format!("[{}]", items.first().map(shape).unwrap_or_default()),
        Value::Object(fields) => {
            // How far behind a replica is, it may not know.
            let one = |(name, value): (&String, &Value)| match name.as_str() {
                "replica_lag_ms" if value.is_null() => "replica_lag_ms: uint".to_owned(),
                // Of either sign.
                "log_time_ahead_ms" if value.is_i64() => "log_time_ahead_ms: int".to_owned(),
                name => format!("{name}: {}", shape(value)),
            };
            let mut fields: Vec<String> = fields.iter().map(one).collect();
            fields.sort_unstable();
            format!("{{{}}}", fields.join(", "))
        }
    }
}

const REPLICA: &str =
    "{node_id: uint, region: string, replica_lag_ms: uint, revision: uint, role: string}";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_can_be_had_in_every_format_and_is_all_there_is_on_stdout()
-> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let leader = cluster.leader().await?;
    let (user, leader) = (User::of(&cluster, leader), cluster.name(leader).to_owned());
    cluster
        .until("the cluster is healthy", async || {
            user.done("cluster health").await.is_ok()
        })
        .await?;
    let lines = [
        "set k v --tag a",
        "get k",
        "inspect k",
        "scan",
        "invalidate k",
        "cluster status",
        "cluster health",
        "member list",
        "del k",
    ];
    for line in lines {
        for format in ["table", "raw"] {
            let text = user.done(&format!("{line} -o {format}")).await?.text();
            ensure!(
                !text.trim().is_empty(),
                "{line} -o {format} printed nothing"
            );
            ensure!(!text.contains('{'), "{line} -o {format} printed {text}");
        }
        let objects = user.done(&format!("{line} -o jsonl")).await?.text();
        for object in objects.lines() {
            ensure!(
                serde_json::from_str::<Value>(object)?.is_object(),
                "{line}: {object}"
            );
        }
    }

    info!("--- json: names and types are the contract");
    let is = async |line: &str, expected: String| {
        let found = shape(&user.json(line).await?);
        ensure!(
            found == expected,
            "{line} printed\n{found}\nand not\n{expected}"
        );
        anyhow::Ok(())
    };
    let answer = |ttl: &str, rest: &str| {
        format!(
            "age_ms: uint, content_type: null, expires_in_ms: {ttl}, last_error: null, refresh_due: bool, refreshing: bool, {rest}state: string, stored: bool"
        )
    };
    is(
        "set k v --tag a",
        format!("{{replica: {REPLICA}, token: string, version: uint}}"),
    )
    .await?;
    let replica = format!("replica: {REPLICA}, ");
    let plain = answer("null", &replica);
    is(
        "get k",
        format!(
            "{{{plain}, token: string, ttl_ms: null, upstream: null, value: string, version: uint}}"
        ),
    )
    .await?;
    user.done("set timed v --ttl 1h").await?;
    let timed = answer("uint", &replica);
    is(
        "get timed",
        format!(
            "{{{timed}, token: string, ttl_ms: uint, upstream: null, value: string, version: uint}}"
        ),
    )
    .await?;
    let entry = "{changed: uint, content_hash: uint, expires_at: null, fetched_at: string, fresh_until: null, in_memory: bool, origin: string, refresh_at: null, size_bytes: uint, stale_until: null, tags: [string], version: uint}";
    let inspected = answer("null", "");
    user.done("set untouched v --tag a").await?;
    is(
        "inspect untouched",
        format!(
            "{{answer: {{{inspected}, ttl_ms: null, upstream: null, version: uint}}, entry: {entry}, now: string, policy: null, replica: {REPLICA}, shard: uint, slot: uint, token: string, tombstone_revision: null, why: [string]}}"
        ),
    )
    .await?;
    let scanned = answer("null", "").replace("last_error", "key: string, last_error");
    let scanned =
        format!("{{{scanned}, ttl_ms: null, upstream: null, value: string, version: uint}}");
    is(
        "scan",
        format!("{{entries: [{scanned}], next_cursor: null, replica: {REPLICA}, token: string}}"),
    )
    .await?;
    let node = "{client_address: string, healthy: bool, id: uint, lag: uint, name: string, peer_address: string, policies_differ: bool, policy_hash: uint, problems: [], region: string, revision: uint, role: string, version: string}";
    let shard = "{leader: string, learners: [], log_time_ahead_ms: int, revision: uint, shard: uint, term: uint, voters: [string]}";
    is(
        "cluster status",
        format!("{{cluster_id: string, epoch: uint, leader: string, nodes: [{node}], per_shard: [{shard}], shards: uint}}"),
    )
    .await?;
    is(
        "cluster health",
        "{healthy: bool, leader: string, problems: []}".into(),
    )
    .await?;
    is("member list", format!("{{nodes: [{node}]}}")).await?;
    is(
        "invalidate k",
        format!("{{existed: bool, replica: {REPLICA}, token: string}}"),
    )
    .await?;
    is(
        "del k",
        format!("{{existed: bool, replica: {REPLICA}, token: string}}"),
    )
    .await?;

    info!("--- json: words are the contract's, without their prefix");
    user.done("set k v").await?;
    let found = user.json("get k --consistency linearizable").await?;
    assert_eq!(
        (&found["state"], &found["value"], &found["stored"]),
        (&json!("FRESH"), &json!("v"), &json!(true))
    );
    assert_eq!(
        user.json("inspect k --consistency linearizable").await?["entry"]["origin"],
        "PLAIN"
    );
    let roles = user.json("cluster status").await?;
    let mut roles: Vec<&str> = roles["nodes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| node["role"].as_str())
        .collect();
    roles.sort_unstable();
    assert_eq!(roles, ["leader", "voter", "voter"]);

    info!("--- raw: the bare datum");
    assert_eq!(user.done("get k -o raw").await?.text(), "v");
    assert_eq!(
        user.done("scan -o raw").await?.text(),
        "k\ntimed\nuntouched\n"
    );
    assert_eq!(user.done("invalidate k -o raw").await?.text(), "true\n");
    // Stale at once, a plain value is served no more.
    assert_eq!(user.done("invalidate k -o raw").await?.text(), "false\n");
    user.done("set k v").await?;
    assert_eq!(user.done("del k -o raw").await?.text(), "true\n");
    assert_eq!(user.done("del k -o raw").await?.text(), "false\n");
    assert_eq!(
        user.done("cluster status -o raw").await?.text(),
        format!("{leader}\n")
    );
    assert_eq!(
        user.done("cluster health -o raw").await?.text(),
        "healthy\n"
    );
    assert_eq!(
        user.done("member list -o raw")
            .await?
            .text()
            .lines()
            .count(),
        3
    );

    info!("--- table: for people");
    user.done("set k v").await?;
    let table = user.done("get k --consistency linearizable").await?.text();
    ensure!(table.starts_with("value    v\nstate    FRESH\n"), "{table}");
    let table = user.done("cluster status").await?.text();
    for word in ["leader", "NAME", "ROLE", "LAG", "voter", &leader] {
        ensure!(table.contains(word), "{word} is not in {table}");
    }

    info!("--- a wish that contradicts itself is told in the format that was wished for");
    let contradiction = user.types("get k --raw -o json").await?;
    ensure!(
        contradiction.code == Some(2) && contradiction.error()?["code"] == "INVALID_ARGUMENT",
        "{contradiction:?}"
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inspect_tells_a_plain_key_from_a_fetched_and_an_absent_one_and_touches_none()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::json(r#"{"name":"Ada"}"#));
    let cluster = with_users(&origin).start().await?;
    let user = User::of(&cluster, cluster.leader().await?);

    info!("--- absent, with an upstream: nothing is fetched for having been looked at");
    let absent = user.types("inspect user/7 -o json").await?;
    let found = absent.json()?;
    ensure!(
        absent.code == Some(3) && found["answer"]["state"] == "MISS" && found["entry"].is_null(),
        "{absent:?}"
    );
    assert_eq!(
        found["policy"],
        json!({"match": "user/*", "captures": ["7"], "upstream": "users"})
    );
    assert_eq!(origin.calls(), 0);

    info!("--- fetched");
    assert_eq!(
        user.done("get user/7 --raw").await?.text(),
        r#"{"name":"Ada"}"#
    );
    let found = user.json("inspect user/7").await?;
    assert_eq!(
        (&found["entry"]["origin"], &found["answer"]["upstream"]),
        (&json!("FETCHED"), &json!("users"))
    );
    assert_eq!(
        found["answer"].get("value"),
        None,
        "a value is not a part of it"
    );
    ensure!(
        found["entry"]["refresh_at"].is_string() && found["entry"]["fresh_until"].is_string(),
        "{found}"
    );
    let why = user.done("inspect user/7").await?.text();
    ensure!(
        why.contains("the value is from the upstream") && why.contains("policy `user/*`"),
        "{why}"
    );

    info!("--- set over it, plain, deleted");
    user.done("set user/7 mine").await?;
    assert_eq!(user.json("inspect user/7").await?["entry"]["origin"], "SET");
    user.done("set plain mine").await?;
    let found = user.json("inspect plain").await?;
    assert_eq!(
        (
            &found["entry"]["origin"],
            &found["policy"],
            &found["entry"]["size_bytes"]
        ),
        (&json!("PLAIN"), &Value::Null, &json!(4))
    );
    user.done("del plain").await?;
    let deleted = user.types("inspect plain -o json").await?;
    ensure!(
        deleted.code == Some(3) && deleted.json()?["tombstone_revision"].is_u64(),
        "{deleted:?}"
    );
    assert_eq!(origin.calls(), 1);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_comes_page_by_page_or_whole() -> anyhow::Result<()> {
    let cluster = in_process().nodes(1, 1).shards(3).start().await?;
    let (user, client) = (User::of(&cluster, 0), cluster.client(0));
    let keys: Vec<String> = (0..250).map(|number| format!("page/{number:03}")).collect();
    for key in keys
        .iter()
        .map(String::as_str)
        .chain(["other/1", "pagf", "pag"])
    {
        client.set(key, "v").await?;
    }
    let keys_of = |page: &Value| -> Vec<String> {
        page["entries"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry["key"].as_str()?.to_owned()))
            .collect()
    };

    info!("--- page by page, by the cursor of the one before");
    let (mut found, mut pages, mut cursor) = (Vec::new(), Vec::new(), String::new());
    // One more than there are, should it never end.
    for _ in 0..4 {
        let page = user
            .types(&format!("scan page/ --limit 100 -o json {cursor}"))
            .await?
            .json()?;
        pages.push(keys_of(&page).len());
        found.extend(keys_of(&page));
        let Some(next) = page["next_cursor"].as_str() else {
            break;
        };
        cursor = format!("--cursor {next}");
    }
    assert_eq!((pages, &found), (vec![100, 100, 50], &keys));

    info!("--- an object a line, and on stderr how to go on");
    let page = user.types("scan page/ --limit 100 -o jsonl").await?;
    ensure!(
        page.code == Some(0) && page.text().lines().count() == 100,
        "{page:?}"
    );
    let first: Value = serde_json::from_str(page.text().lines().next().context("a line")?)?;
    assert_eq!(
        (&first["key"], &first["value"]),
        (&json!("page/000"), &json!("v"))
    );
    let more = page
        .stderr
        .strip_prefix("more: ")
        .context("how to go on")?
        .trim_end()
        .to_owned();
    let next = user
        .types(&format!("scan page/ --limit 100 -o raw {more}"))
        .await?;
    assert_eq!(next.text().lines().next(), Some("page/100"));

    info!("--- whole");
    let all = user.json("scan page/ --all").await?;
    ensure!(
        keys_of(&all) == keys && all["next_cursor"].is_null(),
        "{} keys",
        keys_of(&all).len()
    );
    let all = user.done("scan page/ --all --limit 7 -o raw").await?.text();
    ensure!(all.lines().eq(keys.iter().map(String::as_str)), "{all}");
    let bare = user.json("scan page/ --all --keys-only").await?;
    ensure!(
        keys_of(&bare) == keys && bare["entries"][0].get("value").is_none(),
        "{}",
        bare["entries"][0]
    );
    assert_eq!(
        user.types("scan").await?.text().lines().count(),
        101,
        "a header and a page of 100"
    );
    assert_eq!(user.json("scan nothing/").await?["entries"], json!([]));
    assert_eq!(user.done("scan nothing/ -o raw").await?.text(), "");
    cluster.stop().await
}

#[tokio::test]
async fn any_key_that_comes_out_of_a_scan_goes_in_again() -> anyhow::Result<()> {
    let cluster = in_process().nodes(1, 1).start().await?;
    let (user, client) = (User::of(&cluster, 0), cluster.client(0));
    let keys: [&[u8]; 4] = [b"\0", b"a\nb", b"plain", b"\xff\x80"];
    for key in keys {
        client.set(key, "v").await?;
    }
    info!("--- keys that are no text are base64, and are taken as such");
    let scanned = user.json("scan").await?;
    for entry in scanned["entries"].as_array().context("entries")? {
        let read = match (entry["key"].as_str(), entry["key_base64"].as_str()) {
            (_, Some(key)) => user.json(&format!("get --key-base64 {key}")).await?,
            (Some("plain"), None) => user.json("get plain").await?,
            (Some(key), None) => {
                let key = base64_of(key.as_bytes());
                user.json(&format!("get --key-base64 {key}")).await?
            }
            (None, None) => anyhow::bail!("an entry without a key: {entry}"),
        };
        assert_eq!(read["value"], "v", "{entry}");
    }
    info!("--- separated by NUL, a newline in a key splits nothing");
    let listed = user.done("scan -0 --prefix-base64 YQ==").await?;
    assert_eq!(listed.stdout, b"a\nb\0");
    info!("--- every command that takes a key takes it so");
    let key = base64_of(b"\xff\x80");
    for line in ["set --key-base64 KEY w", "inspect --key-base64 KEY"] {
        user.done(&line.replace("KEY", &key)).await?;
    }
    assert_eq!(
        client.get(b"\xff\x80").await?.into_value().as_deref(),
        Some(&b"w"[..])
    );
    for line in ["invalidate --key-base64 KEY", "del --key-base64 KEY"] {
        user.done(&line.replace("KEY", &key)).await?;
    }
    ensure!(client.get(b"\xff\x80").await?.value().is_none());
    cluster.stop().await
}

fn base64_of(bytes: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    STANDARD.encode(bytes)
}
