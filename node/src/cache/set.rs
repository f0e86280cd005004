//! What a Set says, and the command it becomes: checked by the contract's limits, and given the
//! times that the client or the key's policy says. Pure.

use std::time::Duration;

use holdfast_proto::{
    Key,
    limits::{
        CONTENT_TYPE_BYTES_MAX, TAG_BYTES_MAX, TAGS_MAX, VALUE_BYTES_DEFAULT, VALUE_BYTES_MAX,
    },
    peer::{self, Lifetime, command::Op},
    timeline::{FOREVER, Millis},
    v1::{self, Origin},
};

use super::times::{instant, millis};
use crate::{error::Error, policy::Policy, upstream::Said};

/// A Set whose fields are within the contract's limits.
#[derive(Debug)]
pub(super) struct CheckedSet {
    key: Key,
    request: v1::SetRequest,
    life: Life,
    stale_while_revalidate: Option<Millis>,
    stale_if_error: Option<Millis>,
}

/// How long the client says the value is fresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// As the key's policy has it; without one, for ever.
    Unsaid,
    Ttl(Millis),
    Until(Millis),
}

impl CheckedSet {
    /// Looks at everything but the value's size, which is the policy's to say.
    pub(super) fn check(mut request: v1::SetRequest) -> Result<Self, Error> {
        let key = Key::new(std::mem::take(&mut request.key))
            .map_err(|invalid| Error::key("key", invalid))?;
        let life = match (request.ttl, request.expires_at) {
            (Some(_), Some(_)) => {
                return Err(Error::field(
                    "expires_at",
                    "at most one of `ttl` and `expires_at`",
                ));
            }
            (Some(ttl), None) => match millis("ttl", ttl)? {
                0 => return Err(Error::field("ttl", "it is not above 0")),
                ttl => Life::Ttl(ttl),
            },
            (None, Some(at)) => Life::Until(instant("expires_at", at)?),
            (None, None) => Life::Unsaid,
        };
        let window = |field, duration: Option<prost_types::Duration>| {
            duration.map(|duration| millis(field, duration)).transpose()
        };
        let stale_while_revalidate =
            window("stale_while_revalidate", request.stale_while_revalidate)?;
        let stale_if_error = window("stale_if_error", request.stale_if_error)?;
        check_tags(&request.tags)?;
        check_content_type(&request.content_type)?;
        if request.if_version.is_some() && request.if_absent {
            return Err(Error::field(
                "if_absent",
                "at most one of `if_version` and `if_absent`",
            ));
        }
        Ok(Self {
            key,
            request,
            life,
            stale_while_revalidate,
            stale_if_error,
        })
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    /// The command, by the key's policy if it has one. `now` is the log's time, `random` in [0, 1).
    pub(super) fn into_op(
        self,
        policy: Option<&Policy>,
        now: Millis,
        random: f64,
    ) -> Result<Op, Error> {
        check_size(self.request.value.len(), policy)?;
        let lifetime = self.lifetime(policy, now, random);
        let request = self.request;
        Ok(Op::Set(peer::Set {
            key: self.key.as_bytes().clone(),
            value: request.value,
            content_type: request.content_type,
            tags: request.tags,
            lifetime: Some(lifetime),
            expires_at_ms: self.life.until(),
            if_version: request.if_version,
            if_absent: request.if_absent,
            origin: match policy {
                Some(_) => Origin::Set,
                None => Origin::Plain,
            }
            .into(),
        }))
    }

    /// A plain entry lives as the client says; one with an upstream as its policy says where the
    /// client does not, and is refreshed from there in its time.
    fn lifetime(&self, policy: Option<&Policy>, now: Millis, random: f64) -> Lifetime {
        let mut lifetime = match policy {
            None => Lifetime {
                fresh_ms: FOREVER,
                refresh_after_ms: FOREVER,
                stale_while_revalidate_ms: 0,
                stale_if_error_ms: 0,
                min_refresh_interval_ms: 0,
                keep_ms: 0,
            },
            Some(policy) => policy_lifetime(self.life, policy, now, random),
        };
        if let (Life::Ttl(ttl), None) | (Life::Ttl(ttl @ FOREVER), Some(_)) = (self.life, policy) {
            lifetime.fresh_ms = ttl;
        }
        lifetime.stale_while_revalidate_ms = self
            .stale_while_revalidate
            .unwrap_or(lifetime.stale_while_revalidate_ms);
        lifetime.stale_if_error_ms = self.stale_if_error.unwrap_or(lifetime.stale_if_error_ms);
        lifetime
    }
}

fn check_size(size: usize, policy: Option<&Policy>) -> Result<(), Error> {
    let most = policy
        .map_or(VALUE_BYTES_DEFAULT as u64, |policy| policy.max_value_bytes)
        .min(VALUE_BYTES_MAX as u64);
    match size as u64 {
        size if size > most => Err(Error::too_large(
            "value",
            format_args!("it has {size} bytes, more than {most}"),
        )),
        _ => Ok(()),
    }
}

fn check_tags(tags: &[String]) -> Result<(), Error> {
    if tags.len() > TAGS_MAX {
        return Err(Error::field(
            "tags",
            format_args!("there are {}, more than {TAGS_MAX}", tags.len()),
        ));
    }
    match tags
        .iter()
        .map(String::len)
        .find(|length| !(1..=TAG_BYTES_MAX).contains(length))
    {
        Some(length) => Err(Error::field(
            "tags",
            format_args!("one has {length} bytes; a tag has 1 to {TAG_BYTES_MAX}"),
        )),
        None => Ok(()),
    }
}

/// What may stand in a header, where it goes on other doors.
fn check_content_type(content_type: &str) -> Result<(), Error> {
    if content_type.len() > CONTENT_TYPE_BYTES_MAX {
        let length = content_type.len();
        return Err(Error::field(
            "content_type",
            format_args!("it has {length} bytes, more than {CONTENT_TYPE_BYTES_MAX}"),
        ));
    }
    match content_type
        .bytes()
        .all(|byte| (b' '..=b'~').contains(&byte))
    {
        true => Ok(()),
        false => Err(Error::field(
            "content_type",
            "only printable ASCII may be in it",
        )),
    }
}

impl Life {
    fn until(self) -> Option<Millis> {
        match self {
            Self::Until(at) => Some(at),
            Self::Unsaid | Self::Ttl(_) => None,
        }
    }
}

fn policy_lifetime(life: Life, policy: &Policy, now: Millis, random: f64) -> Lifetime {
    let unsaid = Said::default();
    let ttl = match life {
        // A value that never goes stale is refreshed as often as the policy's own.
        Life::Unsaid | Life::Ttl(FOREVER) => {
            return policy.lifetime(&unsaid, random, Duration::ZERO, false);
        }
        Life::Ttl(ttl) => ttl,
        Life::Until(at) => at.saturating_sub(now),
    };
    let policy = Policy {
        ttl: Duration::from_millis(ttl),
        min_ttl: Duration::ZERO,
        max_ttl: Duration::MAX,
        ..policy.clone()
    };
    policy.lifetime(&unsaid, random, Duration::ZERO, false)
}

#[cfg(test)]
mod tests {
    use prost_types::{Duration as Proto, Timestamp};

