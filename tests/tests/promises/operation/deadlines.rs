//! No call outlives its deadline: not without a quorum, not forwarded to a leader that does not
//! answer, not where its caller names none.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_proto::{
    reason,
    v1::{self, Consistency, cache_service_client::CacheServiceClient},
};
use holdfast_tests::wire::{Told, text};
use tokio::task::JoinSet;
use tonic::{Code, Status};
use tracing::info;

use super::SLACK;
use crate::processes;

/// What a call without a deadline gets.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(5);
const HASTY: Duration = Duration::from_millis(400);

/// What comes of a call that has to end by its deadline, which the node answers before the caller
/// gives up.
async fn within<T>(
    deadline: Duration,
    what: &str,
    call: impl Future<Output = Result<T, Status>>,
) -> anyhow::Result<Result<T, Told>> {
    let ended = tokio::time::timeout(deadline + SLACK, call).await;
    let outcome = ended.with_context(|| {
        format!("{what} has not ended {SLACK:?} after its deadline of {deadline:?}")
    })?;
    Ok(outcome.map_err(|status| Told::of(&status)))
}

/// That a write failed as one without a quorum does, in the node's own words.
fn check_failed(what: &str, told: &Told) -> anyhow::Result<()> {
    ensure!(
        [Code::Unavailable, Code::DeadlineExceeded].contains(&told.code),
        "{what}: {told:?}"
    );
    ensure!(
        [reason::NO_LEADER, reason::NO_QUORUM, reason::DEADLINE].contains(&&*told.reason),
        "{what}: {told:?}"
    );
    let applied = told.metadata(reason::APPLIED);
    ensure!(
        [reason::APPLIED_NO, reason::APPLIED_UNKNOWN].contains(&applied),
        "{what} does not say whether it was applied: {told:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p7_without_a_quorum_every_call_ends_by_its_deadline() -> anyhow::Result<()> {
    let cluster = processes().start().await?;
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let wire = cluster.wire(leader)?;
    wire.set("k", "kept", None).await?;
    let hasty = wire.clone().within(HASTY).once();

    info!("--- the quorum is frozen, and the leader does not know");
    for node in (0..3).filter(|&node| node != leader) {
        cluster.pause(node)?;
    }
    let mut refused = Vec::new();
    for round in 0..3 {
        let key = format!("without a quorum {round}");
        let told = within(HASTY, "a Set", hasty.set(&key, "lost", None))
            .await?
            .err()
            .context("a Set was acknowledged without a quorum")?;
        check_failed("a Set", &told)?;
        if told.metadata(reason::APPLIED) == reason::APPLIED_NO {
            refused.push(key);
        }
        let read = within(
            HASTY,
            "a Get",
            hasty.get("k", Consistency::Linearizable, &Bytes::new()),
        )
        .await?;
        let told = read
            .err()
            .context("a LINEARIZABLE Get was answered without a quorum")?;
        ensure!(
            [Code::Unavailable, Code::DeadlineExceeded].contains(&told.code)
                && !told.reason.is_empty(),
            "a Get: {told:?}"
        );
    }

    info!("--- it knows: nothing was applied, and it says so");
    cluster
        .until("nobody leads", async || {
            matches!(cluster.admin(leader, "/readyz/write").await, Ok((503, _)))
        })
        .await?;
    let told = within(HASTY, "a Set", hasty.set("refused", "lost", None))
        .await?
        .err()
        .context("a Set was acknowledged")?;
    ensure!(
        (told.code, told.metadata(reason::APPLIED)) == (Code::Unavailable, reason::APPLIED_NO),
        "{told:?}"
    );
    refused.push("refused".to_owned());

    info!("--- who names no deadline has the default");
    let stub = CacheServiceClient::new(cluster.channel(leader));
    let mut calls: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let cache = stub.clone();
    calls.spawn(async move {
        let request = v1::SetRequest {
            key: "patient".into(),
            value: "lost".into(),
            ..Default::default()
        };
        let told = within(DEADLINE_DEFAULT, "a Set", async {
            cache.clone().set(request).await
        })
        .await?
        .err()
        .context("a Set")?;
        ensure!(
            (told.code, told.metadata(reason::APPLIED)) == (Code::Unavailable, reason::APPLIED_NO),
            "{told:?}"
        );
        Ok(())
    });
    refused.push("patient".to_owned());
    let cache = stub.clone();
    calls.spawn(async move {
        let request = v1::DeleteRequest {
            target: Some(v1::delete_request::Target::Key("k".into())),
            ..Default::default()
        };
        let told = within(DEADLINE_DEFAULT, "a Delete", async {
            cache.clone().delete(request).await
        })
        .await?
        .err()
        .context("a Delete")?;
        ensure!(
            (told.code, told.metadata(reason::APPLIED)) == (Code::Unavailable, reason::APPLIED_NO),
            "{told:?}"
        );
        Ok(())
    });
    let cache = stub.clone();
    calls.spawn(async move {
        let request = v1::GetRequest {
            key: "k".into(),
            consistency: Consistency::Linearizable.into(),
            ..Default::default()
        };
        let told = within(DEADLINE_DEFAULT, "a Get", async {
            cache.clone().get(request).await
        })
        .await?
        .err()
        .context("a Get")?;
        ensure!(
            [Code::Unavailable, Code::DeadlineExceeded].contains(&told.code)
                && !told.reason.is_empty(),
            "{told:?}"
        );
        Ok(())
    });
    calls.spawn(async move {
        let request = v1::BatchGetRequest {
            keys: vec!["k".into(), "l".into()],
            consistency: Consistency::Linearizable.into(),
            ..Default::default()
        };
        match within(DEADLINE_DEFAULT, "a BatchGet", async {
            stub.clone().batch_get(request).await
        })
        .await?
        {
            // Each key has an answer of its own, if the batch has one.
            Ok(batch) => {
                let errors = batch.get_ref().results.iter().filter(|key| {
                    matches!(key.result, Some(v1::batch_get_result::Result::Error(_)))
                });
                ensure!(errors.count() == 2, "{batch:?}");
            }
            Err(told) => ensure!(
                [Code::Unavailable, Code::DeadlineExceeded].contains(&told.code)
                    && !told.reason.is_empty(),
                "{told:?}"
            ),
        }
        Ok(())
    });
    while let Some(call) = calls.join_next().await {
        call??;
    }

    info!("--- the quorum is back, and what was said not to be applied is not there");
    for node in (0..3).filter(|&node| node != leader) {
        cluster.resume(node)?;
    }
    cluster
        .until("writes go on", async || {
            hasty.set("after", "all", None).await.is_ok()
        })
        .await?;
    for key in refused {
        ensure!(
            text(
                &wire
                    .get(&key, Consistency::Linearizable, &Bytes::new())
                    .await?
            )
            .is_empty(),
            "`{key}` was said not to be applied"
        );
    }
    ensure!(
        text(
            &wire
                .get("k", Consistency::Linearizable, &Bytes::new())
                .await?
        ) == "kept"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_forwarded_to_a_frozen_leader_ends_by_its_callers_deadline() -> anyhow::Result<()> {
    let cluster = processes().start().await?;
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let follower = (leader + 1) % 3;
    let wire = cluster.wire(follower)?.within(HASTY).once();
    // The ways are there before anything freezes.
    cluster
        .until("the follower forwards", async || {
            wire.set("k", "kept", None).await.is_ok()
        })
        .await?;

    info!("--- the leader is frozen, and the follower does not know");
    cluster.pause(leader)?;
    let no_token = Bytes::new();
    let (written, read) = tokio::join!(
        within(HASTY, "a forwarded Set", wire.set("k", "perhaps", None)),
        within(
            HASTY,
            "a LINEARIZABLE Get",
            wire.get("k", Consistency::Linearizable, &no_token)
        ),
    );
    let told = written?
        .err()
        .context("a frozen leader acknowledged a Set")?;
    ensure!(
        (told.code, &*told.reason) == (Code::DeadlineExceeded, reason::DEADLINE),
        "{told:?}"
    );
    // It is on its way: whether the leader takes it when it wakes, nobody can know.
    ensure!(
        told.metadata(reason::APPLIED) == reason::APPLIED_UNKNOWN,
        "{told:?}"
    );
    if let Err(told) = read? {
        ensure!(
            [Code::Unavailable, Code::DeadlineExceeded].contains(&told.code)
                && !told.reason.is_empty(),
            "{told:?}"
        );
    }

    info!("--- another one leads");
    cluster
        .until("writes go on", async || {
            wire.set("k", "after", None).await.is_ok()
        })
        .await?;
    cluster.resume(leader)?;
    let known = async || matches!(cluster.admin(leader, "/readyz/write").await, Ok((200, _)));
    cluster.until("the old leader follows", known).await?;
    let read = cluster
        .wire(leader)?
        .get("k", Consistency::Linearizable, &Bytes::new())
        .await?;
    ensure!(
        text(&read) == "after",
        "what ran out of time came after all, over a later write: `{}`",
        text(&read)
    );
    Ok(())
}
