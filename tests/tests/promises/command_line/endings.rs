//! How a command ends: the exit code, who is named, and what a pipe that breaks does to it.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Seek as _},
    process::Stdio,
};

use anyhow::{Context as _, ensure};
use holdfast_tests::origin::{Behaviour, Origin};
use serde_json::{Value, json};
use tracing::info;

use super::{Running, User, holdfast, nobody, typed, with_users};
use crate::in_process;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_exit_code_says_what_became_of_a_command() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::Hang);
    let mut cluster = with_users(&origin).start().await?;
    let (leader, asked) = (cluster.leader().await?, cluster.follower().await?);
    let user = User::of(&cluster, asked);
    // Another process is another session: on a follower it sees a write of the one before only if
    // it asks for that.
    let now = |line: &str| match line.split(' ').next() {
        Some("get" | "inspect" | "scan") => format!("{line} --consistency linearizable"),
        _ => line.to_owned(),
    };

    info!("--- 0: done, 3: a miss");
    for line in [
        "set k v",
        "get k",
        "inspect k",
        "scan",
        "invalidate k",
        "cluster status",
        "member list",
        "del k",
        "del k",
    ] {
        user.done(&now(line)).await?;
    }
    for line in ["get k", "get k --raw", "get k -o raw", "inspect k"] {
        let miss = user.types(&now(line)).await?;
        ensure!(
            miss.code == Some(3) && miss.stdout.is_empty() && miss.stderr.starts_with("miss: k\n"),
            "{line}: {miss:?}"
        );
    }
    let miss = user.types(&now("get k -o json")).await?;
    ensure!(
        miss.code == Some(3) && miss.json()?["state"] == "MISS" && miss.json()?["value"].is_null(),
        "{miss:?}"
    );

    info!("--- 1: it cannot be done");
    for line in ["set k @/no/such/file", "member remove nobody"] {
        assert_eq!(user.types(line).await?.code, Some(1), "{line}");
    }
    let missing = user.types("set k @/no/such/file").await?;
    ensure!(
        missing.stderr.starts_with("error: /no/such/file: "),
        "{missing:?}"
    );

    info!("--- 2: it makes no sense");
    for line in [
        "",
        "frobnicate",
        "get",
        "get k --frob",
        "get k -o xml",
        "cluster",
        "member add x",
        "completion tcsh",
    ] {
        let wrong = user.types(line).await?;
        ensure!(
            wrong.code == Some(2) && wrong.stdout.is_empty() && !wrong.stderr.is_empty(),
            "{line}: {wrong:?}"
        );
    }

    info!("--- 5: no answer in time");
    let late = user.types("get user/7 --timeout 300ms -o json").await?;
    ensure!(
        late.code == Some(5)
            && late.error()?["code"] == "DEADLINE_EXCEEDED"
            && late.error()?["applied"].is_null(),
        "{late:?}"
    );
    origin.reached(1).await;

    info!("--- 6: it does not hold");
    user.done("set k v --if-absent").await?;
    let version = user.json(&now("get k")).await?["version"]
        .as_u64()
        .context("a version")?;
    for line in ["set k other --if-absent", "set k other --if-version 999999"] {
        let lost = user.types(&format!("{line} -o json")).await?;
        let error = lost.error()?;
        ensure!(
            lost.code == Some(6)
                && error["reason"] == "VERSION_CONFLICT"
                && error["applied"] == "no",
            "{line}: {lost:?}"
        );
        assert_eq!(
            error["leader"],
            cluster.addresses(leader).client.to_string(),
            "a follower names who leads"
        );
    }
    user.done(&format!("set k other --if-version {version}"))
        .await?;
    assert_eq!(user.done(&now("get k --raw")).await?.text(), "other");

    info!("--- 8: a node is down");
    cluster
        .until("the cluster is healthy", async || {
            user.done("cluster health").await.is_ok()
        })
        .await?;
    let down = (0..3)
        .find(|&node| node != leader && node != asked)
        .context("a third node")?;
    cluster.stop_node(down).await?;
    cluster
        .until("the cluster is degraded", async || {
            user.types("cluster health")
                .await
                .is_ok_and(|ran| ran.code == Some(8))
        })
        .await?;
    let problem = format!("voter {}: it does not answer", cluster.name(down));
    assert_eq!(
        user.types("cluster health").await?.text(),
        format!("degraded: {problem}\n")
    );
    assert_eq!(
        user.types("cluster health -o raw").await?.text(),
        "degraded\n"
    );
    let health = user.types("cluster health -o json").await?.json()?;
    assert_eq!(
        health,
        json!({"healthy": false, "leader": cluster.name(leader), "problems": [problem]})
    );
    user.done("cluster status").await?;

    info!("--- 4: no quorum; what asks for none goes on");
    cluster.stop_node(leader).await?;
    cluster
        .until("nobody leads", async || {
            matches!(cluster.admin(asked, "/readyz/write").await, Ok((503, _)))
        })
        .await?;
    let refused = user.types("set k lost --timeout 1s -o json").await?;
    ensure!(
        refused.code == Some(4) && refused.error()?["applied"] == "no",
        "{refused:?}"
    );
    let refused = user
        .types("get k --consistency linearizable --timeout 1s -o json")
        .await?;
    ensure!(
        refused.code == Some(4) && refused.error()?["code"] == "UNAVAILABLE",
        "{refused:?}"
    );
    assert_eq!(
        user.done("get k --consistency local --raw").await?.text(),
        "other"
    );
    user.done("cluster status").await?;
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_not_there_is_named_and_one_that_says_nothing_is_not_waited_for()
-> anyhow::Result<()> {
    let (_held, address) = nobody()?;
    info!("--- nobody listens");
    for line in [
        "get k",
        "set k v",
        "del k",
        "scan",
        "cluster status",
        "cluster health",
        "member list",
    ] {
        let ran = typed(&format!("-e {address} {line}")).await?;
        ensure!(
            ran.code == Some(4) && ran.stdout.is_empty() && ran.stderr.lines().count() == 1,
            "{line}: {ran:?}"
        );
        ensure!(
            ran.stderr.starts_with(&format!(
                "error: cannot connect to {address}: Connection refused"
            )),
            "{line}: {ran:?}"
        );
    }
    let ran = typed(&format!("-e {address} set k v -o json")).await?;
    let error = ran.error()?;
    ensure!(
        error["code"] == "UNAVAILABLE" && error["reason"] == "CONNECT" && error["applied"] == "no",
        "{error}"
    );
    ensure!(
        error["message"]
            .as_str()
            .is_some_and(|message| message.contains(&address.to_string())),
        "{error}"
    );

    info!("--- somebody takes the call and says nothing: a write may have happened");
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let ran = typed(&format!(
        "-e {} set k v --timeout 300ms -o json",
        silent.local_addr()?
    ))
    .await?;
    ensure!(
        ran.code == Some(5) && ran.error()?["applied"] == "unknown",
        "{ran:?}"
    );

    info!("--- somebody who is no node: a web server");
    let origin = Origin::start().await?;
    let ran = typed(&format!("-e {} get k --timeout 1s", origin.address())).await?;
    ensure!(
        ran.code == Some(4) && ran.stderr.lines().count() == 1,
        "{ran:?}"
    );

    info!("--- what is no address");
    for endpoint in ["nonsense", "127.0.0.1", "https://127.0.0.1:7400"] {
        let ran = typed(&format!("-e {endpoint} get k -o json")).await?;
        ensure!(
            ran.code == Some(2)
                && ran.error()?["message"]
                    .as_str()
                    .is_some_and(|message| message.contains(endpoint)),
            "{ran:?}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one() -> anyhow::Result<()> {
    let cluster = in_process().nodes(1, 1).start().await?;
    let (user, client) = (User::of(&cluster, 0), cluster.client(0));
    for key in 0..300 {
        client.set(format!("k{key:03}"), "v".repeat(1000)).await?;
    }
    info!("--- gone before a word");
    for line in [
        "get k000",
        "get k000 --raw",
        "get k000 -o json",
        "inspect k000",
        "scan --all",
        "cluster status",
        "--help",
        "get --help",
    ] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let mut command = holdfast(["-e", &user.endpoint]);
        let mut stderr = tempfile::tempfile()?;
        command
            .args(line.split_whitespace())
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(stderr.try_clone()?);
        assert_eq!(Running(command.spawn()?).ended().await?, Some(0), "{line}");
        stderr.rewind()?;
        assert_eq!(std::io::read_to_string(stderr)?, "", "{line}");
    }
    info!("--- gone in the middle, as with `| head -1`");
    let mut command = holdfast([
        "-e",
        &user.endpoint,
        "scan",
        "--all",
        "--limit",
        "50",
        "-o",
        "jsonl",
    ]);
    let mut running = Running(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?,
    );
    let mut line = String::new();
    BufReader::new(running.0.stdout.take().context("its stdout")?).read_line(&mut line)?;
    assert_eq!(serde_json::from_str::<Value>(&line)?["key"], "k000");
    assert_eq!(running.ended().await?, Some(0));
    assert_eq!(
        std::io::read_to_string(running.0.stderr.take().context("its stderr")?)?,
        ""
    );

    info!("--- nowhere to write to");
    let mut command = holdfast(["-e", &user.endpoint, "get", "k000"]);
    let mut running = Running(
        command
            .stdin(Stdio::null())
            .stdout(File::create("/dev/full")?)
            .stderr(Stdio::piped())
            .spawn()?,
    );
    assert_eq!(running.ended().await?, Some(1));
    let said = std::io::read_to_string(running.0.stderr.take().context("its stderr")?)?;
    ensure!(said.starts_with("error: No space left on device"), "{said}");
    cluster.stop().await
}
