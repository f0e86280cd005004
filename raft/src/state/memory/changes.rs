//! What a fill is checked against: one counter for each stripe of keys, raised by every change of
//! what memory says of them. Why: the module's documentation.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

/// Many more than segments, since a change voids the tickets of every key of its stripe. A multiple
/// of any number of segments, so that all keys of a stripe are of one segment.
const STRIPES: usize = 4096;

/// Stands for the moment it was taken at: what is read from the store afterwards may be put while
/// nothing changed since.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FillTicket(u64);

/// Raised under the lock of the key's segment, read without.
pub(super) struct Changes {
    counters: Box<[AtomicU64]>,
    /// Keys are chosen by clients, so the hash is a keyed one made against flooding (SipHash with
    /// random keys, per instance): a fast hash, even a seeded one, promises nothing to somebody who
    /// looks for collisions, and the map probes. A read pays some 10 ns for it.
    hasher: RandomState,
}

impl Changes {
    pub(super) fn new(hasher: RandomState) -> Self {
        Self {
            counters: (0..STRIPES).map(|_| AtomicU64::new(0)).collect(),
            hasher,
        }
    }

    pub(super) fn hash(&self, key: &[u8]) -> u64 {
        self.hasher.hash_one(key)
    }

    pub(super) fn ticket(&self, hash: u64) -> FillTicket {
        FillTicket(self.counters[stripe(hash)].load(Ordering::SeqCst))
    }

    pub(super) fn none_since(&self, hash: u64, ticket: FillTicket) -> bool {
        self.ticket(hash).0 == ticket.0
    }

    pub(super) fn raise(&self, hash: u64) {
        self.counters[stripe(hash)].fetch_add(1, Ordering::SeqCst);
    }
}

pub(super) fn stripe(hash: u64) -> usize {
    (hash % STRIPES as u64) as usize
}
