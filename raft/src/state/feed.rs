//! The feed of applied changes: what each key of the shard went through, in the order of revisions,
//! for whoever follows them on this replica.
//!
//! Promises that a slow follower holds up nobody and costs bounded memory: it is told that it missed
//! changes, and reads what it needs anew. Keys and revisions only: who wants the value looks it up.

use bytes::Bytes;
use holdfast_proto::{Key, Revision};
use tokio::sync::broadcast;

/// Changes that wait for the slowest follower; what is older is lost to it.
const CHANGES_KEPT: usize = 16_384;

/// What a follower is told next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key has an entry that last changed at this revision.
    Stored { key: Key, revision: Revision },
    /// The key has no entry any more, as of this revision.
    Removed { key: Key, revision: Revision },
    /// There were changes that this follower will not be told.
    Missed,
}

/// One follower of a replica's changes, from now on.
pub struct Changes(broadcast::Receiver<Change>);

impl Changes {
    /// `None` when the replica is closed.
    pub async fn next(&mut self) -> Option<Change> {
        match self.0.recv().await {
            Ok(change) => Some(change),
            Err(broadcast::error::RecvError::Lagged(_)) => Some(Change::Missed),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

pub(super) struct Feed(broadcast::Sender<Change>);

impl Default for Feed {
    fn default() -> Self {
        Self(broadcast::Sender::new(CHANGES_KEPT))
    }
}

impl Feed {
    pub(super) fn follow(&self) -> Changes {
        Changes(self.0.subscribe())
    }

    pub(super) fn has_followers(&self) -> bool {
        self.0.receiver_count() > 0
    }

    /// One run's, each key once. Never waits.
    pub(super) fn tell(&self, mut changes: Vec<(Revision, Key, bool)>) {
        changes.sort_unstable();
        for (revision, key, stored) in changes {
            // Copied: the key may be a slice of a whole log entry.
            let key = Key::new(Bytes::copy_from_slice(&key)).expect("it was a key before");
            // Nobody follows: fine.
            let _ = self.0.send(match stored {
                true => Change::Stored { key, revision },
                false => Change::Removed { key, revision },
            });
        }
    }

    /// Another state took the place of this one.
    pub(super) fn missed(&self) {
        let _ = self.0.send(Change::Missed);
    }
}
