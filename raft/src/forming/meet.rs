//! Finding others: every address that the names resolve to is said hello to, and whoever answers
//! has been met. Names are resolved again each time.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use futures::future::join_all;
use holdfast_proto::peer::{HelloRequest, HelloResponse, IdentityRecord, NodeState};

use super::Met;
use crate::{local::Local, peer::ask_stranger};

pub(crate) const HELLO_TIMEOUT: Duration = Duration::from_millis(700);

/// Everybody but this node itself; a node with several addresses answers once.
pub(crate) async fn all(local: &Local, names: Vec<String>) -> Vec<Met> {
    let resolved = names
        .iter()
        .map(|name| tokio::net::lookup_host(name.clone()));
    let resolved = join_all(resolved).await;
    let addresses: BTreeSet<SocketAddr> = resolved.into_iter().flatten().flatten().collect();
    let asked = addresses.into_iter().map(|address| async move {
        let hello = greet(local, &address.to_string(), HELLO_TIMEOUT).await?;
        Some(Met { address, hello })
    });
    let mut met: Vec<Met> = join_all(asked).await.into_iter().flatten().collect();
    let mut seen = BTreeSet::from([local.identity().incarnation()]);
    met.retain(|met| {
        met.member()
            .is_some_and(|member| seen.insert(member.incarnation))
    });
    met
}

/// A hello that wants to be judged.
pub(crate) async fn greet(
    local: &Local,
    address: &str,
    timeout: Duration,
) -> Option<HelloResponse> {
    ask(local, hello(local), address, timeout).await
}

/// Only asks who is there.
pub(crate) async fn probe(
    local: &Local,
    address: &str,
    timeout: Duration,
) -> Option<HelloResponse> {
    let probe = HelloRequest {
        is_probe: true,
        ..hello(local)
    };
    ask(local, probe, address, timeout).await
}

async fn ask(
    local: &Local,
    hello: HelloRequest,
    address: &str,
    timeout: Duration,
) -> Option<HelloResponse> {
    let deadline = local.clock().deadline(timeout);
    ask_stranger(address, &deadline, hello).await.ok()
}

/// Who this node is.
fn hello(local: &Local) -> HelloRequest {
    let record = local.identity().record();
    let logs = local.replicas();
    HelloRequest {
        self_: Some(local.myself()),
        state: state_of(&record).into(),
        cluster_id: record
            .cluster
            .map(|cluster| cluster.cluster_id)
            .unwrap_or_default(),
        expect: local.options().expect,
        session: local.session(),
        log_is_short: logs.clone().any(|replica| replica.log_is_short()),
        last_index: logs.map(|replica| replica.log_reached()).collect(),
        is_probe: false,
    }
}

pub(crate) fn state_of(record: &IdentityRecord) -> NodeState {
    match (&record.cluster, &record.accepted) {
        (Some(_), _) => NodeState::Formed,
        (None, Some(_)) => NodeState::Accepted,
        (None, None) => NodeState::Empty,
    }
}
