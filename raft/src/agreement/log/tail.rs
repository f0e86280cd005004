//! The newest entries of a shard, in memory: everything not yet synced, and as much of the rest as
//! fits. And what the log weighs, by index, so that it can be kept to so many bytes.

use std::collections::VecDeque;

use openraft::entry::RaftEntry;
use parking_lot::RwLock;

use crate::agreement::types::{Entry, LogId, Vote, entry_bytes};

/// Synced entries kept in memory for replication and apply.
const TAIL_BYTES: usize = 64 << 20;

pub(super) struct Tail {
    pub(super) state: RwLock<TailState>,
}

pub(super) struct TailState {
    /// Index of `entries[0]`; what is below it is in the store.
    pub(super) first: u64,
    pub(super) entries: VecDeque<Entry>,
    bytes: usize,
    /// Entries below this index are in the store.
    synced_to: u64,
    pub(super) last: Option<LogId>,
    pub(super) purged: Option<LogId>,
    pub(super) vote: Option<Vote>,
    pub(super) weight: Weight,
}

impl Tail {
    pub(super) fn synced(&self, last: Option<LogId>) {
        if let Some(last) = last {
            self.state.write().synced(last);
        }
    }
}

impl TailState {
    /// Nothing in memory, everything in the store.
    pub(super) fn new(
        last: Option<LogId>,
        purged: Option<LogId>,
        vote: Option<Vote>,
        weight: Weight,
    ) -> Self {
        let first = last
            .as_ref()
            .or(purged.as_ref())
            .map_or(0, |id| id.index() + 1);
        Self {
            first,
            entries: VecDeque::new(),
            bytes: 0,
            synced_to: first,
            last,
            purged,
            vote,
            weight,
        }
    }

    pub(super) fn first_index(&self) -> u64 {
        self.purged.as_ref().map_or(0, |purged| purged.index() + 1)
    }

    pub(super) fn push(&mut self, entry: Entry) {
        if self.entries.is_empty() {
            self.first = entry.log_id().index();
        }
        self.weight
            .push(entry.log_id().index(), entry_bytes(&entry) as u64);
        self.bytes += entry_bytes(&entry);
        self.last = Some(entry.log_id());
        self.entries.push_back(entry);
    }

    /// Everything up to `last` is in the store, unless the log was truncated meanwhile and another
    /// entry took its place, or none: what is in the store then is what was taken back.
    fn synced(&mut self, last: LogId) {
        let position = last.index().checked_sub(self.first);
        let entry = position
            .and_then(|position| usize::try_from(position).ok())
            .and_then(|position| self.entries.get(position));
        if entry.is_some_and(|entry| entry.log_id() == last) {
            self.synced_to = self.synced_to.max(last.index() + 1);
            self.trim();
        }
    }

    /// Gives up what is in the store, oldest first, while there is too much.
    fn trim(&mut self) {
        while self.bytes > TAIL_BYTES && self.first < self.synced_to {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.bytes -= entry_bytes(&entry);
            self.first += 1;
        }
    }

    pub(super) fn truncate_from(&mut self, from: u64) {
        while self
            .entries
            .back()
            .is_some_and(|entry| entry.log_id().index() >= from)
        {
            if let Some(entry) = self.entries.pop_back() {
                self.bytes -= entry_bytes(&entry);
                self.weight.pop(entry_bytes(&entry) as u64);
            }
        }
        self.weight.truncate_from(from);
        self.first = self.first.min(from);
        self.synced_to = self.synced_to.min(from);
    }

    pub(super) fn purge_to(&mut self, to: LogId) {
        while self
            .entries
            .front()
            .is_some_and(|entry| entry.log_id().index() <= to.index())
        {
            self.pop_front();
        }
        if self.entries.is_empty() {
            self.first = self.first.max(to.index() + 1);
        }
        if self
            .last
            .as_ref()
            .is_none_or(|last| last.index() <= to.index())
        {
            self.last = Some(to);
        }
        self.weight.purge_to(to.index());
        self.purged = Some(to);
    }
}

/// How many bytes of entries there are before an index, known exactly at some: the marks.
#[derive(Default)]
pub(super) struct Weight {
    /// Of all entries pushed so far, purged ones too.
    total: u64,
    /// Index, and bytes of what is before it. The first is not after the log's first index, as far
    /// as that was ever known.
    marks: VecDeque<(u64, u64)>,
}

/// Entries between two marks, and bytes, whichever comes first.
const MARK_ENTRIES: u64 = 256;
const MARK_BYTES: u64 = 4 << 20;
/// Marks for a log that was there at the start.
const MARKS_AT_START: u64 = 64;

impl Weight {
    /// Of a log that was there at the start, entries `first..end` with so many bytes in all: taken
    /// as evenly spread.
    pub(super) fn of_store(first: u64, end: u64, bytes: u64) -> Self {
        let entries = end - first;
        let steps = MARKS_AT_START.min(entries);
        let part = |whole: u64, step: u64| {
            u64::try_from(u128::from(whole) * u128::from(step) / u128::from(steps))
                .unwrap_or(u64::MAX)
        };
        Self {
            total: bytes,
            marks: (0..steps)
                .map(|step| (first + part(entries, step), part(bytes, step)))
                .collect(),
        }
    }

    fn push(&mut self, index: u64, bytes: u64) {
        let due = |&(marked, before): &(u64, u64)| {
            index - marked >= MARK_ENTRIES || self.total - before >= MARK_BYTES
        };
        if self.marks.back().is_none_or(due) {
            self.marks.push_back((index, self.total));
        }
        self.total += bytes;
    }

    /// The last entry is taken back.
    fn pop(&mut self, bytes: u64) {
        self.total = self.total.saturating_sub(bytes);
    }

    fn truncate_from(&mut self, from: u64) {
        while let Some(&(index, before)) = self.marks.back()
            && index >= from
        {
            // What was taken back in the store alone, without `pop`, goes by the marks.
            self.total = self.total.min(before);
            self.marks.pop_back();
        }
    }

    /// Keeps the mark that tells how much there is before the first index left.
    fn purge_to(&mut self, to: u64) {
        while self.marks.get(1).is_some_and(|&(index, _)| index <= to + 1) {
            self.marks.pop_front();
        }
    }

    /// The first index to keep so that these bytes remain, and a mark's distance more at most.
    pub(super) fn keep_from(&self, bytes: u64) -> u64 {
        let surplus = self.total.saturating_sub(bytes);
        self.marks
            .iter()
            .take_while(|(_, before)| *before <= surplus)
            .last()
            .map_or(0, |&(index, _)| index)
    }

    /// Bytes of the entries `from..to`, to a mark's distance.
    pub(super) fn between(&self, from: u64, to: u64) -> u64 {
        self.before(to).saturating_sub(self.before(from))
    }

    fn before(&self, index: u64) -> u64 {
        let at_most = self
            .marks
            .iter()
            .take_while(|(marked, _)| *marked <= index)
            .last();
        at_most
            .or(self.marks.front())
            .map_or(0, |&(_, before)| before)
    }
}
