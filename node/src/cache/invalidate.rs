//! Invalidate: a key is stale from now on, still served inside its stale windows, and refreshed
//! from its upstream.

use holdfast_proto::{
    Key,
    peer::{Invalidate, command::Op},
    v1::{self, invalidate_request::Target},
};

use super::{
    Cache,
    write::{Acknowledged, check_request_id},
};
use crate::{error::Error, operation::Call};

impl Cache {
    pub async fn invalidate(
        &self,
        request: v1::InvalidateRequest,
        call: &Call,
    ) -> Result<Acknowledged<v1::InvalidateResponse>, Error> {
        let (key, request_id) = check(request).map_err(Error::not_applied)?;
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
}

fn check(request: v1::InvalidateRequest) -> Result<(Key, Option<v1::RequestId>), Error> {
    let Some(Target::Key(key)) = request.target else {
        return Err(Error::field("key", "it is missing"));
    };
    let key = Key::new(key).map_err(|invalid| Error::key("key", invalid))?;
    Ok((key, check_request_id(request.request_id)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalidate_without_a_key_is_a_mistake() {
        let field = |target| {
            check(v1::InvalidateRequest {
                target,
                request_id: None,
            })
            .err()
            .map(|error| error.metadata("field").map(str::to_owned))
        };
        assert_eq!(field(None), Some(Some("key".into())));
        assert_eq!(
            field(Some(Target::Key("".into()))),
            Some(Some("key".into()))
        );
        assert_eq!(field(Some(Target::Key("k".into()))), None);
    }
}
