//! What an answer says of one key: a pure function of what is stored, the instant it is judged by
//! and what is known of its upstream.

use bytes::Bytes;
use holdfast_proto::{
    peer::FailureRecord,
    timeline::{FOREVER, Millis, Phase},
    v1,
};
use holdfast_raft::View;
use prost_types::Timestamp;

use crate::policy::Policy;

/// What stands behind a key.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Behind<'a> {
    /// Empty if there is no upstream.
    pub(super) upstream: &'a str,
    pub(super) refreshing: bool,
}

/// A stored value at an instant.
pub(super) fn stored(view: &View, now: Millis, behind: Behind<'_>) -> v1::Answer {
    v1::Answer {
        value: view.value().cloned(),
        state: state_of(view, now).into(),
        version: view.version(),
        age_ms: view.timeline().age(now),
        ttl_ms: view.timeline().ttl(now),
        expires_in_ms: view.timeline().expires_in(now),
        refresh_due: !behind.upstream.is_empty() && view.is_due(now),
        refreshing: behind.refreshing,
        stored: true,
        upstream: behind.upstream.to_owned(),
        last_error: view.failure().map(last_error),
        content_type: view.content_type().to_owned(),
    }
}

/// A fetched value that could not be stored: good for this answer and no longer.
pub(super) fn unstored(value: Bytes, content_type: String, upstream: &str) -> v1::Answer {
    v1::Answer {
        value: Some(value),
        state: v1::State::Fresh.into(),
        ttl_ms: Some(0),
        expires_in_ms: Some(0),
        stored: false,
        upstream: upstream.to_owned(),
        content_type,
        ..Default::default()
    }
}

pub(super) fn miss(behind: Behind<'_>) -> v1::Answer {
    v1::Answer {
        state: v1::State::Miss.into(),
        refreshing: behind.refreshing,
        upstream: behind.upstream.to_owned(),
        ..Default::default()
    }
}

/// Nothing is stored yet, and nobody waits.
pub(super) fn placeholder(policy: &Policy) -> v1::Answer {
    v1::Answer {
        value: policy.placeholder.clone(),
        state: v1::State::Placeholder.into(),
        refreshing: true,
        upstream: policy.upstream.to_string(),
        ..Default::default()
    }
}

/// An expired value is shown only to those who waited for its fetch and got it late: stale is what
/// it is then.
fn state_of(view: &View, now: Millis) -> v1::State {
    match view.phase(now) {
        _ if view.is_negative() => v1::State::Negative,
        Phase::Fresh => v1::State::Fresh,
        Phase::Stale | Phase::Expired => v1::State::Stale,
        Phase::StaleOnError => v1::State::StaleOnError,
    }
}

fn last_error(failure: &FailureRecord) -> v1::LastError {
    v1::LastError {
        class: failure.class,
        status: failure.status,
        at: timestamp(failure.at_ms),
        count: failure.count,
        next_attempt: timestamp(failure.next_attempt_ms),
    }
}

/// `None` for an instant that never comes.
pub(super) fn timestamp(instant: Millis) -> Option<Timestamp> {
    let seconds = i64::try_from(instant / 1000)
        .ok()
        .filter(|_| instant != FOREVER)?;
    let nanos = i32::try_from(instant % 1000).ok()? * 1_000_000;
    Some(Timestamp { seconds, nanos })
}

#[cfg(test)]
mod tests {
    use holdfast_proto::{peer::EntryRecord, v1::FailureClass};

    use super::*;

