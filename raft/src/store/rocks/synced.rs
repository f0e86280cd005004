//! What the log had on disk when it last said so, kept in a second place: `log/SYNCED`. A log that
//! opens with less has lost what it acknowledged, and that stays noted until it is made good.
//!
//! ```text
//! slot 0 at 0, slot 1 at 64 KiB, written in turn; the newest whole one counts
//! slot   checksum u64 · format u8 · serial u64 · shards u32 · shard…      integers little-endian
//! shard  number u32 · sequence u64 · last index u64 · lost u64 · vote's length u8 · vote, 64 bytes
//! ```
//! `sequence` is RocksDB's number of the shard's last synced change: it only grows, over truncations
//! and purges too, so one comparison at a start tells. The mark is written after each sync of the
//! log and before anybody hears of it, without a sync of its own: a kill loses nothing of it, and a
//! power loss leaves an older one, which is true as well and only tells less. It is synced now and
//! then ([`Synced::handle`]). A mark newer than the log's own sync is impossible, so it never accuses
//! a sound log. A lost vote is given back from here: a node that forgot it could vote twice in a
//! term. Must never know what a change means.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use holdfast_proto::ShardId;
use xxhash_rust::xxh3::xxh3_64;

use crate::store::{Lost, durable};

const FILE: &str = "SYNCED";
const FORMAT: u8 = 1;
const SLOT_BYTES: u64 = 64 << 10;
const HEAD_BYTES: usize = 21;
const SHARD_BYTES: usize = 93;
const VOTE_BYTES_MAX: usize = 64;
/// Stands for no index.
const NONE: u64 = u64::MAX;

pub(super) struct Synced {
    file: File,
    path: PathBuf,
    serial: u64,
    shards: BTreeMap<ShardId, Mark>,
}

/// What a sync made durable of one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) last_index: Option<u64>,
    /// The vote's record, if it changed.
    pub(super) vote: Option<Bytes>,
}

/// What is known of one shard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Mark {
    sequence: u64,
    last_index: Option<u64>,
    vote: Bytes,
    /// The last index that was acknowledged when a loss was found.
    lost: Option<u64>,
}

