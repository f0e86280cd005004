//! Which Raft group owns a key: `slot = xxh3_64(key) mod 4096`, `shard = table[slot]`.

use std::sync::Arc;

/// Slots of the key space; fixed for ever, so that moving a shard never rehashes a key.
pub const SLOTS: u16 = 4096;

pub type ShardId = u32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(pub u16);

impl Slot {
    pub fn of(key: &[u8]) -> Self {
        Self::of_hash(xxhash_rust::xxh3::xxh3_64(key))
    }

    /// Of the key with this xxh3_64.
    pub fn of_hash(hash: u64) -> Self {
        Self((hash % u64::from(SLOTS)) as u16)
    }
}

/// Slot → shard. Until placement exists it is `slot mod shards`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotTable {
    shards: u32,
    table: Arc<[ShardId]>,
}

impl SlotTable {
    pub fn even(shards: u32) -> Self {
        let shards = shards.clamp(1, u32::from(SLOTS));
        Self {
            shards,
            table: (0..SLOTS).map(|slot| u32::from(slot) % shards).collect(),
        }
    }

    pub fn shards(&self) -> u32 {
        self.shards
    }

    pub fn shard_of(&self, key: &[u8]) -> ShardId {
        self.table[usize::from(Slot::of(key).0)]
    }

    /// Of a key that is known by its xxh3_64 only.
    pub fn shard_of_hash(&self, hash: u64) -> ShardId {
        self.table[usize::from(Slot::of_hash(hash).0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hash is on disk and in clients: it may never change.
    #[test]
    fn the_slot_of_a_key_is_frozen() {
        assert_eq!(Slot::of(b"greeting"), Slot(1857));
        assert_eq!(SlotTable::even(1).shard_of(b"greeting"), 0);
        assert_eq!(SlotTable::even(3).shard_of(b"greeting"), 1857 % 3);
    }

    #[test]
    fn every_shard_owns_slots() {
        for shards in [1, 2, 3, 7, 4096] {
            let table = SlotTable::even(shards);
            let owned: std::collections::BTreeSet<_> = table.table.iter().copied().collect();
            assert_eq!(owned, (0..shards).collect());
        }
    }
}
