//! What this node asked its leader to fetch and got no answer to yet, so that not every reader of a
//! hanging upstream waits anew.
//!
//! Promises bounded memory, and to forget: after a while a reader tries again. Must never know who
//! asked.

use std::{collections::HashMap, time::Duration};

use holdfast_proto::{Key, Revision};
use parking_lot::Mutex;

/// Keys remembered; of more than these every reader waits for itself.
const KEYS_MAX: usize = 10_000;
/// A question without an answer counts for so long. By then the leader has logged the failure, or
/// is gone.
const KEPT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct Asking {
    asked: Mutex<HashMap<Key, Asked>>,
}

struct Asked {
    /// Of the value whose refresh was asked for: another value makes it a question of the past.
    version: Revision,
    /// On the monotonic clock.
    at: Duration,
}

impl Asking {
    /// False if nothing is noted: without a value to give instead, every reader has to wait.
    pub(crate) fn asks(&self, key: &Key, version: Revision, now: Duration) -> bool {
        if version == 0 {
            return false;
        }
        let mut asked = self.asked.lock();
        if let Some(known) = asked.get(key)
            && known.version == version
            && !known.is_over(now)
        {
            return true;
        }
        if asked.len() >= KEYS_MAX {
            asked.retain(|_, known| !known.is_over(now));
        }
        let is_noted = asked.len() < KEYS_MAX;
        if is_noted {
            asked.extend(super::marks::own_key(key).map(|key| (key, Asked { version, at: now })));
        }
        is_noted
    }

    pub(crate) fn answered(&self, key: &Key) {
        self.asked.lock().remove(key);
    }

    /// Since when the refresh of this value is waited for.
    pub(crate) fn since(&self, key: &Key, version: Revision, now: Duration) -> Option<Duration> {
        self.asked
            .lock()
            .get(key)
            .filter(|known| known.version == version && !known.is_over(now))
            .map(|known| known.at)
    }
}

impl Asked {
    fn is_over(&self, now: Duration) -> bool {
        now.saturating_sub(self.at) >= KEPT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn key(n: usize) -> Key {
        Key::new(format!("k{n}")).unwrap()
    }

    #[test]
    fn the_first_question_counts_until_it_is_answered_or_over() {
        let asking = Asking::default();
        assert!(asking.asks(&key(1), 7, SECOND));
        assert!(asking.asks(&key(1), 7, 2 * SECOND));
        assert_eq!(asking.since(&key(1), 7, 3 * SECOND), Some(SECOND));
        assert_eq!(asking.since(&key(1), 8, 3 * SECOND), None);
        assert_eq!(asking.since(&key(1), 7, SECOND + KEPT), None);
        asking.answered(&key(1));
        assert_eq!(asking.since(&key(1), 7, 3 * SECOND), None);
    }

    #[test]
    fn memory_of_questions_is_bounded_and_frees_itself() {
        let asking = Asking::default();
        for n in 0..2 * KEYS_MAX {
            asking.asks(&key(n), 7, SECOND);
        }
        assert_eq!(asking.asked.lock().len(), KEYS_MAX);
        assert!(!asking.asks(&key(KEYS_MAX), 7, SECOND));
        assert!(asking.asks(&key(KEYS_MAX), 7, SECOND + KEPT));
        assert!(!asking.asks(&key(1), 0, SECOND));
    }
}
