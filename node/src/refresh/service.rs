//! The leader's end of what followers ask: fetches, and reports of what was read.
//!
//! Promises to say so when this node does not lead. Must never forward, or know how it was asked.

use std::{sync::Arc, time::Duration};

use holdfast_proto::{
    Key,
    peer::{FetchRefused, UnstoredValue, fetch_response::Result as Answer},
    v1::FailureClass,
};
use holdfast_raft::Replica;

use super::{Landed, NoValue, Refresher, join::NoAnswer, marks::Report, reports::KEYS_MAX};

impl Refresher {
    /// Joins the flight of a follower's reader, who waits so long; `None` if it was too short: the
    /// fetch goes on.
    pub(crate) async fn fetch_for_peer(
        self: &Arc<Self>,
        key: &Key,
        replica: &Arc<Replica>,
        timeout: Duration,
    ) -> Option<Answer> {
        let Some(term) = replica.leads() else {
            return Some(not_leader());
        };
        let joined = Box::pin(self.join(key, replica, term));
        let answer = match tokio::time::timeout(timeout, joined).await.ok()? {
            Ok(Landed::Committed { revision }) => Answer::CommittedRevision(revision),
            Ok(Landed::Unstored {
                value,
                content_type,
            }) => Answer::Unstored(UnstoredValue {
                value,
                content_type,
            }),
            Err(NoAnswer::NotLeading) => not_leader(),
            Err(NoAnswer::NoValue(none)) => Answer::Refused(refused(none)),
        };
        Some(answer)
    }

    /// What a follower's readers used, and of that what is due; no more of it than one report has.
    pub(crate) fn reads_reported(self: &Arc<Self>, mut read: Vec<Key>, mut due: Vec<Key>) {
        read.truncate(KEYS_MAX);
        due.truncate(KEYS_MAX);
        self.hear_report(Report { read, due });
    }
}

fn not_leader() -> Answer {
    Answer::Refused(FetchRefused {
        not_leader: true,
        ..Default::default()
    })
}

fn refused(none: NoValue) -> FetchRefused {
    match none {
        NoValue::Failed(failure) => FetchRefused {
            class: failure.class.into(),
            status: failure.status,
            count: failure.count,
            at_ms: failure.at_ms,
            next_attempt_ms: failure.next_attempt_ms,
            not_leader: false,
        },
        NoValue::Overloaded => FetchRefused {
            class: FailureClass::Overloaded.into(),
            ..Default::default()
        },
        NoValue::NoLeader | NoValue::Deadline => FetchRefused {
            not_leader: true,
            ..Default::default()
        },
    }
}
