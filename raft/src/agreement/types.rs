//! The types openraft is built with, and their shapes on the wire and on disk. Nothing of
//! openraft's leaves this crate: what is sent and stored are the messages of `holdfast.peer.v1`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use bytes::Bytes;
use holdfast_proto::peer::{self, Member, Outcome};
use openraft::{RaftTypeConfig, entry::RaftEntry, impls, vote::RaftLeaderId};

pub(crate) type NodeId = u64;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Types;

impl RaftTypeConfig for Types {
    type D = Commands;
    type R = Outcomes;
    type NodeId = NodeId;
    type Node = Member;
    type Term = u64;
    // One leader per term: a log id is a term and an index, small on disk.
    type LeaderId = impls::leader_id_std::LeaderId<u64, NodeId>;
    type Vote = impls::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Self::D, NodeId, Member>;
    type Entry = impls::Entry<<Self::LeaderId as RaftLeaderId>::Committed, Self::Payload>;
    type AsyncRuntime = openraft_rt_tokio::TokioRuntime;
    type Responder<T>
        = impls::OneshotResponder<Self, T>
    where
        T: Send + 'static;
    type Batch<T>
        = impls::InlineBatch<T>
    where
        T: Send + 'static;
    type ErrorSource = impls::BoxedErrorSource;
}

pub(crate) type LogId = openraft::type_config::alias::LogIdOf<Types>;
pub(crate) type Entry = openraft::type_config::alias::EntryOf<Types>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<Types>;
pub(crate) type LeaderId = openraft::type_config::alias::LeaderIdOf<Types>;
pub(crate) type CommittedLeaderId = openraft::type_config::alias::CommittedLeaderIdOf<Types>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<Types>;
pub(crate) type Membership = openraft::Membership<NodeId, Member>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<Types>;
pub(crate) type Payload = openraft::EntryPayload<Commands, NodeId, Member>;

/// A log entry's commands as the leader encoded them: every replica keeps and applies the same
/// bytes.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Commands(pub(crate) Bytes);

impl fmt::Debug for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of commands", self.0.len())
    }
}

/// What the commands of one log entry came to, in their order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcomes(pub(crate) Vec<Outcome>);

/// A message that cannot be: a field is missing that its sender always sets.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("a peer message lacks its {0}")]
pub(crate) struct Missing(pub(crate) &'static str);

pub(crate) fn log_id_from(id: peer::LogId) -> LogId {
    LogId::new(CommittedLeaderId::new(id.term), id.index)
}

pub(crate) fn log_id_to(id: &LogId) -> peer::LogId {
    peer::LogId {
        term: id.committed_leader_id().term,
        index: id.index(),
    }
}

pub(crate) fn vote_from(vote: Option<peer::Vote>) -> Result<Vote, Missing> {
    let vote = vote.ok_or(Missing("vote"))?;
    let voted_for = vote.voted_for.ok_or(Missing("vote's candidate"))?;
    Ok(Vote {
        leader_id: LeaderId {
            term: vote.term,
            voted_for,
        },
        committed: vote.committed,
    })
}

pub(crate) fn vote_to(vote: &Vote) -> peer::Vote {
    peer::Vote {
        term: vote.leader_id.term,
        voted_for: Some(vote.leader_id.voted_for),
        committed: vote.committed,
    }
}

pub(crate) fn membership_from(membership: peer::Membership) -> Result<Membership, Missing> {
    let configs: Vec<BTreeSet<NodeId>> = membership
        .configs
        .into_iter()
        .map(|set| set.ids.into_iter().collect())
        .collect();
    let nodes: BTreeMap<NodeId, Member> = membership
        .members
        .into_iter()
        .map(|node| (node.id, node.member.unwrap_or_default()))
        .collect();
    Membership::new(configs, nodes).map_err(|_| Missing("membership's members"))
}

pub(crate) fn membership_to(membership: &Membership) -> peer::Membership {
    peer::Membership {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|ids| peer::VoterSet {
                ids: ids.iter().copied().collect(),
            })
            .collect(),
        members: membership
            .nodes()
            .map(|(&id, member)| peer::GroupMember {
                id,
                member: Some(member.clone()),
            })
            .collect(),
    }
}

pub(crate) fn entry_from(entry: peer::Entry) -> Result<Entry, Missing> {
    let log_id = log_id_from(entry.log_id.ok_or(Missing("entry's log id"))?);
    let payload = match entry.payload {
        None => Payload::Blank,
        Some(peer::entry::Payload::Commands(bytes)) => Payload::Normal(Commands(bytes)),
        Some(peer::entry::Payload::Membership(membership)) => {
            Payload::Membership(membership_from(membership)?)
        }
    };
    Ok(Entry::new(log_id, payload))
}

pub(crate) fn entry_to(entry: &Entry) -> peer::Entry {
    let payload = match &entry.payload {
        Payload::Blank => None,
        Payload::Normal(commands) => Some(peer::entry::Payload::Commands(commands.0.clone())),
        Payload::Membership(membership) => {
            Some(peer::entry::Payload::Membership(membership_to(membership)))
        }
    };
    peer::Entry {
        log_id: Some(log_id_to(&entry.log_id())),
        payload,
    }
}

/// Bytes an entry takes in a message, to a few.
pub(crate) fn entry_bytes(entry: &Entry) -> usize {
    const FRAME: usize = 32;
    match &entry.payload {
        Payload::Normal(commands) => commands.0.len() + FRAME,
        Payload::Membership(membership) => membership.nodes().count() * 128 + FRAME,
        Payload::Blank => FRAME,
    }
}
