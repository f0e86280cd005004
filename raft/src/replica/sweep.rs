//! The leader's broom: proposes the removal of what is past its last instant.

use std::{io, sync::Arc, time::Duration};

use holdfast_proto::{
    Key, Revision,
    peer::{self, Command, SweepKey, command::Op},
    timeline::Millis,
};

use super::Replica;
use crate::{state::record::DueKind, task::every};

const SWEEP_EVERY: Duration = Duration::from_millis(1000);
/// The due index is read from its beginning again this often: rows may be written behind the broom.
const SWEEP_ALL_EVERY: u32 = 60;
/// One batch may take this long.
const SWEEP_TIMEOUT: Duration = Duration::from_secs(1);
const SWEEP_BATCH: usize = 1000;
/// Batches of one tick.
const SWEEP_BATCHES: usize = 50;

/// Where in the due index the next batch begins: what was removed before is not passed over again.
#[derive(Clone, Copy, Default)]
struct Broom {
    entries: Millis,
    tombstones: Millis,
}

/// One batch of what is past its last instant.
struct Batch {
    entries: Vec<SweepKey>,
    tombstones: Vec<SweepKey>,
    next: Broom,
    more: bool,
}

impl Replica {
    pub(super) async fn sweep(self: Arc<Self>) {
        let mut every = every(SWEEP_EVERY);
        let mut rounds = 0u32;
        let mut broom = Broom::default();
        loop {
            every.tick().await;
            if self.leads().is_none() {
                broom = Broom::default();
                continue;
            }
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(SWEEP_ALL_EVERY) {
                broom = Broom::default();
            }
            // On without a pause while there is more, so that what expires cannot outrun the broom.
            for _ in 0..SWEEP_BATCHES {
                match self.sweep_once(broom).await {
                    Ok((next, more)) => {
                        broom = next;
                        if !more {
                            break;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, shard = self.shard, "sweeping failed");
                        break;
                    }
                }
            }
        }
    }

    /// One batch, and whether there is more.
    async fn sweep_once(self: &Arc<Self>, from: Broom) -> io::Result<(Broom, bool)> {
        let now = self.applied().log_time;
        let this = self.clone();
        let batch = crate::task::blocking(move || this.expired(from, now))
            .await
            .map_err(io::Error::other)??;
        let next = (batch.next, batch.more);
        if batch.entries.is_empty() && batch.tombstones.is_empty() {
            return Ok(next);
        }
        let op = Op::Sweep(peer::Sweep {
            keys: batch.entries,
            tombstones: batch.tombstones,
        });
        let command = Command {
            request_id: None,
            caller: String::new(),
            op: Some(op),
        };
        self.propose_here(command, SWEEP_TIMEOUT)
            .await
            .map_err(io::Error::other)?;
        Ok(next)
    }

    fn expired(&self, from: Broom, now: Millis) -> io::Result<Batch> {
        let entries = self
            .state
            .due(DueKind::Expire, from.entries, now, SWEEP_BATCH)?;
        let tombstones = self
            .state
            .due(DueKind::Tombstone, from.tombstones, now, SWEEP_BATCH)?;
        let (next_entries, more_entries) = after(&entries, now);
        let (next_tombstones, more_tombstones) = after(&tombstones, now);
        let changed = |key: &Key| Ok(self.state.record(key)?.map(|entry| entry.record.changed));
        let deleted = |key: &Key| {
            Ok(self
                .state
                .tombstone(key)?
                .map(|tombstone| tombstone.revision))
        };
        Ok(Batch {
            entries: as_they_are(entries, changed)?,
            tombstones: as_they_are(tombstones, deleted)?,
            next: Broom {
                entries: next_entries,
                tombstones: next_tombstones,
            },
            more: more_entries || more_tombstones,
        })
    }
}

/// Where the index is read next, and whether there is more of it.
fn after(due: &[(Millis, Key)], now: Millis) -> (Millis, bool) {
    match due.last() {
        Some(&(at, _)) if due.len() == SWEEP_BATCH => (at, true),
        _ => (now, false),
    }
}

/// With the revision that each key has now: what changes until the sweep is applied stays.
fn as_they_are(
    due: Vec<(Millis, Key)>,
    revision: impl Fn(&Key) -> io::Result<Option<Revision>>,
) -> io::Result<Vec<SweepKey>> {
    let mut keys = Vec::with_capacity(due.len());
    for (_, key) in due {
        if let Some(changed) = revision(&key)? {
            keys.push(SweepKey {
                key: key.into(),
                changed,
            });
        }
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_keys_that_expire_in_one_instant_none_is_passed_over() {
        let due = |count: usize| -> Vec<(Millis, Key)> {
            let key = |n: usize| Key::new(format!("k{n}")).unwrap();
            (0..count).map(|n| (7, key(n))).collect()
        };
        assert_eq!(after(&due(SWEEP_BATCH), 9), (7, true));
        assert_eq!(after(&due(SWEEP_BATCH - 1), 9), (9, false));
        assert_eq!(after(&due(0), 9), (9, false));
    }
}
