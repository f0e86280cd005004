//! The shapes of `-o json`: a contract. The names are the `.proto`'s, 64-bit integers are numbers,
//! what is unset is null. Bytes that are UTF-8 stand as text under their name, others as standard
//! base64 under `<name>_base64`; tokens and cursors are base64 without padding, safe in a URL.

use std::time::{Duration, SystemTime};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde::Serialize;

use crate::{
    Answer, ClusterStatus, Inspection, LastError, MatchedPolicy, NodeStatus, Replica, Scanned,
    ShardStatus, StoredEntry, Token, Ttl,
};

/// `get`: one flat object.
#[derive(Serialize)]
pub(super) struct GetJson<'a> {
    #[serde(flatten)]
    pub(super) answer: AnswerJson<'a>,
    pub(super) replica: ReplicaJson<'a>,
    pub(super) token: String,
}

#[derive(Serialize)]
pub(super) struct SetJson<'a> {
    pub(super) version: u64,
    pub(super) replica: ReplicaJson<'a>,
    pub(super) token: String,
}

#[derive(Serialize)]
pub(super) struct DoneJson<'a> {
    pub(super) existed: bool,
    pub(super) replica: ReplicaJson<'a>,
    pub(super) token: String,
}

#[derive(Serialize)]
pub(super) struct ScannedJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(flatten)]
    answer: AnswerJson<'a>,
}

#[derive(Serialize)]
pub(super) struct AnswerJson<'a> {
    /// Null on a miss; left out where no value was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    state: &'static str,
    version: u64,
    age_ms: u64,
    ttl_ms: Option<i64>,
    expires_in_ms: Option<u64>,
    refresh_due: bool,
    refreshing: bool,
    stored: bool,
    upstream: Option<&'a str>,
    last_error: Option<LastErrorJson<'a>>,
    content_type: Option<&'a str>,
}

#[derive(Serialize)]
struct LastErrorJson<'a> {
    class: &'a str,
    status: Option<u16>,
    at: Option<String>,
    count: u32,
    next_attempt: Option<String>,
}

#[derive(Serialize)]
pub(super) struct ReplicaJson<'a> {
    node_id: u64,
    region: &'a str,
    role: &'static str,
    revision: u64,
    replica_lag_ms: Option<u64>,
}

#[derive(Serialize)]
pub(super) struct InspectJson<'a> {
    answer: AnswerJson<'a>,
    replica: ReplicaJson<'a>,
    token: String,
    why: &'a [String],
    shard: u32,
    slot: u32,
    now: Option<String>,
    entry: Option<StoredEntryJson<'a>>,
    tombstone_revision: Option<u64>,
    policy: Option<PolicyJson<'a>>,
}

#[derive(Serialize)]
struct StoredEntryJson<'a> {
    version: u64,
    changed: u64,
    origin: &'a str,
    size_bytes: u64,
    tags: &'a [String],
    fetched_at: Option<String>,
    refresh_at: Option<String>,
    fresh_until: Option<String>,
    stale_until: Option<String>,
    expires_at: Option<String>,
    content_hash: u64,
    in_memory: bool,
}

#[derive(Serialize)]
struct PolicyJson<'a> {
    r#match: &'a str,
    captures: &'a [String],
    upstream: Option<&'a str>,
}

#[derive(Serialize)]
pub(super) struct StatusJson<'a> {
    cluster_id: &'a str,
    epoch: u64,
    shards: u32,
    leader: Option<&'a str>,
    nodes: Vec<NodeJson<'a>>,
    per_shard: Vec<ShardJson<'a>>,
}

#[derive(Serialize)]
pub(super) struct NodeJson<'a> {
    name: &'a str,
    id: u64,
    role: &'static str,
    region: &'a str,
    revision: u64,
    lag: u64,
    version: &'a str,
    healthy: bool,
    client_address: &'a str,
    peer_address: &'a str,
    problems: &'a [String],
    policy_hash: u64,
    policies_differ: bool,
}

#[derive(Serialize)]
struct ShardJson<'a> {
    shard: u32,
    leader: Option<&'a str>,
    term: u64,
    revision: u64,
    voters: &'a [String],
    learners: &'a [String],
    log_time_ahead_ms: i64,
}

pub(super) fn token(token: &Token) -> String {
    url_safe(&token.encode())
}

