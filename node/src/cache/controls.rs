//! What a read asks for beside its keys, checked.

use bytes::Bytes;
use holdfast_proto::{
    Token,
    timeline::Millis,
    v1::{Consistency, FetchOnMiss},
};
use holdfast_raft::{Replica, Seen, View};

use crate::{
    error::Error,
    policy::{self, Policy},
};

/// How much a read must have seen, and what it judges instants by.
#[derive(Debug, Clone)]
pub(super) struct Controls {
    pub(super) consistency: Consistency,
    pub(super) seen: Seen,
    /// As the caller gave it, to pass on.
    pub(super) token: Bytes,
    pub(super) demand: Demand,
}

/// What a read takes for an answer, and what it starts where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Demand {
    /// No older value will do.
    pub(crate) max_age: Option<Millis>,
    /// Nobody is asked or waited for.
    pub(crate) only_if_cached: bool,
    /// The upstream is asked whatever is stored.
    pub(crate) no_cache: bool,
    pub(crate) fetch_on_miss: FetchOnMiss,
}

impl Demand {
    pub(crate) fn check(self) -> Result<Self, Error> {
        match self.only_if_cached && self.no_cache {
            true => Err(Error::field(
                "no_cache",
                "at most one of `only_if_cached` and `no_cache`",
            )),
            false => Ok(self),
        }
    }

    /// Whether a value is young enough.
    pub(super) fn takes(&self, view: &View, now: Millis) -> bool {
        self.max_age
            .is_none_or(|max_age| view.timeline().age(now) <= max_age)
    }

    /// Whether a miss is answered before its fetch has ended.
    pub(super) fn is_async(&self, policy: &Policy) -> bool {
        match self.fetch_on_miss {
            FetchOnMiss::Unspecified => policy.fetch_on_miss == policy::FetchOnMiss::Async,
            FetchOnMiss::Sync => false,
            FetchOnMiss::Async => true,
        }
    }
}

impl Controls {
    pub(super) fn parse(consistency: i32, token: Bytes) -> Result<Self, Error> {
        let named = Consistency::try_from(consistency).map_err(|_| {
            Error::field(
                "consistency",
                format_args!("{consistency} is none of the known ones"),
            )
        })?;
        let session = Token::decode(&token)?;
        let (consistency, seen) = match named {
            Consistency::Unspecified | Consistency::Session => (
                Consistency::Session,
                session.map_or(Seen::Anything, Seen::Token),
            ),
            Consistency::Local => (Consistency::Local, Seen::Anything),
            Consistency::Linearizable => (Consistency::Linearizable, Seen::Everything),
            Consistency::Bounded => return Err(Error::not_built("consistency")),
        };
        Ok(Self {
            consistency,
            seen,
            token,
            demand: Demand::default(),
        })
    }

    pub(super) fn with(self, demand: Demand) -> Result<Self, Error> {
        Ok(Self {
            demand: demand.check()?,
            ..self
        })
    }

    /// Linearizable reads judge by log time, as apply does: two of them in a row never disagree
    /// about what has expired.
    pub(super) fn now(&self, replica: &Replica) -> Millis {
        match self.seen {
            Seen::Everything => replica.applied().log_time,
            Seen::Anything | Seen::Token(_) => replica.now(),
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::error::Code;

    fn parse(consistency: i32, token: &[u8]) -> Result<Controls, (Code, Option<String>)> {
        Controls::parse(consistency, Bytes::copy_from_slice(token))
            .map_err(|error| (error.code(), error.metadata("field").map(str::to_owned)))
    }

    #[test]
    fn a_session_without_a_token_takes_what_is_there() {
        assert_eq!(parse(0, b"").unwrap().seen, Seen::Anything);
        let token = {
            let mut token = Token::new(7);
            token.see(0, 12);
            token
        };
        for consistency in [Consistency::Unspecified, Consistency::Session] {
            let controls = parse(consistency.into(), &token.encode()).unwrap();
            assert_eq!(
                (controls.consistency, controls.seen),
                (Consistency::Session, Seen::Token(token.clone()))
            );
        }
        assert_eq!(
            parse(Consistency::Local.into(), &token.encode())
                .unwrap()
                .seen,
            Seen::Anything
        );
        assert_eq!(
            parse(Consistency::Linearizable.into(), &token.encode())
                .unwrap()
                .seen,
            Seen::Everything
        );
    }

    #[test]
    fn what_is_wrong_or_not_built_is_named() {
        let field = |name: &str| Some(name.to_owned());
        assert_eq!(
            parse(9, b"").unwrap_err(),
            (Code::InvalidArgument, field("consistency"))
        );
        assert_eq!(
            parse(-1, b"").unwrap_err(),
            (Code::InvalidArgument, field("consistency"))
        );
        assert_eq!(
            parse(Consistency::Bounded.into(), b"").unwrap_err(),
            (Code::Unimplemented, field("consistency"))
        );
        for consistency in [
            Consistency::Session,
            Consistency::Local,
            Consistency::Linearizable,
        ] {
            assert_eq!(
                parse(consistency.into(), b"nonsense").unwrap_err(),
                (Code::InvalidArgument, field("token"))
            );
        }
    }
}
