//! BatchGet: many keys, each answered for itself. Also what a leader answers to a peer's read.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use futures::future::join_all;
use holdfast_proto::{
    InvalidKey, Key, ShardId, Token,
    limits::{BATCH_BYTES_MAX, BATCH_KEYS_MAX},
    reason,
    v1::{self, batch_get_result::Result as Told},
};
use holdfast_raft::{Deadline, ReadManyError, Replica};

use super::{
    Cache,
    controls::{Controls, Demand},
    forward::{Hop, Reached},
    get::Settled,
    wait::Asked,
};
use crate::{error::Error, operation::Call, rules::Rules};

/// The keys of one shard, and their places in the request.
struct Group<'a> {
    replica: &'a Arc<Replica>,
    places: Vec<usize>,
    keys: Vec<Key>,
}

/// What became of one group.
#[derive(Default)]
struct GroupRead {
    /// In the order of the group's keys.
    results: Vec<Told>,
    /// The leader's position, if it answered all of them.
    leader: Option<v1::Replica>,
    /// What the leader's answers had seen, whoever answered the others.
    seen: Token,
}

impl Cache {
    pub async fn batch_get(
        &self,
        request: v1::BatchGetRequest,
        call: &Call,
    ) -> Result<v1::BatchGetResponse, Error> {
        let controls = check(&request)?;
        self.read_many(request.keys, &controls, Hop::Allowed, &call.deadline)
            .await
    }

    /// A read that a peer could not answer and takes this node for the leader. It goes no further.
    /// `token` as the client sent it.
    pub(crate) async fn read_for_peer(
        &self,
        keys: Vec<Bytes>,
        consistency: v1::Consistency,
        token: Bytes,
        demand: Demand,
        call: &Call,
    ) -> Result<v1::BatchGetResponse, Error> {
        let request = v1::BatchGetRequest {
            keys,
            consistency: consistency.into(),
            token,
        };
        let controls = check(&request)?.with(demand)?;
        self.read_many(request.keys, &controls, Hop::Taken, &call.deadline)
            .await
    }

    async fn read_many(
        &self,
        keys: Vec<Bytes>,
        controls: &Controls,
        hop: Hop,
        deadline: &Deadline,
    ) -> Result<v1::BatchGetResponse, Error> {
        let (peers, rules) = (self.peers()?, self.rules.load_full());
        let mut told: Vec<Option<Told>> = vec![None; keys.len()];
        let groups = self.group(keys, &mut told)?;
        let standings: Vec<_> = groups
            .iter()
            .map(|group| group.replica.standing())
            .collect();
        let read = join_all(
            groups
                .iter()
                .map(|group| self.read_group(group, controls, &rules, hop, deadline)),
        )
        .await;

        let mut failed = None;
        let (mut here, mut leader, mut seen) =
            (Vec::new(), None, Token::new(peers.identity().epoch));
        for ((group, standing), read) in groups.iter().zip(standings).zip(read) {
            match read {
                Ok(read) => {
                    match read.leader {
                        Some(position) => leader = Some(position),
                        None => here.push((&**group.replica, standing)),
                    }
                    seen.merge(&read.seen);
                    group
                        .places
                        .iter()
                        .zip(read.results)
                        .for_each(|(&place, result)| told[place] = Some(result));
                }
                Err(error) => {
                    group
                        .places
                        .iter()
                        .for_each(|&place| told[place] = Some(Told::Error(error.clone().into())));
                    failed = Some(error);
                }
            }
        }
        // No shard could be read at all: that is the call's error, not its keys'.
        if let Some(error) = failed.filter(|_| here.is_empty() && leader.is_none()) {
            return Err(error);
        }
        // Not one of them was a key.
        if groups.is_empty() {
            let first = self.replicas.replicas().next();
            here.extend(first.map(|first| (&**first, first.standing())));
        }
        let (position, token) = self.position(&peers, &here);
        seen.merge(&token);
        let position = if here.is_empty() {
            leader.unwrap_or(position)
        } else {
            position
        };
        let results = bounded(
            told.into_iter()
                .map(|result| result.unwrap_or_else(missing)),
        );
        Ok(v1::BatchGetResponse {
            results,
            replica: Some(position),
            token: seen.encode(),
        })
    }