impl Synced {
    /// `log_exists` says whether there is a log already: one without its mark is half a directory.
    pub(super) fn open(directory: &Path, log_exists: bool) -> io::Result<Self> {
        let path = directory.join(FILE);
        if !path.exists() {
            if log_exists {
                let message = format!(
                    "{} is missing beside a log: what the log had acknowledged cannot be told. Restore this node's data whole, or remove it and let the node join again",
                    path.display()
                );
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            durable::replace_file(&path, &blank())?;
        }
        let file = File::options().read(true).write(true).open(&path);
        let file = file.map_err(|error| durable::named(error, "open", &path))?;
        let (serial, shards) = newest(&file)
            .map_err(|error| durable::named(error, "read", &path))?
            .ok_or_else(|| {
                let message = format!(
                    "{} is damaged: what the log had acknowledged cannot be told. Remove this node's data and let it join again",
                    path.display()
                );
                io::Error::new(io::ErrorKind::InvalidData, message)
            })?;
        Ok(Self {
            file,
            path,
            serial,
            shards,
        })
    }

    /// Compares with what the log holds now: its last sequence number. Notes what is lost, durably,
    /// before anything is written that would hide it. Answers the votes of the shards that lost
    /// something: they are to be written again.
    pub(super) fn compare(&mut self, sequence: u64) -> io::Result<Vec<(ShardId, Bytes)>> {
        let mut votes = Vec::new();
        for (shard, mark) in &mut self.shards {
            if mark.sequence > sequence {
                mark.lost = mark.lost.max(Some(mark.last_index.unwrap_or(0)));
                votes.push((*shard, mark.vote.clone()));
            }
        }
        if !votes.is_empty() {
            self.write()?;
            self.sync()?;
        }
        votes.retain(|(_, vote)| !vote.is_empty());
        Ok(votes)
    }

    /// These shards' changes up to `sequence` are on disk.
    pub(super) fn advance(
        &mut self,
        sequence: u64,
        changed: impl IntoIterator<Item = (ShardId, Changed)>,
    ) -> io::Result<()> {
        for (shard, Changed { last_index, vote }) in changed {
            let mark = self.shards.entry(shard).or_default();
            mark.sequence = sequence;
            mark.last_index = last_index;
            if let Some(vote) = vote {
                if vote.len() > VOTE_BYTES_MAX {
                    return Err(io::Error::other("a vote's record is over its bound"));
                }
                mark.vote = vote;
            }
        }
        self.write()
    }

    pub(super) fn lost(&self, shard: ShardId) -> Option<Lost> {
        let acknowledged = self.shards.get(&shard)?.lost?;
        Some(Lost { acknowledged })
    }

    /// What was lost is there again, or is nobody's any more.
    pub(super) fn made_good(&mut self, shard: ShardId) -> io::Result<()> {
        match self.shards.get_mut(&shard) {
            Some(mark) if mark.lost.is_some() => mark.lost = None,
            _ => return Ok(()),
        }
        self.write()?;
        self.sync()
    }

    /// A handle whose sync makes the mark durable without holding anybody up.
    pub(super) fn handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    fn sync(&self) -> io::Result<()> {
        self.file
            .sync_data()
            .map_err(|error| durable::named(error, "sync", &self.path))
    }

    fn write(&mut self) -> io::Result<()> {
        self.serial += 1;
        let slot = encode(self.serial, &self.shards);
        self.file
            .write_all_at(&slot, (self.serial % 2) * SLOT_BYTES)
            .map_err(|error| durable::named(error, "write", &self.path))
    }
}

/// Two slots that know nothing, with all the room they will take.
fn blank() -> Vec<u8> {
    let mut blank = vec![0; 2 * SLOT_BYTES as usize];
    let slot = encode(0, &BTreeMap::new());
    blank[..slot.len()].copy_from_slice(&slot);
    blank
}

fn encode(serial: u64, shards: &BTreeMap<ShardId, Mark>) -> Vec<u8> {
    let mut slot = vec![0; 8];
    slot.push(FORMAT);
    slot.extend(serial.to_le_bytes());
    slot.extend(
        u32::try_from(shards.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    for (shard, mark) in shards {
        slot.extend(shard.to_le_bytes());
        slot.extend(mark.sequence.to_le_bytes());
        slot.extend(mark.last_index.unwrap_or(NONE).to_le_bytes());
        slot.extend(mark.lost.unwrap_or(NONE).to_le_bytes());
        let vote = &mark.vote;
        slot.push(u8::try_from(vote.len()).unwrap_or(0));
        slot.extend(vote);
        slot.resize(slot.len() + VOTE_BYTES_MAX - vote.len(), 0);
    }
    let checksum = xxh3_64(&slot[8..]).to_le_bytes();
    slot[..8].copy_from_slice(&checksum);
    slot
}

type Slot = (u64, BTreeMap<ShardId, Mark>);

/// The slot that counts; `None` if neither is whole.
fn newest(file: &File) -> io::Result<Option<Slot>> {
    let mut slots = Vec::new();
    for number in 0..2 {
        let mut slot = vec![0; SLOT_BYTES as usize];
        match file.read_exact_at(&mut slot, number * SLOT_BYTES) {
            Ok(()) => slots.extend(decode(&slot)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
    }
    Ok(slots.into_iter().max_by_key(|(serial, _)| *serial))
}

fn decode(slot: &[u8]) -> Option<Slot> {
    let count = usize::try_from(u32::from_le_bytes(*slot[17..].first_chunk()?)).ok()?;
    let length = count.checked_mul(SHARD_BYTES)?.checked_add(HEAD_BYTES)?;
    let whole = slot.get(..length)?;
    let checksum = u64::from_le_bytes(*whole.first_chunk()?);
    if whole[8] != FORMAT || checksum != xxh3_64(&whole[8..]) {
        return None;
    }
    let index = |number: u64| (number != NONE).then_some(number);
    let number = |at: &[u8]| Some(u64::from_le_bytes(*at.first_chunk()?));
    let shards = whole[HEAD_BYTES..].chunks_exact(SHARD_BYTES).map(|shard| {
        let vote = shard[29..].get(..usize::from(shard[28]))?;
        let mark = Mark {
            sequence: number(&shard[4..])?,
            last_index: index(number(&shard[12..])?),
            vote: Bytes::copy_from_slice(vote),
            lost: index(number(&shard[20..])?),
        };
        Some((u32::from_le_bytes(*shard.first_chunk()?), mark))
    });
    Some((number(&whole[9..])?, shards.collect::<Option<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reopened(home: &Path) -> Synced {
        Synced::open(home, true).unwrap()
    }

    fn at(last_index: u64) -> Changed {
        Changed {
            last_index: Some(last_index),
            vote: None,
        }
    }

    #[test]
    fn a_log_that_holds_less_than_it_acknowledged_is_told_and_stays_told_until_it_is_made_good() {
        let home = tempfile::tempdir().unwrap();
        let mut synced = Synced::open(home.path(), false).unwrap();
        let vote = Bytes::from_static(b"a vote");
        let voted = Changed {
            vote: Some(vote.clone()),
            ..at(6)
        };
        synced.advance(10, [(0, at(4)), (1, voted)]).unwrap();
        synced.advance(12, [(1, at(7))]).unwrap();

        let mut synced = reopened(home.path());
        assert_eq!(synced.compare(12).unwrap(), []);
        assert_eq!(
            (synced.lost(0), synced.lost(1)),
            (None, None),
            "all is there"
        );
        let mut synced = reopened(home.path());
        assert_eq!(synced.compare(11).unwrap(), [(1, vote)]);
        assert_eq!(synced.lost(0), None, "the other shard lost nothing");
        assert_eq!(synced.lost(1), Some(Lost { acknowledged: 7 }));

        synced.advance(20, [(1, at(3))]).unwrap();
        let mut synced = reopened(home.path());
        assert_eq!(synced.compare(20).unwrap(), []);
        assert_eq!(
            synced.lost(1),
            Some(Lost { acknowledged: 7 }),
            "writes do not hide it"
        );
        synced.made_good(1).unwrap();
        assert_eq!(reopened(home.path()).lost(1), None);
    }

    #[test]
    fn a_torn_slot_leaves_the_one_before() {
        let home = tempfile::tempdir().unwrap();
        let mut synced = Synced::open(home.path(), false).unwrap();
        synced.advance(10, [(0, at(1))]).unwrap();
        synced.advance(11, [(0, at(2))]).unwrap();
        let newest = (synced.serial % 2) * SLOT_BYTES;
        synced.file.write_all_at(&[0xFF; 30], newest).unwrap();

        let mut synced = reopened(home.path());
        synced.compare(9).unwrap();
        assert_eq!(synced.lost(0), Some(Lost { acknowledged: 1 }));

        synced.file.write_all_at(&[0xFF; 30], 0).unwrap();
        synced.file.write_all_at(&[0xFF; 30], SLOT_BYTES).unwrap();
        let said = Synced::open(home.path(), true).map(|_| ()).unwrap_err();
        assert!(said.to_string().contains("damaged"), "{said}");
    }

    #[test]
    fn a_log_without_its_mark_does_not_open() {
        let home = tempfile::tempdir().unwrap();
        assert!(Synced::open(home.path(), true).is_err());
    }
}
