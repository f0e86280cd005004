//! Get: one key, and what is answered of what is stored: the steps of DESIGN §4, "Read". What a read
//! waits for is `wait.rs`'s.
//!
//! ```text
//! nothing, or expired   no upstream: MISS
//!                       upstream:    wait for the cluster's fetch, hard_timeout at most (async: PLACEHOLDER)
//! FRESH, STALE          answer; past the refresh point say so to the refresher
//! past that             upstream known to fail, no leader: answer; else wait for the fetch, soft_timeout at most, then answer
//! ```

use holdfast_proto::{
    Key,
    timeline::{Millis, Phase},
    v1::{self, FetchOnMiss},
};
use holdfast_raft::View;

use super::{
    Cache,
    answer::{self, Behind},
    controls::{Controls, Demand},
    forward::{Hop, Reached},
    times::millis,
    wait::{Asked, Wait, Waited},
};
use crate::{
    error::Error,
    operation::Call,
    policy::{Policy, Read},
    refresh::is_due,
};

/// One key's answer, and whose it is.
pub(super) enum Settled {
    Here(v1::Answer),
    /// This replica lagged behind a value that the cluster has: the leader answered.
    Leader(v1::BatchGetResponse),
}

impl Cache {
    pub async fn get(
        &self,
        request: v1::GetRequest,
        call: &Call,
    ) -> Result<v1::GetResponse, Error> {
        let known = request.if_version_not;
        let mut response = self.get_whole(request, call).await?;
        if let Some(answer) = &mut response.answer
            && answer.stored
            && known == Some(answer.version)
        {
            answer.value = None;
        }
        Ok(response)
    }

    /// With its value, whatever the caller knows.
    async fn get_whole(
        &self,
        request: v1::GetRequest,
        call: &Call,
    ) -> Result<v1::GetResponse, Error> {
        let (key, controls) = check(request)?;
        let rules = self.rules.load_full();
        let deadline = &call.deadline;
        let replica = self.replica_of(&key)?;
        if !replica.has_seen(&controls.seen) {
            let keys = std::slice::from_ref(&key);
            let reach = self.reach(replica, keys, &controls, Hop::Allowed, deadline);
            match reach.await? {
                Reached::Here => {}
                Reached::Leader(response) => return only_answer(response),
            }
        }
        let standing = replica.standing();
        let view = replica.read(&key).await;
        let view = view.map_err(|error| Error::disk(&error))?;
        let asked = Asked {
            key: &key,
            replica,
            controls: &controls,
            rules: &rules,
            hop: Hop::Allowed,
            deadline,
        };
        match self.settle(asked, view).await? {
            Settled::Leader(response) => only_answer(response),
            Settled::Here(answer) => {
                let standing = standing.showing(answer.version);
                let (replica, token) = self.position(&*self.peers()?, &[(replica, standing)]);
                Ok(v1::GetResponse {
                    answer: Some(answer),
                    replica: Some(replica),
                    token: token.encode(),
                })
            }
        }
    }

    /// Turns what was looked up into an answer, waiting only where DESIGN says so.
    pub(super) async fn settle(
        &self,
        asked: Asked<'_>,
        view: Option<View>,
    ) -> Result<Settled, Error> {
        let now = asked.controls.now(asked.replica);
        let policy = asked.rules.policy(asked.key);
        let demand = &asked.controls.demand;
        let live = view.filter(|view| view.is_live(now));
        let is_young = |view: &View| demand.takes(view, now);
        if demand.only_if_cached {
            let answer = match live.filter(is_young) {
                Some(view) => self.serve(asked.key, &view, now, policy),
                None => answer::miss(self.behind(asked.key, true, policy)),
            };
            return Ok(Settled::Here(answer));
        }
        let wait = match (live, policy) {
            (live, Some(policy)) if demand.no_cache => Wait::Anew { live, policy },
            (Some(live), Some(policy)) if !is_young(&live) => {
                let live = Some(live);
                Wait::Anew { live, policy }
            }
            (live, Some(policy)) if policy.read == Read::NetworkFirst => {
                Wait::NetworkFirst { live, policy }
            }
            (Some(live), Some(policy))
                if live.phase(now) == Phase::StaleOnError
                    && !self.refresher.should_not_wait(asked.key, &live, policy) =>
            {
                Wait::Softly { live, policy }
            }
            (Some(live), policy) if is_young(&live) => {
                return Ok(Settled::Here(self.serve(asked.key, &live, now, policy)));
            }
            (_, Some(policy)) if demand.is_async(policy) => {
                self.refresher.fetch_behind(asked.key, policy);
                return Ok(Settled::Here(answer::placeholder(policy)));
            }
            (_, Some(policy)) => Wait::ForValue { policy },
            (_, None) => Wait::NoPolicy,
        };
        Box::pin(self.settle_later(asked, wait, policy)).await
    }

    /// As `settle`, of what memory alone does not answer.
    async fn settle_later(
        &self,
        asked: Asked<'_>,
        wait: Wait<'_>,
        policy: Option<&Policy>,
    ) -> Result<Settled, Error> {
        let answer = match self.wait(asked, wait).await? {
            Waited::Stored(view) => {
                let now = asked.controls.now(asked.replica);
                self.serve(asked.key, &view, now, policy)
            }
            Waited::Unstored {
                value,
                content_type,
            } => {
                // Who reads a key that has no value finds nothing that could be due.
                self.refresher.note_read(asked.key, false);
                let upstream = policy.map_or("", |policy| &*policy.upstream);
                answer::unstored(value, content_type, upstream)
            }
            Waited::Nothing => answer::miss(self.behind(asked.key, true, policy)),
            Waited::NoUpstream => answer::miss(Behind::default()),
            Waited::Leader(response) => return Ok(Settled::Leader(response)),
        };
        Ok(Settled::Here(answer))
    }