    use super::{super::times::FOREVER_SECONDS, *};
    use crate::error::Code;
    use crate::{glob::Glob, policy::Window};

    fn seconds(seconds: i64) -> Option<Proto> {
        Some(Proto { seconds, nanos: 0 })
    }

    fn checked(change: impl FnOnce(&mut v1::SetRequest)) -> Result<CheckedSet, (Code, String)> {
        let mut request = v1::SetRequest {
            key: "k".into(),
            ..Default::default()
        };
        change(&mut request);
        CheckedSet::check(request)
            .map_err(|error| (error.code(), error.metadata("field").unwrap().to_owned()))
    }

    #[test]
    fn a_mistake_names_its_field() {
        type Change = fn(&mut v1::SetRequest);
        let mistakes: [(&str, Change); 18] = [
            ("key", |set| set.key.clear()),
            ("key", |set| set.key = vec![0; 1025].into()),
            ("ttl", |set| set.ttl = seconds(0)),
            ("ttl", |set| set.ttl = seconds(-1)),
            ("ttl", |set| {
                set.ttl = Some(Proto {
                    seconds: 0,
                    nanos: -1,
                })
            }),
            ("ttl", |set| {
                set.ttl = Some(Proto {
                    seconds: 1,
                    nanos: 1_000_000_000,
                })
            }),
            ("ttl", |set| set.ttl = seconds(FOREVER_SECONDS + 1)),
            ("expires_at", |set| {
                (set.ttl, set.expires_at) = (seconds(1), Some(Timestamp::default()))
            }),
            ("expires_at", |set| {
                set.expires_at = Some(Timestamp {
                    seconds: -1,
                    nanos: 0,
                })
            }),
            ("expires_at", |set| {
                set.expires_at = Some(Timestamp {
                    seconds: i64::MAX,
                    nanos: 0,
                })
            }),
            ("stale_while_revalidate", |set| {
                set.stale_while_revalidate = seconds(-1)
            }),
            ("stale_if_error", |set| set.stale_if_error = seconds(-1)),
            ("tags", |set| set.tags = vec!["t".into(); 65]),
            ("tags", |set| set.tags = vec![String::new()]),
            ("tags", |set| set.tags = vec!["t".repeat(257)]),
            ("content_type", |set| set.content_type = "t".repeat(257)),
            ("content_type", |set| {
                set.content_type = "text/plain\r\nx: y".into()
            }),
            ("if_absent", |set| {
                (set.if_version, set.if_absent) = (Some(1), true)
            }),
        ];
        for (field, change) in mistakes {
            assert_eq!(
                checked(change).unwrap_err(),
                (Code::InvalidArgument, field.to_owned())
            );
        }
    }

