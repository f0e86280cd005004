//! What is safe to send again, and how long to wait before. Decides only; sends nothing.

use std::time::Duration;

use holdfast_proto::reason;

use crate::error::{Applied, Error};

/// First pause between two rounds over the endpoints; an election usually takes a few of them.
const BACKOFF_FIRST: Duration = Duration::from_millis(25);
/// Longest pause of our own making.
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Tries of one call that a full node may refuse: more of the same is not what it needs.
const OVERLOADED_MAX: u32 = 3;

/// What one call may do again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Changes nothing.
    Read,
    /// A mutation with a request id: however often it is sent, it happens once.
    NamedWrite,
    /// A mutation that would happen again if it were sent again.
    Write,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    GiveUp,
    /// At once, on another node; after a pause if all have been asked.
    Elsewhere,
    /// The node said when.
    After(Duration),
}

impl Kind {
    pub(crate) fn is_mutation(self) -> bool {
        self != Self::Read
    }

    /// Whether a try that may have happened can be followed by another.
    pub(crate) fn repeats_safely(self) -> bool {
        self != Self::Write
    }

    /// What to do after a try has failed with `error`; `overloaded` counts the refusals of full
    /// nodes so far, this one too.
    pub(crate) fn verdict(self, error: &Error, overloaded: u32) -> Verdict {
        if self.is_mutation() && error.applied() == Applied::Unknown && !self.repeats_safely() {
            return Verdict::GiveUp;
        }
        match error {
            Error::Connect { .. } => Verdict::Elsewhere,
            // The cluster as a whole cannot, until then; any other cause is the node's own, and
            // another may answer now.
            Error::Unavailable {
                retry_after: Some(after),
                ..
            } if matches!(error.reason(), reason::NO_LEADER | reason::NO_QUORUM) => {
                Verdict::After(*after)
            }
            Error::Unavailable { .. } => Verdict::Elsewhere,
            // Only when it says when, and then not for long: a crowd that comes back at once keeps
            // a full node full.
            Error::Overloaded {
                retry_after: Some(after),
                ..
            } if overloaded < OVERLOADED_MAX => Verdict::After(*after),
            // The node's share of the time; what is left of the call's may do elsewhere.
            Error::Deadline { .. } if self == Self::Read => Verdict::Elsewhere,
            _ => Verdict::GiveUp,
        }
    }
}

/// Pauses that double, each with half of it left to chance so that callers who failed together do
/// not return together.
pub(crate) struct Backoff {
    rounds_left: u32,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(rounds: u32) -> Self {
        Self {
            rounds_left: rounds,
            next: BACKOFF_FIRST,
        }
    }

    /// None when the rounds are used up.
    pub(crate) fn pause(&mut self) -> Option<Duration> {
        self.rounds_left = self.rounds_left.checked_sub(1)?;
        let pause = self.next;
        self.next = (self.next * 2).min(BACKOFF_MAX);
        Some(pause.mul_f64(rand::random_range(0.5..=1.0)))
    }

    /// What a node asked for, and up to a quarter more.
    pub(crate) fn pause_asked(&mut self, asked: Duration) -> Option<Duration> {
        self.rounds_left = self.rounds_left.checked_sub(1)?;
        Some(
            asked.saturating_add(
                asked
                    .min(BACKOFF_MAX)
                    .mul_f64(rand::random_range(0.0..=0.25)),
            ),
        )
    }
}

/// Whether the node that failed so is of no use as leader for now.
pub(crate) fn speaks_against_leading(error: &Error) -> bool {
    match error {
        Error::Unavailable { .. } => error.reason() != reason::BEHIND,
        // Unreachable from here it may well lead: it rests, and is remembered.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    fn error(
        code: Code,
        why: &str,
        applied: Option<&str>,
        retry_after: Option<Duration>,
        kind: Kind,
    ) -> Error {
        let metadata: HashMap<String, String> = applied
            .iter()
            .map(|&word| (reason::APPLIED.to_owned(), word.to_owned()))
            .collect();
        let mut details = ErrorDetails::with_error_info(why, reason::DOMAIN, metadata);
        if retry_after.is_some() {
            details.set_retry_info(retry_after);
        }
        Error::from_status(
            &Status::with_error_details(code, "", details),
            kind.is_mutation(),
        )
    }

    #[test]
    fn a_write_without_a_name_is_sent_again_only_if_it_did_not_happen() {
        let verdict = |kind: Kind, applied| {
            kind.verdict(
                &error(Code::Unavailable, reason::NO_LEADER, applied, None, kind),
                0,
            )
        };
        assert_eq!(verdict(Kind::Write, Some("no")), Verdict::Elsewhere);
        assert_eq!(verdict(Kind::Write, Some("unknown")), Verdict::GiveUp);
        assert_eq!(verdict(Kind::Write, None), Verdict::GiveUp);
        assert_eq!(
            verdict(Kind::NamedWrite, Some("unknown")),
            Verdict::Elsewhere
        );
        assert_eq!(verdict(Kind::Read, None), Verdict::Elsewhere);
        assert_eq!(
            Kind::Write.verdict(&Error::connect("a", "refused", true), 0),
            Verdict::Elsewhere
        );
    }

    #[test]
    fn what_is_permanent_is_not_tried_again() {
        for (code, why) in [
            (Code::InvalidArgument, reason::INVALID_FIELD),
            (Code::Unimplemented, reason::NOT_BUILT),
            (Code::ResourceExhausted, reason::TOO_LARGE),
            (Code::ResourceExhausted, reason::DISK_FULL),
            (Code::FailedPrecondition, reason::VERSION_CONFLICT),
            (Code::Internal, reason::INTERNAL),
            (Code::Unavailable, reason::UPSTREAM_FAILED),
        ] {
            for kind in [Kind::Read, Kind::NamedWrite, Kind::Write] {
                assert_eq!(
                    kind.verdict(&error(code, why, Some("no"), None, kind), 0),
                    Verdict::GiveUp,
                    "{why}"
                );
            }
        }
    }

    #[test]
    fn a_full_node_is_asked_again_when_it_says_and_not_for_ever() {
        let said = Some(Duration::from_millis(40));
        let full = error(
            Code::ResourceExhausted,
            reason::OVERLOADED,
            None,
            said,
            Kind::Read,
        );
        assert_eq!(
            Kind::Read.verdict(&full, 1),
            Verdict::After(Duration::from_millis(40))
        );
        assert_eq!(Kind::Read.verdict(&full, OVERLOADED_MAX), Verdict::GiveUp);
        let silent = error(
            Code::ResourceExhausted,
            reason::OVERLOADED,
            None,
            None,
            Kind::Read,
        );
        assert_eq!(Kind::Read.verdict(&silent, 1), Verdict::GiveUp);
    }

    #[test]
    fn pauses_grow_with_jitter_and_end() {
        let mut backoff = Backoff::new(8);
        let pauses: Vec<_> = std::iter::from_fn(|| backoff.pause()).collect();
        assert_eq!(pauses.len(), 8);
        assert!(pauses[0] >= BACKOFF_FIRST / 2 && pauses[0] <= BACKOFF_FIRST);
        assert!(pauses.iter().all(|pause| *pause <= BACKOFF_MAX));
        assert!(pauses[7] >= BACKOFF_MAX / 2);
        assert!(Backoff::new(0).pause().is_none());
        let asked = Backoff::new(1)
            .pause_asked(Duration::from_millis(100))
            .unwrap();
        assert!(asked >= Duration::from_millis(100) && asked <= Duration::from_millis(125));
    }
}
