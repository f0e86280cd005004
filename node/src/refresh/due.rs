//! Refreshing ahead: the due index of each shard this node leads, read as time passes.
//!
//! ```text
//! index:   overdue when this node began to lead │ due since
//! read:    once, the read ones over 10 s        │ as their instant comes, each once; the read ones at once
//! ```
//! Promises that a key that was read since its last refresh is refreshed at its refresh point, and
//! one that was not costs one look; that a look is bounded, however much is overdue. Rows that are
//! written behind the cursor are an Invalidate's: the node that took it asks for the refresh. Must
//! never know how a key is fetched.

use std::{cmp::Reverse, collections::BinaryHeap, io, sync::Arc, time::Duration};

use holdfast_proto::{Key, timeline::Millis};
use holdfast_raft::{InMemory, Replica};
use tokio::time::MissedTickBehavior;

use super::{Refresher, backlog::DueBacklog, marks::Hashed, queue::Priority};

const SCAN_EVERY: Duration = Duration::from_millis(50);
/// Rows of one read, and of what is due of one look.
const ROWS: usize = 1_000;
const ROWS_A_LOOK: usize = 64_000;
/// Rows of what was overdue of one look.
const OVERDUE_A_LOOK: usize = 10_000;
/// More keys that come due in one millisecond are left to their readers.
const ROWS_MAX: usize = 64_000;
/// A new leader spreads what is overdue over this much, …
const SPREAD_MS: Millis = 10_000;
/// … after its followers had the time to report what was read before.
const REPORTS_MS: Millis = 600;
/// What is found after its turn, because there is so much of it, is spread over this.
const LATE_SPREAD_MS: Millis = 1_000;
/// Overdue keys that wait for their turn; more are left to their readers.
const OVERDUE_MAX: usize = 100_000;
/// Turns of one look: 10,000 a second.
const TURNS_A_LOOK: usize = 500;

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
    /// What was found there, the next turn first.
    turns: BinaryHeap<Reverse<(Millis, Key)>>,
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
            turns: BinaryHeap::new(),
        }
    }

    /// Uniform over what is left of the spread, a key's own in each term.
    fn turn_of(&self, key: &Key, now: Millis) -> Millis {
        let turn = self.began + REPORTS_MS + Hashed::spread(key, self.term, SPREAD_MS - REPORTS_MS);
        match turn > now {
            true => turn,
            false => now + Hashed::spread(key, self.term, LATE_SPREAD_MS),
        }
    }

    fn found_overdue(&mut self, key: Key, now: Millis) {
        if self.turns.len() < OVERDUE_MAX {
            let turn = self.turn_of(&key, now);
            self.turns.push(Reverse((turn, key)));
        }
    }

    fn backlog(&self, now: Millis) -> DueBacklog {
        DueBacklog {
            overdue: self.turns.len(),
            behind_ms: now.saturating_sub(self.due.from),
        }
    }

    /// Whose turn it is, as many as one look takes.
    fn next_turns(&mut self, now: Millis) -> Vec<Key> {
        let mut next = Vec::new();
        while next.len() < TURNS_A_LOOK
            && self.turns.peek().is_some_and(|Reverse((at, _))| *at <= now)
        {
            next.extend(self.turns.pop().map(|Reverse((_, key))| key));
        }
        next
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
                self.set_due_backlog(replica.shard(), None);
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
            self.set_due_backlog(replica.shard(), Some(watch.backlog(now)));
        }
    }

    async fn look(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        watch: &mut Watch,
        now: Millis,
    ) -> io::Result<()> {
        if now < watch.began + REPORTS_MS {
            return Ok(());
        }
        // A clock that was set back: what comes due again is looked at again.
        watch.due.from = watch.due.from.min(now.saturating_add(1));
        let (mut more, mut looked_at) = (watch.due.from <= now, 0);
        while more && looked_at < ROWS_A_LOOK {
            let due = watch.due.rows(replica, now).await?;
            more = watch.due.advance(now, &due);
            looked_at += due.len();
            let read = due.iter().filter(|(_, key)| self.is_read(replica, key));
            read.for_each(|(_, key)| self.ask(key, Priority::Due));
        }
        self.look_at_overdue(replica, watch, now).await?;
        for key in watch.next_turns(now) {
            self.ask(&key, Priority::Due);
        }
        Ok(())
    }

    /// One part of what was overdue a look, so that what comes due meanwhile is not late.
    async fn look_at_overdue(
        &self,
        replica: &Arc<Replica>,
        watch: &mut Watch,
        now: Millis,
    ) -> io::Result<()> {
        let Some(mut cursor) = watch.overdue else {
            return Ok(());
        };
        cursor.rows = cursor.rows.max(OVERDUE_A_LOOK);
        let until = watch.began.saturating_sub(1);
        let overdue = cursor.rows(replica, until).await?;
        let more = cursor.advance(until, &overdue);
        for (_, key) in overdue {
            if self.is_read(replica, &key) {
                watch.found_overdue(key, now);
            }
        }
        watch.overdue = more.then_some(cursor);
        Ok(())
    }

    /// Whether the key was read since its last refresh.
    fn is_read(&self, replica: &Replica, key: &Key) -> bool {
        let Some(read_at) = self.marks.read_at(Hashed::of(key)) else {
            return false;
        };
        match replica.in_memory(key) {
            // A read in the millisecond of the fetch counts: lost, it would cost its readers a stale
            // answer; one more refresh costs little.
            InMemory::Found(view) => read_at >= view.timeline().fetched_at,
            InMemory::Absent => false,
            // The flight looks at what is on disk.
            InMemory::Unknown => true,
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
            let after = watch.turn_of(&key(n), watch.began) - watch.began;
            assert!((REPORTS_MS..SPREAD_MS).contains(&after));
            seconds[after as usize / 1_000] += 1;
        }
        assert!(seconds[0] < 600, "{seconds:?}");
        assert!(
            seconds[1..].iter().all(|&n| (900..1_400).contains(&n)),
            "{seconds:?}"
        );
        assert_ne!(
            Watch::new(4, 1_000_000).turn_of(&key(1), 1_000_000),
            watch.turn_of(&key(1), 1_000_000)
        );
    }

    #[test]
    fn what_is_found_late_is_spread_too_and_a_look_takes_a_bounded_part() {
        let mut watch = Watch::new(3, 1_000_000);
        let late = watch.began + 60_000;
        (0..2 * OVERDUE_MAX as u64).for_each(|n| watch.found_overdue(key(n), late));
        assert_eq!(watch.turns.len(), OVERDUE_MAX);
        let (mut looks, mut taken) = (0, 0);
        for look in 0..1_000 {
            let turns = watch.next_turns(late + look * 50).len();
            assert!(turns <= TURNS_A_LOOK);
            looks += u64::from(turns > 0);
            taken += turns;
        }
        assert_eq!(taken, OVERDUE_MAX);
        assert!((200..=201).contains(&looks), "{looks}");
    }
}
