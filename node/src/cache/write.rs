//! What all mutations share: a checked request goes to the leader as one command, and its outcome
//! becomes an answer.

use holdfast_proto::{
    Key, Revision, Token,
    limits::CLIENT_ID_BYTES,
    peer::{Outcome, Rejected, command::Op, outcome},
    reason, v1,
};
use holdfast_raft::Deadline;

use super::Cache;
use crate::error::Error;

/// A mutation that a quorum has on disk, and where the next one goes best.
#[derive(Debug)]
pub struct Acknowledged<T> {
    pub response: T,
    /// The leader's client address, if another node leads.
    pub leader: Option<String>,
}

/// What a command that counts came to.
pub(super) struct Written {
    pub(super) revision: Revision,
    pub(super) existed: bool,
    pub(super) replica: v1::Replica,
    pub(super) token: Token,
    pub(super) leader: Option<String>,
}

/// What an outcome says.
#[derive(Debug, PartialEq, Eq)]
struct Done {
    revision: Revision,
    existed: bool,
}

impl Cache {
    pub(super) async fn write(
        &self,
        key: &Key,
        op: Op,
        request_id: Option<v1::RequestId>,
        deadline: &Deadline,
    ) -> Result<Written, Error> {
        let replica = self.replica_of(key).map_err(Error::not_applied)?;
        let peers = self.peers().map_err(Error::not_applied)?;
        let outcome = replica
            .write(op, request_id, deadline)
            .await
            .map_err(|failed| {
                let named = failed
                    .leader()
                    .and_then(|id| peers.member(id))
                    .map(|member| member.client_address);
                Error::from(failed).with_leader(named.or_else(|| self.leader_elsewhere(replica)))
            })?;
        let leader = self.leader_elsewhere(replica);
        let Done { revision, existed } =
            done(outcome).map_err(|error| error.with_leader(leader.clone()))?;
        let (position, _) = self.position(&peers, &[(replica, replica.standing())]);
        // The write itself and no more: it says nothing of what this replica shows.
        let mut token = Token::new(peers.identity().epoch);
        token.see(replica.shard(), revision);
        Ok(Written {
            revision,
            existed,
            replica: position,
            token,
            leader,
        })
    }
}

fn done(outcome: Outcome) -> Result<Done, Error> {
    match outcome.result {
        Some(outcome::Result::Done(done)) => Ok(Done {
            revision: done.revision,
            existed: done.existed,
        }),
        Some(outcome::Result::Conflict(conflict)) => Err(Error::conflict(conflict.version)),
        Some(outcome::Result::Rejected(rejected)) => Err(refused(rejected)),
        other => Err(Error::internal(
            "a mutation came to something that no mutation comes to",
            format!("{other:?}"),
        )
        .maybe_applied()),
    }
}

/// Apply refuses a client's command only if its request id is one whose outcome is forgotten: it
/// may have been applied then.
fn refused(rejected: Rejected) -> Error {
    let error = Error::new(rejected.reason, rejected.message).maybe_applied();
    match error.reason() {
        reason::INVALID_FIELD => error.with(reason::FIELD, "request_id"),
        _ => error,
    }
}

pub(super) fn check_request_id(
    request_id: Option<v1::RequestId>,
) -> Result<Option<v1::RequestId>, Error> {
    let Some(id) = request_id else {
        return Ok(None);
    };
    if id.client.len() != CLIENT_ID_BYTES {
        return Err(Error::field(
            "request_id.client",
            format_args!(
                "it has {} bytes instead of {CLIENT_ID_BYTES}",
                id.client.len()
            ),
        ));
    }
    if id.seq == 0 {
        return Err(Error::field("request_id.seq", "it counts up from 1"));
    }
    if id.done_below > id.seq {
        return Err(Error::field(
            "request_id.done_below",
            "it is above `seq`: the outcome of this request is not known yet",
        ));
    }
    Ok(Some(id))
}

#[cfg(test)]
mod tests {
    use holdfast_proto::peer::{Conflict, Fenced};

    use super::*;
    use crate::error::Code;

    fn id(client: usize, seq: u64, done_below: u64) -> Option<v1::RequestId> {
        Some(v1::RequestId {
            client: vec![7; client].into(),
            seq,
            done_below,
        })
    }

    #[test]
    fn a_request_id_is_16_bytes_and_counts_from_1() {
        let field = |id| {
            check_request_id(id)
                .err()
                .map(|error| error.metadata("field").unwrap().to_owned())
        };
        assert_eq!(field(None), None);
        assert_eq!(field(id(16, 1, 0)), None);
        assert_eq!(field(id(16, 3, 3)), None);
        assert_eq!(field(id(15, 1, 0)).as_deref(), Some("request_id.client"));
        assert_eq!(field(id(0, 1, 0)).as_deref(), Some("request_id.client"));
        assert_eq!(field(id(16, 0, 0)).as_deref(), Some("request_id.seq"));
        assert_eq!(
            field(id(16, 3, 4)).as_deref(),
            Some("request_id.done_below")
        );
    }

    #[test]
    fn an_outcome_says_whether_the_write_counts() {
        let ok = outcome::Result::Done(holdfast_proto::peer::Done {
            revision: 9,
            existed: true,
        });
        assert_eq!(
            done(ok.into()).unwrap(),
            Done {
                revision: 9,
                existed: true
            }
        );

        let conflict = done(
            outcome::Result::Conflict(Conflict {
                version: 4,
                revision: 9,
            })
            .into(),
        )
        .unwrap_err();
        assert_eq!(
            (conflict.code(), conflict.reason()),
            (Code::FailedPrecondition, reason::VERSION_CONFLICT)
        );
        assert_eq!(
            (conflict.metadata("version"), conflict.metadata("applied")),
            (Some("4"), Some("no"))
        );

        let forgotten = Rejected {
            reason: reason::INVALID_FIELD.into(),
            message: "request_id: forgotten".into(),
        };
        let forgotten = done(outcome::Result::Rejected(forgotten).into()).unwrap_err();
        assert_eq!(
            (forgotten.code(), forgotten.metadata("applied")),
            (Code::InvalidArgument, Some("unknown"))
        );

        let odd = done(outcome::Result::Fenced(Fenced { revision: 9 }).into()).unwrap_err();
        assert_eq!(
            (odd.code(), odd.metadata("applied")),
            (Code::Internal, Some("unknown"))
        );
    }
}
