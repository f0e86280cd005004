//! The leader's broom: proposes the removal of what is past its last instant.

use std::{io, sync::Arc, time::Duration};

use holdfast_proto::{
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

/// How far the broom is.
struct Swept {
    /// Where the next batch begins.
    next: Millis,
    more: bool,
}

impl Replica {
    pub(super) async fn sweep(self: Arc<Self>) {
        let mut every = every(SWEEP_EVERY);
        let mut rounds = 0u32;
        let mut from = 0;
        loop {
            every.tick().await;
            if self.leads().is_none() {
                from = 0;
                continue;
            }
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(SWEEP_ALL_EVERY) {
                from = 0;
            }
            // On without a pause while there is more, so that what expires cannot outrun the broom.
            for _ in 0..SWEEP_BATCHES {
                match self.sweep_once(from).await {
                    Ok(swept) => {
                        from = swept.next;
                        if !swept.more {
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

    /// One batch from `from` on.
    async fn sweep_once(self: &Arc<Self>, from: Millis) -> io::Result<Swept> {
        let now = self.applied().log_time;
        let this = self.clone();
        let (keys, tombstones, swept) = crate::task::blocking(move || this.expired(from, now))
            .await
            .map_err(io::Error::other)??;
        if keys.is_empty() && tombstones.is_empty() {
            return Ok(swept);
        }
        let op = Op::Sweep(peer::Sweep { keys, tombstones });
        let command = Command {
            request_id: None,
            caller: String::new(),
            op: Some(op),
        };
        self.propose_here(command, SWEEP_TIMEOUT)
            .await
            .map_err(io::Error::other)?;
        Ok(swept)
    }

    fn expired(
        &self,
        from: Millis,
        now: Millis,
    ) -> io::Result<(Vec<SweepKey>, Vec<SweepKey>, Swept)> {
        let expired = self.state.due(DueKind::Expire, from, now, SWEEP_BATCH)?;
        let full = expired.len() == SWEEP_BATCH;
        let next = if full {
            expired.last().map_or(from, |&(at, _)| at)
        } else {
            now
        };
        let mut keys = Vec::new();
        for (_, key) in expired {
            if let Some(entry) = self.state.record(&key)? {
                keys.push(SweepKey {
                    key: key.into(),
                    changed: entry.record.changed,
                });
            }
        }
        let mut tombstones = Vec::new();
        let settled = self.state.due(DueKind::Tombstone, 0, now, SWEEP_BATCH)?;
        let more = full || settled.len() == SWEEP_BATCH;
        for (_, key) in settled {
            if let Some(tombstone) = self.state.tombstone(&key)? {
                tombstones.push(SweepKey {
                    key: key.into(),
                    changed: tombstone.revision,
                });
            }
        }
        Ok((keys, tombstones, Swept { next, more }))
    }
}
