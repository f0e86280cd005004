//! The mutations, Set, Delete and Invalidate: a checked request goes to the leader as one command,
//! and its outcome becomes an answer.

use bytes::Bytes;
use holdfast_proto::{
    Key, Revision, Token,
    limits::CLIENT_ID_BYTES,
    peer::{Delete, Invalidate, Outcome, Rejected, command::Op, outcome},
    reason,
    v1::{self, delete_request, invalidate_request},
};
use holdfast_raft::Deadline;

use super::{Acknowledged, Cache, set::CheckedSet};
use crate::{error::Error, operation::Call, rules::Rules};

/// What a command that counts came to.
struct Written {
    revision: Revision,
    existed: bool,
    replica: v1::Replica,
    token: Token,
    leader: Option<String>,
}

/// What an outcome says.
#[derive(Debug, PartialEq, Eq)]
struct Done {
    revision: Revision,
    existed: bool,
}

impl Cache {
    /// Replaces a key's value, times and tags, by the policies of whoever leads the key: a node that
    /// is known to have others lets the leader form it.
    pub async fn set(
        &self,
        request: v1::SetRequest,
        call: &Call,
    ) -> Result<Acknowledged<v1::SetResponse>, Error> {
        let rules = self.rules.load_full();
        match self.set_by_leader(&request, &rules, call).await? {
            Some(acknowledged) => Ok(acknowledged),
            None => self.set_here(request, &rules, call).await,
        }
    }

    /// A Set that a peer lets this node judge, as the leader of its key.
    pub(crate) async fn set_for_peer(
        &self,
        request: v1::SetRequest,
        call: &Call,
    ) -> Result<v1::SetResponse, Error> {
        let leads = Key::new(request.key.clone()).is_ok_and(|key| {
            self.replica_of(&key)
                .is_ok_and(|replica| replica.leads().is_some())
        });
        if !leads {
            return Err(Error::no_leader().not_applied());
        }
        let rules = self.rules.load_full();
        let acknowledged = self.set_here(request, &rules, call).await?;
        Ok(acknowledged.response)
    }

    async fn set_here(
        &self,
        mut request: v1::SetRequest,
        rules: &Rules,
        call: &Call,
    ) -> Result<Acknowledged<v1::SetResponse>, Error> {
        let form = || {
            let request_id = check_request_id(request.request_id.take())?;
            let set = CheckedSet::check(request)?;
            let key = set.key().clone();
            let now = self.replica_of(&key)?.now();
            let op = set.into_op(rules.policy(&key), now, rand::random())?;
            Ok((key, op, request_id))
        };
        let (key, op, request_id) = form().map_err(Error::not_applied)?;
        let written = self.write(&key, op, request_id, &call.deadline).await?;
        let response = v1::SetResponse {
            version: written.revision,
            replica: Some(written.replica),
            token: written.token.encode(),
        };
        Ok(Acknowledged {
            response,
            leader: written.leader,
        })
    }

    /// Removes a key, and outranks any fetch that began before it.
    pub async fn delete(
        &self,
        request: v1::DeleteRequest,
        call: &Call,
    ) -> Result<Acknowledged<v1::DeleteResponse>, Error> {
        let key = request.target.map(|delete_request::Target::Key(key)| key);
        let (key, request_id) = check(key, request.request_id).map_err(Error::not_applied)?;
        let op = Op::Delete(Delete {
            key: key.as_bytes().clone(),
        });
        let written = self.write(&key, op, request_id, &call.deadline).await?;
        let response = v1::DeleteResponse {
            existed: written.existed,
            replica: Some(written.replica),
            token: written.token.encode(),
        };
        Ok(Acknowledged {
            response,
            leader: written.leader,
        })
    }

    /// A key is stale from now on, still served inside its stale windows, and refreshed from its
    /// upstream.
    pub async fn invalidate(
        &self,
        request: v1::InvalidateRequest,
        call: &Call,
    ) -> Result<Acknowledged<v1::InvalidateResponse>, Error> {
        let key = request
            .target
            .map(|invalidate_request::Target::Key(key)| key);
        let (key, request_id) = check(key, request.request_id).map_err(Error::not_applied)?;
        let op = Op::Invalidate(Invalidate {
            key: key.as_bytes().clone(),
        });
        let written = self.write(&key, op, request_id, &call.deadline).await?;
        // There may be no reader for a while, and the first one is to find the new value.
        if written.existed && self.rules.load().policy(&key).is_some() {
            self.refresher.refresh_invalidated(&key);
        }
        let response = v1::InvalidateResponse {
            existed: written.existed,
            replica: Some(written.replica),
            token: written.token.encode(),
        };
        Ok(Acknowledged {
            response,
            leader: written.leader,
        })
    }

    async fn write(
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

/// The target of a Delete or an Invalidate.
fn check(
    key: Option<Bytes>,
    request_id: Option<v1::RequestId>,
) -> Result<(Key, Option<v1::RequestId>), Error> {
    let key = key.ok_or_else(|| Error::field("key", "it is missing"))?;
    let key = Key::new(key).map_err(|invalid| Error::key("key", invalid))?;
    Ok((key, check_request_id(request_id)?))
}

fn check_request_id(request_id: Option<v1::RequestId>) -> Result<Option<v1::RequestId>, Error> {
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
    fn what_names_no_key_is_a_mistake() {
        let field = |key: Option<&'static str>| {
            let checked = check(key.map(Bytes::from), None);
            let error = checked.err()?;
            error.metadata("field").map(str::to_owned)
        };
        assert_eq!(field(None).as_deref(), Some("key"));
        assert_eq!(field(Some("")).as_deref(), Some("key"));
        assert_eq!(field(Some("k")), None);
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