    /// What the refresher knows of a key whose refresh point has passed or not.
    pub(super) fn behind<'p>(
        &self,
        key: &Key,
        due: bool,
        policy: Option<&'p Policy>,
    ) -> Behind<'p> {
        match policy {
            Some(policy) => Behind {
                upstream: &policy.upstream,
                refreshing: due && self.refresher.is_refreshing(key, policy),
            },
            None => Behind::default(),
        }
    }

    /// Answers with what is stored, and lets the refresher know of the read.
    fn serve(&self, key: &Key, view: &View, now: Millis, policy: Option<&Policy>) -> v1::Answer {
        let due = policy.is_some_and(|policy| is_due(view, policy, now));
        if policy.is_some() {
            // While the next attempt is ahead a hint is for nothing.
            let failure = view.failure();
            let is_held_back = failure.is_some_and(|failure| now < failure.next_attempt_ms);
            self.refresher.note_read(key, due && !is_held_back);
        }
        v1::Answer {
            refresh_due: due,
            ..answer::stored(view, now, self.behind(key, due, policy))
        }
    }
}

fn check(request: v1::GetRequest) -> Result<(Key, Controls), Error> {
    let fields = [
        ("max_staleness", request.max_staleness.is_some()),
        ("lease", request.lease),
    ];
    if let Some((field, _)) = fields.into_iter().find(|&(_, given)| given) {
        return Err(Error::not_built(field));
    }
    let fetch_on_miss = FetchOnMiss::try_from(request.fetch_on_miss);
    let demand = Demand {
        max_age: request
            .max_age
            .map(|max_age| millis("max_age", max_age))
            .transpose()?,
        only_if_cached: request.only_if_cached,
        no_cache: request.no_cache,
        fetch_on_miss: fetch_on_miss
            .map_err(|_| Error::field("fetch_on_miss", "it is none of the known ones"))?,
    };
    let key = Key::new(request.key).map_err(|invalid| Error::key("key", invalid))?;
    let controls = Controls::parse(request.consistency, request.token)?.with(demand)?;
    Ok((key, controls))
}

/// The leader's answer to one key, as a Get tells it.
fn only_answer(response: v1::BatchGetResponse) -> Result<v1::GetResponse, Error> {
    let v1::BatchGetResponse {
        results,
        replica,
        token,
    } = response;
    match results.into_iter().next().and_then(|result| result.result) {
        Some(v1::batch_get_result::Result::Answer(answer)) => Ok(v1::GetResponse {
            answer: Some(answer),
            replica,
            token,
        }),
        Some(v1::batch_get_result::Result::Error(error)) => Err(Error::from_key_error(error)),
        None => Err(Error::internal(
            "the leader answered a read with nothing",
            "the answer is missing",
        )),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_proto::v1::{Consistency, GetRequest};

    use super::*;
    use crate::error::Code;

    fn wrong(change: impl FnOnce(&mut GetRequest)) -> (Code, String) {
        let mut request = GetRequest {
            key: "k".into(),
            ..Default::default()
        };
        change(&mut request);
        let error = check(request).err().unwrap();
        (error.code(), error.metadata("field").unwrap().to_owned())
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        type Change = fn(&mut GetRequest);
        let unbuilt: [(&str, Change); 3] = [
            ("max_staleness", |get| {
                get.max_staleness = Some(Default::default())
            }),
            ("lease", |get| get.lease = true),
            ("consistency", |get| {
                get.consistency = Consistency::Bounded.into()
            }),
        ];
        for (field, set) in unbuilt {
            assert_eq!(wrong(set), (Code::Unimplemented, field.to_owned()));
        }
    }

    #[test]
    fn a_mistake_names_its_field() {
        assert_eq!(
            wrong(|get| get.key.clear()),
            (Code::InvalidArgument, "key".into())
        );
        assert_eq!(
            wrong(|get| get.key = vec![b'k'; 1025].into()),
            (Code::InvalidArgument, "key".into())
        );
        assert_eq!(
            wrong(|get| get.consistency = 17),
            (Code::InvalidArgument, "consistency".into())
        );
        assert_eq!(
            wrong(|get| get.token = "?".into()),
            (Code::InvalidArgument, "token".into())
        );
        assert_eq!(
            wrong(|get| (get.only_if_cached, get.no_cache) = (true, true)),
            (Code::InvalidArgument, "no_cache".into())
        );
        let negative = prost_types::Duration {
            seconds: -1,
            nanos: 0,
        };
        assert_eq!(
            wrong(|get| get.max_age = Some(negative)),
            (Code::InvalidArgument, "max_age".into())
        );
        assert_eq!(
            wrong(|get| get.fetch_on_miss = 7),
            (Code::InvalidArgument, "fetch_on_miss".into())
        );
    }

    #[test]
    fn a_key_and_nothing_else_is_enough() {
        assert!(
            check(GetRequest {
                key: "k".into(),
                ..Default::default()
            })
            .is_ok()
        );
    }
}