pub(super) fn url_safe(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

pub(super) fn instant(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

impl<'a> AnswerJson<'a> {
    pub(super) fn with_value(answer: &'a Answer) -> Self {
        let bytes = answer.value.as_deref();
        let (text, base64) = match bytes.map(std::str::from_utf8) {
            None => (Some(None), None),
            Some(Ok(text)) => (Some(Some(text)), None),
            Some(Err(_)) => (None, bytes.map(|bytes| STANDARD.encode(bytes))),
        };
        Self {
            value: text,
            value_base64: base64,
            ..Self::without_value(answer)
        }
    }

    pub(super) fn without_value(answer: &'a Answer) -> Self {
        Self {
            value: None,
            value_base64: None,
            state: answer.state.as_str(),
            version: answer.version,
            age_ms: millis(answer.age),
            ttl_ms: answer.ttl.map(signed_millis),
            expires_in_ms: answer.expires_in.map(millis),
            refresh_due: answer.refresh_due,
            refreshing: answer.refreshing,
            stored: answer.stored,
            upstream: answer.upstream.as_deref(),
            last_error: answer.last_error.as_ref().map(Into::into),
            content_type: answer.content_type.as_deref(),
        }
    }
}

impl<'a> ScannedJson<'a> {
    pub(super) fn new(scanned: &'a Scanned, keys_only: bool) -> Self {
        let text = std::str::from_utf8(&scanned.key).ok();
        let answer = if keys_only {
            AnswerJson::without_value(&scanned.answer)
        } else {
            AnswerJson::with_value(&scanned.answer)
        };
        Self {
            key: text,
            key_base64: text.is_none().then(|| STANDARD.encode(&scanned.key)),
            answer,
        }
    }
}

impl<'a> From<&'a LastError> for LastErrorJson<'a> {
    fn from(error: &'a LastError) -> Self {
        Self {
            class: &error.class,
            status: error.status,
            at: error.at.map(instant),
            count: error.count,
            next_attempt: error.next_attempt.map(instant),
        }
    }
}

impl<'a> From<&'a Replica> for ReplicaJson<'a> {
    fn from(replica: &'a Replica) -> Self {
        Self {
            node_id: replica.node_id,
            region: &replica.region,
            role: replica.role.as_str(),
            revision: replica.revision,
            replica_lag_ms: replica.lag.map(millis),
        }
    }
}

impl<'a> From<&'a Inspection> for InspectJson<'a> {
    fn from(inspection: &'a Inspection) -> Self {
        Self {
            answer: AnswerJson::without_value(&inspection.answer),
            replica: (&inspection.replica).into(),
            token: token(&inspection.token),
            why: &inspection.why,
            shard: inspection.shard,
            slot: inspection.slot,
            now: inspection.now.map(instant),
            entry: inspection.entry.as_ref().map(Into::into),
            tombstone_revision: inspection.tombstone_revision,
            policy: inspection.policy.as_ref().map(Into::into),
        }
    }
}

impl<'a> From<&'a StoredEntry> for StoredEntryJson<'a> {
    fn from(entry: &'a StoredEntry) -> Self {
        Self {
            version: entry.version,
            changed: entry.changed,
            origin: &entry.origin,
            size_bytes: entry.size_bytes,
            tags: &entry.tags,
            fetched_at: entry.fetched_at.map(instant),
            refresh_at: entry.refresh_at.map(instant),
            fresh_until: entry.fresh_until.map(instant),
            stale_until: entry.stale_until.map(instant),
            expires_at: entry.expires_at.map(instant),
            content_hash: entry.content_hash,
            in_memory: entry.in_memory,
        }
    }
}

impl<'a> From<&'a MatchedPolicy> for PolicyJson<'a> {
    fn from(policy: &'a MatchedPolicy) -> Self {
        Self {
            r#match: &policy.pattern,
            captures: &policy.captures,
            upstream: policy.upstream.as_deref(),
        }
    }
}

impl<'a> From<&'a ClusterStatus> for StatusJson<'a> {
    fn from(status: &'a ClusterStatus) -> Self {
        Self {
            cluster_id: &status.cluster_id,
            epoch: status.epoch,
            shards: status.shards,
            leader: status.leader.as_deref(),
            nodes: status.nodes.iter().map(Into::into).collect(),
            per_shard: status.per_shard.iter().map(Into::into).collect(),
        }
    }
}

impl<'a> From<&'a NodeStatus> for NodeJson<'a> {
    fn from(node: &'a NodeStatus) -> Self {
        Self {
            name: &node.name,
            id: node.id,
            role: node.role.as_str(),
            region: &node.region,
            revision: node.revision,
            lag: node.lag,
            version: &node.version,
            healthy: node.healthy,
            client_address: &node.client_address,
            peer_address: &node.peer_address,
            problems: &node.problems,
            policy_hash: node.policy_hash,
            policies_differ: node.policies_differ,
        }
    }
}

