//! Refreshing ahead: the due index of each shard this node leads, read as time passes.
//!
//! ```text
//! index:   overdue when this node began to lead │ due since
//! read:    once, the read ones over 10 s        │ as their instant comes, each once; the read ones at once
//! ```
//! Promises that a key that was read is refreshed at its refresh point, and one that was not costs
//! one look. Rows that are written behind the cursor are an Invalidate's: the node that took it
//! asks for the refresh. Must never know how a key is fetched.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use holdfast_proto::{Key, timeline::Millis};
use holdfast_raft::Replica;
use tokio::time::MissedTickBehavior;

use super::{Refresher, marks::Hashed, queue::Priority};

const SCAN_EVERY: Duration = Duration::from_millis(50);
/// Rows of one look.
const ROWS: usize = 1_000;
/// More keys that come due in one millisecond are left to their readers.
const ROWS_MAX: usize = 64_000;
/// A new leader spreads what is overdue over this much, …
const SPREAD_MS: Millis = 10_000;
/// … after its followers had the time to report what is read there.
const REPORTS_MS: Millis = 1_200;
/// Overdue keys that wait for their turn; more are left to their readers.
const OVERDUE_MAX: usize = 100_000;

/// A walk through the index, in order of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cursor {
    from: Millis,
    rows: usize,
}

/// What a leader knows of one term.
struct Watch {
    term: u64,
    began: Millis,
    due: Cursor,
    /// Through what was due before; `None` when done.
    overdue: Option<Cursor>,
    /// In order of their turn, once all are there.
    spread: Vec<(Millis, Key)>,
    turns: VecDeque<(Millis, Key)>,
}

impl Cursor {
    fn at(from: Millis) -> Self {
        Self { from, rows: ROWS }
    }

    async fn rows(&self, replica: &Replica, until: Millis) -> io::Result<Vec<(Millis, Key)>> {
        replica.due_for_refresh(self.from, until, self.rows).await
    }

    /// Goes on behind what was read up to `until`. True if there is more up to there.
    fn advance(&mut self, until: Millis, found: &[(Millis, Key)]) -> bool {
        let last = found.last().map_or(self.from, |&(at, _)| at);
        if found.len() < self.rows {
            *self = Self::at(until.saturating_add(1));
            return false;
        }
        // Full: rows of the last instant may be missing, so that it is read again. If it was all
        // one instant, more at once.
        *self = match last > self.from {
            true => Self::at(last),
            false if self.rows < ROWS_MAX => Self {
                from: last,
                rows: self.rows * 4,
            },
            false => Self::at(last.saturating_add(1)),
        };
        true
    }
}

impl Watch {
    fn new(term: u64, now: Millis) -> Self {
        Self {
            term,
            began: now,
            due: Cursor::at(now),
            overdue: Some(Cursor::at(0)),
            spread: Vec::new(),
            turns: VecDeque::new(),
        }
    }

    /// Uniform over what is left of the spread, a key's own in each term.
    fn turn_of(&self, key: &Key) -> Millis {
        self.began + REPORTS_MS + Hashed::spread(key, self.term, SPREAD_MS - REPORTS_MS)
    }
}

