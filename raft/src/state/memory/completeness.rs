//! Whether memory has everything that the store has: what makes a look-up that finds nothing
//! certain.
//!
//! ```text
//!            every entry loaded                     something evicted or refused
//! loading ──────────────────────► complete ──────────────────────────────────────► lost
//!    │                                                                              ▲   each `restart` begins a new
//!    └──────────────── something evicted or refused ────────────────────────────────┘   generation in loading
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

const COMPLETE: u64 = 1;
const LOST: u64 = 2;
const GENERATION: u64 = 4;

/// One word: both flags, and above them the generation.
#[derive(Default)]
pub(super) struct Completeness(AtomicU64);

/// What a reader saw before its look-up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Observed(u64);

impl Completeness {
    pub(super) fn observe(&self) -> Observed {
        Observed(self.0.load(Ordering::SeqCst))
    }

    /// Complete before and now, in one generation: so it was at the moment between in which a
    /// look-up found nothing. Asking only afterwards is not enough, since the key may have been
    /// loaded and memory declared complete in between; asking only before neither, since the key
    /// may have been evicted in between.
    pub(super) fn held_since(&self, before: Observed) -> bool {
        before.is_complete() && before == self.observe()
    }

    pub(super) fn generation(&self) -> u64 {
        self.observe().0 / GENERATION
    }

    /// Every entry was loaded in this generation. Returns whether memory is complete.
    pub(super) fn complete(&self, generation: u64) -> bool {
        let loading = generation * GENERATION;
        let result = self.0.compare_exchange(
            loading,
            loading | COMPLETE,
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        result.is_ok() || result == Err(loading | COMPLETE)
    }

    /// The store has, or will have in a moment, what memory has not. Call it before the map shows
    /// so, and under a segment's lock, so that it cannot hit the generation after.
    pub(super) fn lose(&self) {
        // Eviction does this each time: a word that readers share is written only if it changes.
        if self.observe().0 & LOST == 0 {
            self.0.fetch_or(LOST, Ordering::SeqCst);
        }
    }

    /// A new generation, loading. Call it under all locks.
    pub(super) fn restart(&self) {
        self.0
            .store((self.generation() + 1) * GENERATION, Ordering::SeqCst);
    }
}

impl Observed {
    pub(super) fn is_complete(self) -> bool {
        self.0 % GENERATION == COMPLETE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_only_after_an_unbroken_load_of_the_same_generation() {
        let completeness = Completeness::default();
        assert!(!completeness.observe().is_complete());
        let first = completeness.generation();
        assert!(completeness.complete(first) && completeness.complete(first));
        let complete = completeness.observe();
        assert!(completeness.held_since(complete));

        completeness.lose();
        assert!(!completeness.held_since(complete));
        assert!(!completeness.complete(first), "lost stays lost");

        completeness.restart();
        assert!(
            !completeness.complete(first),
            "an older pass says nothing of the new state"
        );
        assert!(!completeness.held_since(complete));
        assert!(completeness.complete(completeness.generation()));
        assert!(
            !completeness.held_since(complete),
            "complete again is not complete all along"
        );
    }
}
