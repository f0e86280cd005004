//! Delete: removes a key, and outranks any fetch that began before it.

use holdfast_proto::{
    Key,
    peer::{Delete, command::Op},
    v1::{self, delete_request::Target},
};

use super::{
    Cache,
    write::{Acknowledged, check_request_id},
};
use crate::{error::Error, operation::Call};

impl Cache {
    pub async fn delete(
        &self,
        request: v1::DeleteRequest,
        call: &Call,
    ) -> Result<Acknowledged<v1::DeleteResponse>, Error> {
        let (key, request_id) = check(request).map_err(Error::not_applied)?;
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
}

fn check(request: v1::DeleteRequest) -> Result<(Key, Option<v1::RequestId>), Error> {
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
    fn a_delete_without_a_key_is_a_mistake() {
        let field = |target| {
            check(v1::DeleteRequest {
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
