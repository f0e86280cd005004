//! Get: one key.

use holdfast_proto::{Key, v1};

use super::{
    Cache,
    controls::Controls,
    forward::{Hop, Reached},
    read::{Asked, Settled},
};
use crate::{error::Error, operation::Call};

impl Cache {
    pub async fn get(
        &self,
        request: v1::GetRequest,
        call: &Call,
    ) -> Result<v1::GetResponse, Error> {
        let (key, controls) = check(request)?;
        let rules = self.rules.load_full();
        let deadline = &call.deadline;
        let replica = self.replica_of(&key)?;
        match self
            .reach(
                replica,
                std::slice::from_ref(&key),
                &controls,
                Hop::Allowed,
                deadline,
            )
            .await?
        {
            Reached::Here => {}
            Reached::Leader(response) => return only_answer(response),
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
}

fn check(request: v1::GetRequest) -> Result<(Key, Controls), Error> {
    let fields = [
        ("max_staleness", request.max_staleness.is_some()),
        ("max_age", request.max_age.is_some()),
        ("only_if_cached", request.only_if_cached),
        ("no_cache", request.no_cache),
        ("if_version_not", request.if_version_not.is_some()),
        ("fetch_on_miss", request.fetch_on_miss != 0),
        ("lease", request.lease),
    ];
    if let Some((field, _)) = fields.into_iter().find(|&(_, given)| given) {
        return Err(Error::not_built(field));
    }
    let key = Key::new(request.key).map_err(|invalid| Error::key("key", invalid))?;
    Ok((key, Controls::parse(request.consistency, request.token)?))
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
    use holdfast_proto::v1::{Consistency, FetchOnMiss, GetRequest};

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
        let unbuilt: [(&str, Change); 8] = [
            ("max_staleness", |get| {
                get.max_staleness = Some(Default::default())
            }),
            ("max_age", |get| get.max_age = Some(Default::default())),
            ("only_if_cached", |get| get.only_if_cached = true),
            ("no_cache", |get| get.no_cache = true),
            ("if_version_not", |get| get.if_version_not = Some(0)),
            ("fetch_on_miss", |get| {
                get.fetch_on_miss = FetchOnMiss::Async.into()
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