    const BEHIND: Behind<'_> = Behind {
        upstream: "profiles",
        refreshing: false,
    };

    /// Fetched at 1,000; due at 1,800; fresh until 2,000; stale until 3,000; expires at 5,000.
    fn record() -> EntryRecord {
        EntryRecord {
            version: 7,
            changed: 9,
            fetched_at_ms: 1_000,
            refresh_at_ms: 1_800,
            fresh_until_ms: 2_000,
            stale_while_revalidate_ms: 1_000,
            stale_if_error_ms: 3_000,
            content_type: "text/plain".into(),
            ..Default::default()
        }
    }

    fn view() -> View {
        View::with_value(record(), b"value".to_vec())
    }

    fn at(now: Millis) -> (v1::State, u64, Option<i64>, Option<u64>, bool) {
        let answer = stored(&view(), now, BEHIND);
        (
            answer.state(),
            answer.age_ms,
            answer.ttl_ms,
            answer.expires_in_ms,
            answer.refresh_due,
        )
    }

    #[test]
    fn each_phase_of_a_life_is_told_as_it_is() {
        assert_eq!(
            at(1_500),
            (v1::State::Fresh, 500, Some(500), Some(3_500), false)
        );
        assert_eq!(
            at(1_800),
            (v1::State::Fresh, 800, Some(200), Some(3_200), true)
        );
        assert_eq!(
            at(2_000),
            (v1::State::Stale, 1_000, Some(0), Some(3_000), true)
        );
        assert_eq!(
            at(3_500),
            (
                v1::State::StaleOnError,
                2_500,
                Some(-1_500),
                Some(1_500),
                true
            )
        );
        assert_eq!(
            at(6_000),
            (v1::State::Stale, 5_000, Some(-4_000), Some(0), true)
        );
    }

    #[test]
    fn an_answer_carries_what_is_stored() {
        let answer = stored(
            &view(),
            1_500,
            Behind {
                refreshing: true,
                ..BEHIND
            },
        );
        assert_eq!(answer.value.as_deref(), Some(b"value".as_slice()));
        assert_eq!(
            (answer.version, answer.stored, answer.refreshing),
            (7, true, true)
        );
        assert_eq!(
            (answer.upstream.as_str(), answer.content_type.as_str()),
            ("profiles", "text/plain")
        );
        assert_eq!(answer.last_error, None);
    }

    #[test]
    fn a_plain_entry_lives_for_ever_and_is_never_due() {
        let record = EntryRecord {
            fetched_at_ms: 1_000,
            refresh_at_ms: FOREVER,
            fresh_until_ms: FOREVER,
            ..Default::default()
        };
        let answer = stored(
            &View::with_value(record, b"v".to_vec()),
            31_536_001_000,
            Behind::default(),
        );
        assert_eq!(
            (answer.state(), answer.age_ms),
            (v1::State::Fresh, 31_536_000_000)
        );
        assert_eq!(
            (answer.ttl_ms, answer.expires_in_ms, answer.refresh_due),
            (None, None, false)
        );

        // Invalidated, with nobody who could refresh it.
        let answer = stored(&view(), 1_900, Behind::default());
        assert!(!answer.refresh_due);
    }

    #[test]
    fn a_failure_keeps_the_value_and_says_when_and_how_often() {
        let failure = FailureRecord {
            class: FailureClass::Status.into(),
            status: 503,
            count: 4,
            at_ms: 2_500,
            next_attempt_ms: 61_250,
        };
        let record = EntryRecord {
            failure: Some(failure),
            ..record()
        };
        let answer = stored(&View::with_value(record, b"value".to_vec()), 2_600, BEHIND);
        let told = answer.last_error.unwrap();
        assert_eq!((answer.age_ms, answer.value.is_some()), (1_600, true));
        assert_eq!(
            (told.class(), told.status, told.count),
            (FailureClass::Status, 503, 4)
        );
        assert_eq!(
            told.at,
            Some(Timestamp {
                seconds: 2,
                nanos: 500_000_000
            })
        );
        assert_eq!(
            told.next_attempt,
            Some(Timestamp {
                seconds: 61,
                nanos: 250_000_000
            })
        );
    }

    #[test]
    fn what_could_not_be_stored_is_good_for_one_answer() {
        let answer = unstored(Bytes::from_static(b"big"), "text/plain".into(), "profiles");
        assert_eq!(
            (answer.state(), answer.stored, answer.version),
            (v1::State::Fresh, false, 0)
        );
        assert_eq!((answer.ttl_ms, answer.expires_in_ms), (Some(0), Some(0)));
    }

    #[test]
    fn a_miss_has_no_value() {
        let answer = miss(BEHIND);
        assert_eq!(
            (answer.state(), answer.value, answer.version),
            (v1::State::Miss, None, 0)
        );
    }

    #[test]
    fn an_instant_that_never_comes_is_not_told() {
        assert_eq!(timestamp(FOREVER), None);
        assert_eq!(
            timestamp(1_500),
            Some(Timestamp {
                seconds: 1,
                nanos: 500_000_000
            })
        );
    }
}
