//! What voters have acknowledged, remembered by the others: a voter whose disk went back in time
//! cannot know by itself that entries are gone which it had promised to keep.
//!
//! The leader knows it of everybody, says it with its heartbeats, and each node writes it down once
//! a second. Only what was committed counts: such an entry is never taken back from a log, so
//! a log that ends before it has lost it. What the same process acknowledged later is no loss.

use std::{collections::HashMap, io, path::Path};

use holdfast_proto::{
    ShardId,
    peer::{self, AcknowledgedRecord},
};
use parking_lot::Mutex;

use crate::{identity::replace_file, state::record};

const FILE: &str = "acknowledged";

#[derive(Default)]
pub(crate) struct Acknowledged(Mutex<HashMap<(ShardId, u64), Position>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Position {
    session: u64,
    index: u64,
}

impl Acknowledged {
    /// As it was written down last.
    pub(crate) fn read(&self, dir: &Path) -> io::Result<()> {
        match std::fs::read(dir.join(FILE)) {
            Ok(bytes) => {
                let record: AcknowledgedRecord = record::decode(FILE, &bytes.into())?;
                self.note(&record.acknowledged);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        replace_file(dir, FILE, &record::encode(&self.record()))
    }

    pub(crate) fn note(&self, acknowledged: &[peer::Acknowledged]) {
        let mut known = self.0.lock();
        for &peer::Acknowledged {
            shard,
            id,
            session,
            index,
        } in acknowledged
        {
            let known = known
                .entry((shard, id))
                .or_insert(Position { session, index });
            if index > known.index {
                *known = Position { session, index };
            }
        }
    }

    /// Of one shard, for its followers to remember.
    pub(crate) fn of_shard(&self, shard: ShardId) -> Vec<peer::Acknowledged> {
        let mut all = self.record().acknowledged;
        all.retain(|acknowledged| acknowledged.shard == shard);
        all
    }

    pub(crate) fn record(&self) -> AcknowledgedRecord {
        let known = self.0.lock();
        let acknowledged =
            known.iter().map(
                |(&(shard, id), &Position { session, index })| peer::Acknowledged {
                    shard,
                    id,
                    session,
                    index,
                },
            );
        let mut acknowledged: Vec<peer::Acknowledged> = acknowledged.collect();
        acknowledged.sort_by_key(|acknowledged| (acknowledged.shard, acknowledged.id));
        AcknowledgedRecord { acknowledged }
    }

    /// What a process of a member says of its logs, by shard: the shard and index that an earlier
    /// process had acknowledged beyond it.
    pub(crate) fn lost(&self, id: u64, session: u64, last_index: &[u64]) -> Option<(ShardId, u64)> {
        let known = self.0.lock();
        last_index.iter().zip(0..).find_map(|(&last, shard)| {
            let known = known.get(&(shard, id))?;
            (known.session != session && last < known.index).then_some((shard, known.index))
        })
    }

    /// Who is no member any more acknowledges nothing.
    pub(crate) fn keep_only(&self, is_member: impl Fn(u64) -> bool) {
        self.0.lock().retain(|&(_, id), _| is_member(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acknowledged(id: u64, session: u64, index: u64) -> peer::Acknowledged {
        peer::Acknowledged {
            shard: 0,
            id,
            session,
            index,
        }
    }

    #[test]
    fn a_log_that_ends_before_what_an_earlier_process_acknowledged_has_lost_it() {
        let known = Acknowledged::default();
        known.note(&[acknowledged(2, 7, 100)]);
        known.note(&[acknowledged(2, 7, 90)]);
        assert_eq!(known.lost(2, 8, &[99]), Some((0, 100)));
        assert_eq!(known.lost(2, 8, &[100]), None);
        // It acknowledged more after it had said where its log ends.
        assert_eq!(known.lost(2, 7, &[99]), None);
        assert_eq!(known.lost(3, 8, &[0]), None);
        known.keep_only(|id| id != 2);
        assert_eq!(known.lost(2, 8, &[0]), None);
    }

    #[test]
    fn what_was_heard_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let known = Acknowledged::default();
        known.read(dir.path()).unwrap();
        known.note(&[acknowledged(2, 7, 100), acknowledged(3, 5, 50)]);
        known.write(dir.path()).unwrap();
        let again = Acknowledged::default();
        again.read(dir.path()).unwrap();
        assert_eq!(again.record(), known.record());
        assert_eq!(again.lost(3, 6, &[49]), Some((0, 50)));
    }
}