    #[test]
    fn the_bounds_themselves_are_allowed() {
        let life = |change: fn(&mut v1::SetRequest)| checked(change).unwrap().life;
        assert_eq!(life(|_| ()), Life::Unsaid);
        assert_eq!(
            life(|set| set.ttl = Some(Proto {
                seconds: 0,
                nanos: 1
            })),
            Life::Ttl(1)
        );
        assert_eq!(
            life(|set| set.ttl = seconds(FOREVER_SECONDS)),
            Life::Ttl(FOREVER)
        );
        assert_eq!(
            life(|set| set.expires_at = Some(Timestamp {
                seconds: 2,
                nanos: 999_999
            })),
            Life::Until(2_000)
        );
        assert!(checked(|set| set.tags = vec!["t".repeat(256); 64]).is_ok());
        assert_eq!(
            checked(|set| set.stale_if_error = seconds(0))
                .unwrap()
                .stale_if_error,
            Some(0)
        );
        assert_eq!(
            checked(|set| set.stale_if_error = seconds(FOREVER_SECONDS))
                .unwrap()
                .stale_if_error,
            Some(FOREVER)
        );
    }

    fn policy(max_value_bytes: u64) -> Policy {
        Policy {
            stale_if_error: Window::Forever,
            max_value_bytes,
            ..Policy::new(Glob::parse("*").unwrap(), "u")
        }
    }

    #[test]
    fn a_value_has_the_size_its_policy_allows_and_never_more_than_8_mib() {
        let size = |size, policy: Option<&Policy>| {
            check_size(size, policy)
                .err()
                .map(|error| (error.code(), error.reason().to_owned()))
        };
        let too_large = Some((Code::ResourceExhausted, "TOO_LARGE".to_owned()));
        assert_eq!(size(1 << 20, None), None);
        assert_eq!(size((1 << 20) + 1, None), too_large);
        assert_eq!(size(10, Some(&policy(10))), None);
        assert_eq!(size(11, Some(&policy(10))), too_large);
        assert_eq!(size((8 << 20) + 1, Some(&policy(u64::MAX))), too_large);
    }

    fn life(change: fn(&mut v1::SetRequest), policy: Option<&Policy>) -> Lifetime {
        checked(change).unwrap().lifetime(policy, 100_000, 0.0)
    }

    #[test]
    fn a_plain_entry_lives_as_the_client_says() {
        let forever = Lifetime {
            fresh_ms: FOREVER,
            refresh_after_ms: FOREVER,
            ..Default::default()
        };
        assert_eq!(life(|_| (), None), forever);
        assert_eq!(
            life(|set| set.ttl = seconds(5), None),
            Lifetime {
                fresh_ms: 5_000,
                ..forever
            }
        );
        assert_eq!(
            life(|set| set.stale_if_error = seconds(7), None),
            Lifetime {
                stale_if_error_ms: 7_000,
                ..forever
            }
        );
    }

    #[test]
    fn a_set_on_a_key_with_an_upstream_gets_a_full_lifetime() {
        let policy = policy(1 << 20);
        let full = policy.lifetime(&Said::default(), 0.0, Duration::ZERO, false);
        assert_eq!((full.fresh_ms, full.refresh_after_ms), (60_000, 48_000));
        assert_eq!(life(|_| (), Some(&policy)), full);
        let named = life(
            |set| (set.ttl, set.stale_while_revalidate) = (seconds(10), seconds(0)),
            Some(&policy),
        );
        assert_eq!((named.fresh_ms, named.refresh_after_ms), (10_000, 8_000));
        assert_eq!(
            (named.stale_while_revalidate_ms, named.stale_if_error_ms),
            (0, FOREVER)
        );
        // Until 110 s, judged at 100 s: the refresh comes before that.
        assert_eq!(
            life(
                |set| set.expires_at = Some(Timestamp {
                    seconds: 110,
                    nanos: 0
                }),
                Some(&policy)
            )
            .refresh_after_ms,
            8_000
        );
        let forever = life(|set| set.ttl = seconds(FOREVER_SECONDS), Some(&policy));
        assert_eq!(
            (forever.fresh_ms, forever.refresh_after_ms),
            (FOREVER, 48_000)
        );
    }
}