impl<'a> From<&'a ShardStatus> for ShardJson<'a> {
    fn from(shard: &'a ShardStatus) -> Self {
        Self {
            shard: shard.shard,
            leader: shard.leader.as_deref(),
            term: shard.term,
            revision: shard.revision,
            voters: &shard.voters,
            learners: &shard.learners,
            log_time_ahead_ms: shard.log_time_ahead_ms,
        }
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn signed_millis(ttl: Ttl) -> i64 {
    match ttl {
        Ttl::Left(left) => i64::try_from(left.as_millis()).unwrap_or(i64::MAX),
        Ttl::Past(past) => i64::try_from(past.as_millis()).map_or(i64::MIN, |past| -past),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_proto::v1;

    use super::*;

    fn answer(value: Option<&'static [u8]>) -> Answer {
        let last_error = v1::LastError {
            class: v1::FailureClass::Status as i32,
            status: 503,
            at: Some(prost_types::Timestamp {
                seconds: 1_700_000_000,
                nanos: 0,
            }),
            count: 2,
            next_attempt: None,
        };
        let answer = v1::Answer {
            value: value.map(Into::into),
            state: v1::State::StaleOnError as i32,
            version: u64::MAX,
            age_ms: 7,
            ttl_ms: Some(-3),
            stored: true,
            upstream: "profiles".into(),
            last_error: Some(last_error),
            ..Default::default()
        };
        answer.into()
    }

    fn get(answer: &Answer) -> serde_json::Value {
        let replica = Replica::from(v1::Replica {
            node_id: 2,
            role: v1::Role::Voter as i32,
            revision: 9,
            ..Default::default()
        });
        serde_json::to_value(GetJson {
            answer: AnswerJson::with_value(answer),
            replica: (&replica).into(),
            token: token(&Token::new(1)),
        })
        .unwrap()
    }

    #[test]
    fn a_get_is_one_flat_object() {
        let expected = serde_json::json!({
            "value": "hello", "state": "STALE_ON_ERROR", "version": u64::MAX, "age_ms": 7, "ttl_ms": -3, "expires_in_ms": null,
            "refresh_due": false, "refreshing": false, "stored": true, "upstream": "profiles",
            "last_error": {"class": "STATUS", "status": 503, "at": "2023-11-14T22:13:20.000Z", "count": 2, "next_attempt": null},
            "content_type": null,
            "replica": {"node_id": 2, "region": "", "role": "voter", "revision": 9, "replica_lag_ms": null},
            "token": "AQE",
        });
        assert_eq!(get(&answer(Some(b"hello"))), expected);
    }

    #[test]
    fn a_value_is_text_or_base64_or_null() {
        let binary = get(&answer(Some(b"\xff\xfe")));
        assert_eq!(
            (binary.get("value"), &binary["value_base64"]),
            (None, &"//4=".into())
        );
        let miss = get(&answer(None));
        assert_eq!(
            (&miss["value"], miss.get("value_base64")),
            (&serde_json::Value::Null, None)
        );
        let scanned = Scanned {
            key: b"\xff".as_slice().into(),
            answer: answer(None),
        };
        let scanned = serde_json::to_value(ScannedJson::new(&scanned, true)).unwrap();
        assert_eq!(
            (
                &scanned["key_base64"],
                scanned.get("key"),
                scanned.get("value")
            ),
            (&"/w==".into(), None, None)
        );
    }

    #[test]
    fn a_status_has_the_contracts_names_in_their_order() {
        let node = v1::NodeStatus {
            name: "a".into(),
            id: 1,
            role: v1::Role::Leader as i32,
            healthy: true,
            ..Default::default()
        };
        let shard = v1::ShardStatus {
            voters: vec!["a".into()],
            term: 4,
            ..Default::default()
        };
        let status = v1::StatusResponse {
            cluster_id: "c".into(),
            shards: 1,
            nodes: vec![node],
            per_shard: vec![shard],
            ..Default::default()
        };
        assert_eq!(
            serde_json::to_string(&StatusJson::from(&ClusterStatus::from(status))).unwrap(),
            concat!(
                r#"{"cluster_id":"c","epoch":0,"shards":1,"leader":null,"nodes":[{"name":"a","id":1,"role":"leader","region":"","#,
                r#""revision":0,"lag":0,"version":"","healthy":true,"client_address":"","peer_address":"","problems":[],"#,
                r#""policy_hash":0,"policies_differ":false}],"#,
                r#""per_shard":[{"shard":0,"leader":null,"term":4,"revision":0,"voters":["a"],"learners":[],"log_time_ahead_ms":0}]}"#
            )
        );
    }
}