impl Refresher {
    pub(super) async fn refresh_due(self: Arc<Self>, replica: Arc<Replica>) {
        let mut every = tokio::time::interval(SCAN_EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watch: Option<Watch> = None;
        loop {
            every.tick().await;
            let Some(term) = replica.leads() else {
                watch = None;
                continue;
            };
            let now = replica.now();
            if watch.as_ref().is_none_or(|watch| watch.term != term) {
                watch = Some(Watch::new(term, now));
            }
            let Some(watch) = &mut watch else { continue };
            if let Err(error) = self.look(&replica, watch, now).await {
                tracing::warn!(%error, shard = replica.shard(), "the due index cannot be read");
            }
        }
    }

    async fn look(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        watch: &mut Watch,
        now: Millis,
    ) -> io::Result<()> {
        // A clock that was set back: what comes due again is looked at again.
        watch.due.from = watch.due.from.min(now.saturating_add(1));
        let mut more = watch.due.from <= now;
        while more {
            let due = watch.due.rows(replica, now).await?;
            more = watch.due.advance(now, &due);
            due.iter().for_each(|(_, key)| self.refresh_if_read(key));
        }
        if now >= watch.began + REPORTS_MS {
            self.look_at_overdue(replica, watch).await?;
        }
        while watch.turns.front().is_some_and(|&(at, _)| at <= now) {
            if let Some((_, key)) = watch.turns.pop_front() {
                self.refresh_if_read(&key);
            }
        }
        Ok(())
    }

    /// One part of what was overdue a look, so that what comes due meanwhile is not late.
    async fn look_at_overdue(&self, replica: &Arc<Replica>, watch: &mut Watch) -> io::Result<()> {
        let Some(mut cursor) = watch.overdue else {
            return Ok(());
        };
        cursor.rows = cursor.rows.max(10 * ROWS);
        let until = watch.began.saturating_sub(1);
        let overdue = cursor.rows(replica, until).await?;
        let more = cursor.advance(until, &overdue);
        for (_, key) in overdue {
            if watch.spread.len() < OVERDUE_MAX && self.marks.is_marked(Hashed::of(&key)) {
                watch.spread.push((watch.turn_of(&key), key));
            }
        }
        watch.overdue = more.then_some(cursor);
        if !more {
            watch.spread.sort_unstable();
            watch.turns = std::mem::take(&mut watch.spread).into();
        }
        Ok(())
    }

    fn refresh_if_read(self: &Arc<Self>, key: &Key) {
        if self.marks.take(Hashed::of(key)) {
            self.ask(key, Priority::Due);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Reads an index as the scan does and counts how often each key is seen.
    fn walk(index: &[(Millis, Key)], until: Millis) -> (BTreeMap<Key, usize>, Cursor) {
        let mut cursor = Cursor::at(0);
        let mut seen = BTreeMap::new();
        for _ in 0..10_000 {
            let found: Vec<_> = index
                .iter()
                .filter(|(at, _)| (cursor.from..=until).contains(at))
                .take(cursor.rows)
                .cloned()
                .collect();
            found
                .iter()
                .for_each(|(_, key)| *seen.entry(key.clone()).or_default() += 1);
            if !cursor.advance(until, &found) {
                return (seen, cursor);
            }
        }
        panic!("the cursor does not come to an end");
    }

    fn key(n: u64) -> Key {
        Key::new(format!("k{n:06}")).unwrap()
    }

    #[test]
    fn every_row_is_looked_at_and_the_cursor_goes_on_behind_it() {
        let index: Vec<_> = (0..10_000).map(|n| (n, key(n))).collect();
        let (seen, cursor) = walk(&index, 7_999);
        assert_eq!(seen.len(), 8_000);
        assert_eq!(cursor, Cursor::at(8_000));
    }

    #[test]
    fn rows_of_one_instant_that_do_not_fit_a_look_are_not_lost() {
        let index: Vec<_> = (0..5_000)
            .map(|n| (7, key(n)))
            .chain([(8, key(5_000))])
            .collect();
        let (seen, cursor) = walk(&index, 10);
        assert_eq!(seen.len(), 5_001);
        assert_eq!(cursor, Cursor::at(11));
    }

    #[test]
    fn an_unread_key_is_looked_at_once_per_refresh_point() {
        let index: Vec<_> = (0..100).map(|n| (n, key(n))).collect();
        let mut cursor = Cursor::at(0);
        let mut looks = 0;
        for until in (0..200).step_by(10) {
            let found: Vec<_> = index
                .iter()
                .filter(|(at, _)| (cursor.from..=until).contains(at))
                .cloned()
                .collect();
            looks += found.len();
            assert!(!cursor.advance(until, &found));
        }
        assert_eq!(looks, 100);
    }

    #[test]
    fn overdue_keys_are_spread_evenly_over_what_is_left_of_ten_seconds() {
        let watch = Watch::new(3, 1_000_000);
        let mut seconds = [0; 10];
        for n in 0..10_000 {
            let after = watch.turn_of(&key(n)) - watch.began;
            assert!((REPORTS_MS..SPREAD_MS).contains(&after));
            seconds[after as usize / 1_000] += 1;
        }
        assert_eq!(seconds[0], 0);
        assert!(
            seconds[2..].iter().all(|&n| (900..1_400).contains(&n)),
            "{seconds:?}"
        );
        assert_ne!(
            Watch::new(4, 1_000_000).turn_of(&key(1)),
            watch.turn_of(&key(1))
        );
    }
}