    /// Sorts keys by the replica that has them; a key that is none is answered at its place.
    fn group(&self, keys: Vec<Bytes>, told: &mut [Option<Told>]) -> Result<Vec<Group<'_>>, Error> {
        let mut groups: BTreeMap<ShardId, Group<'_>> = BTreeMap::new();
        for (place, key) in keys.into_iter().enumerate() {
            match Key::new(key) {
                Ok(key) => {
                    let replica = self.replica_of(&key)?;
                    let group = groups.entry(replica.shard()).or_insert_with(|| Group {
                        replica,
                        places: Vec::new(),
                        keys: Vec::new(),
                    });
                    group.places.push(place);
                    group.keys.push(key);
                }
                Err(invalid) => told[place] = Some(invalid_key(invalid)),
            }
        }
        Ok(groups.into_values().collect())
    }

    async fn read_group(
        &self,
        group: &Group<'_>,
        controls: &Controls,
        rules: &Rules,
        hop: Hop,
        deadline: &Deadline,
    ) -> Result<GroupRead, Error> {
        let reached = match self
            .reach(group.replica, &group.keys, controls, hop, deadline)
            .await
        {
            // What failed is the one key's upstream, not the way to it.
            Err(error) if error.metadata(reason::UPSTREAM).is_some() => {
                return Ok(GroupRead {
                    results: vec![Told::Error(error.into()); group.keys.len()],
                    ..Default::default()
                });
            }
            reached => reached?,
        };
        if let Reached::Leader(response) = reached {
            let seen = Token::decode(&response.token)?.unwrap_or_default();
            let results = response
                .results
                .into_iter()
                .map(|result| result.result.unwrap_or_else(missing))
                .collect();
            return Ok(GroupRead {
                results,
                leader: Some(response.replica.unwrap_or_default()),
                seen,
            });
        }
        // No more than one answer can hold.
        let read = group.replica.read_many(&group.keys, BATCH_BYTES_MAX).await;
        let settled = group.keys.iter().zip(read).map(|(key, view)| async move {
            let asked = Asked {
                key,
                replica: group.replica,
                controls,
                rules,
                hop,
                deadline,
            };
            self.settle(asked, view.map_err(unread)?).await
        });
        let mut read = GroupRead::default();
        for settled in join_all(settled).await {
            read.results.push(match settled {
                Ok(Settled::Here(answer)) => Told::Answer(answer),
                Ok(Settled::Leader(mut response)) => {
                    read.seen
                        .merge(&Token::decode(&response.token)?.unwrap_or_default());
                    response
                        .results
                        .pop()
                        .and_then(|result| result.result)
                        .unwrap_or_else(missing)
                }
                Err(error) => Told::Error(error.into()),
            });
        }
        Ok(read)
    }
}

fn check(request: &v1::BatchGetRequest) -> Result<Controls, Error> {
    match request.keys.len() {
        0 => Err(Error::field("keys", "there are none")),
        count if count > BATCH_KEYS_MAX => Err(Error::field(
            "keys",
            format_args!("there are {count}, more than {BATCH_KEYS_MAX}"),
        )),
        _ => Controls::parse(request.consistency, request.token.clone()),
    }
}

fn invalid_key(invalid: InvalidKey) -> Told {
    Told::Error(Error::key("keys", invalid).into())
}

fn missing() -> Told {
    Told::Error(Error::internal("a key of a batch was not answered", "its place is empty").into())
}

fn unread(error: ReadManyError) -> Error {
    match error {
        ReadManyError::OverBound => over_the_bound(),
        ReadManyError::Disk(error) => Error::disk(&error),
    }
}

fn over_the_bound() -> Error {
    Error::too_large(
        "keys",
        format_args!(
            "the values before this one fill an answer of {BATCH_BYTES_MAX} bytes: ask for it again"
        ),
    )
}

/// In order, until their values fill one answer.
fn bounded(results: impl Iterator<Item = Told>) -> Vec<v1::BatchGetResult> {
    let mut bytes = 0;
    let mut within = |result: Told| {
        let Told::Answer(answer) = &result else {
            return result;
        };
        let size = answer.value.as_ref().map_or(0, Bytes::len);
        if bytes + size > BATCH_BYTES_MAX {
            return Told::Error(over_the_bound().into());
        }
        bytes += size;
        result
    };
    results
        .map(|result| v1::BatchGetResult {
            result: Some(within(result)),
        })
        .collect()
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::error::Code;

    #[test]
    fn a_batch_has_1_to_1000_keys() {
        let checked = |count: usize| {
            let request = v1::BatchGetRequest {
                keys: vec!["k".into(); count],
                ..Default::default()
            };
            check(&request)
                .err()
                .map(|error| (error.code(), error.metadata("field").map(str::to_owned)))
        };
        let mistake = Some((Code::InvalidArgument, Some("keys".to_owned())));
        assert_eq!(checked(0), mistake);
        assert_eq!(checked(1), None);
        assert_eq!(checked(1000), None);
        assert_eq!(checked(1001), mistake);
    }

    #[test]
    fn a_bad_key_is_the_error_of_that_key() {
        let Told::Error(error) = invalid_key(InvalidKey::Empty) else {
            panic!("an answer")
        };
        assert_eq!(
            (error.code, error.reason.as_str()),
            (Code::InvalidArgument as i32, reason::INVALID_FIELD)
        );
    }

    #[test]
    fn values_beyond_one_answer_are_refused_one_by_one() {
        let of = |size: usize| {
            Told::Answer(v1::Answer {
                value: Some(vec![0; size].into()),
                ..Default::default()
            })
        };
        let results = bounded([of(BATCH_BYTES_MAX - 10), of(11), of(10), of(1), of(0)].into_iter());
        let told: Vec<_> = results
            .into_iter()
            .map(|result| match result.result.unwrap() {
                Told::Answer(answer) => Ok(answer.value.unwrap().len()),
                Told::Error(error) => Err((error.code, error.reason)),
            })
            .collect();
        let refused = Err((Code::ResourceExhausted as i32, reason::TOO_LARGE.to_owned()));
        assert_eq!(
            told,
            [
                Ok(BATCH_BYTES_MAX - 10),
                refused.clone(),
                Ok(10),
                refused,
                Ok(0)
            ]
        );
    }
}
