//! An origin that says there is no such thing: that is an answer, for a while, and takes the place
//! of no value unless the policy says so.

use std::time::Duration;

use anyhow::ensure;
use futures::future::try_join_all;
use holdfast_client::{Answer as Found, Client, State};
use holdfast_tests::{
    cluster::Cluster,
    origin::{Behaviour, Origin},
};

use crate::in_process;

const SECOND: Duration = Duration::from_secs(1);

async fn cluster(origin: &Origin, policy: &str) -> anyhow::Result<Cluster> {
    let url = origin.url("/{1}");
    let extra = format!(
        "upstreams: {{users: {{http: {{url: \"{url}\"}}}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl_jitter: 0, {policy}}}]"
    );
    let cluster = in_process().extra(extra).start().await?;
    cluster.until_level(2).await?;
    Ok(cluster)
}

async fn read(client: &Client, key: &str) -> anyhow::Result<Found> {
    Ok(client.get(key).await?.answer)
}

async fn until(cluster: &Cluster, client: &Client, state: State) -> anyhow::Result<()> {
    cluster
        .until("the answer is another", async || {
            let answer = read(client, "user/7").await;
            answer.is_ok_and(|answer| answer.state == state)
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_origin_does_not_have_is_asked_for_once_a_while_and_found_once_it_is_there()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::status(404));
    let cluster = cluster(&origin, "negative_ttl: 10s").await?;
    let clients: Vec<Client> = (0..3).map(|node| cluster.client(node)).collect();
    let reads = (0..300).map(|n| read(&clients[n % 3], "user/7"));
    for answer in try_join_all(reads).await? {
        ensure!(
            answer.state == State::Negative && answer.value.is_none() && answer.stored,
            "{answer:?}"
        );
    }
    assert_eq!(origin.calls(), 1);

    // It is told while it is asked again, and that does not wait.
    let gone = Behaviour::status(410);
    origin.respond(gone.delayed(SECOND));
    cluster.advance(11 * SECOND).await?;
    assert_eq!(read(&clients[1], "user/7").await?.state, State::Negative);
    origin.reached(2).await;
    origin.idle().await;

    // For the key there is nothing that a condition, a scan or a Delete would find.
    let scanned = clients[0].scan().prefix("user/").await?;
    assert_eq!(scanned.entries.len(), 0);
    assert!(!clients[0].delete("user/7").await?.existed);
    assert_eq!(read(&clients[0], "user/7").await?.state, State::Negative);
    clients[0].set("user/7", "mine").if_absent().await?;
    let mine = read(&clients[0], "user/7").await?;
    assert_eq!(mine.value.as_deref(), Some(&b"mine"[..]));

    origin.respond(Behaviour::status(404));
    assert_eq!(read(&clients[2], "user/8").await?.state, State::Negative);
    origin.respond(Behaviour::text("there"));
    cluster.advance(11 * SECOND).await?;
    cluster
        .until("it is there", async || {
            let answer = read(&clients[2], "user/8").await;
            answer.is_ok_and(|answer| answer.value.as_deref() == Some(b"there"))
        })
        .await?;
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p3_a_value_stays_where_the_origin_has_it_no_more_unless_the_policy_says_otherwise()
-> anyhow::Result<()> {
    for on_not_found in ["keep_old", "negative"] {
        let origin = Origin::start().await?;
        origin.respond(Behaviour::text("good"));
        let policy = format!("ttl: 1min, stale_while_revalidate: 1h, on_not_found: {on_not_found}");
        let cluster = cluster(&origin, &policy).await?;
        let client = cluster.client(0);
        read(&client, "user/7").await?;
        origin.respond(Behaviour::status(404));
        cluster.advance(61 * SECOND).await?;
        if on_not_found == "negative" {
            until(&cluster, &client, State::Negative).await?;
            assert_eq!(read(&client, "user/7").await?.value, None);
        } else {
            read(&client, "user/7").await?;
            origin.reached(2).await;
            cluster
                .until("the failure is told", async || {
                    let answer = read(&client, "user/7").await;
                    answer.is_ok_and(|answer| {
                        answer
                            .last_error
                            .is_some_and(|error| error.status == Some(404))
                    })
                })
                .await?;
            let kept = read(&client, "user/7").await?;
            ensure!(
                kept.state == State::Stale && kept.value.as_deref() == Some(b"good"),
                "{kept:?}"
            );
        }
        cluster.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_negative_ttl_it_is_a_failure() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::status(404));
    let cluster = cluster(&origin, "negative_ttl: 0s").await?;
    let error = cluster.client(0).get("user/7").await.unwrap_err();
    assert_eq!(error.reason(), holdfast_proto::reason::UPSTREAM_FAILED);
    cluster.stop().await
}
