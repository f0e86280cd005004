//! The log against stores that hang, fail and come back.

use std::ops::Range;

use bytes::Bytes;
use openraft::storage::RaftLogStorageExt;
use parking_lot::Mutex;

use super::*;
use crate::{
    agreement::types::{Commands, CommittedLeaderId, Payload, entry_bytes, log_id_to},
    store::{LogBatch, Lost, Stores},
};

const PATIENCE: Duration = Duration::from_secs(20);
const KEPT: LogKept = LogKept {
    entries: 1_000_000,
    bytes: 64 << 20,
};

/// A store in memory that counts what is written to it without a sync, and whose next read
/// or write may hang.
struct Counting {
    store: Arc<dyn LogStore>,
    unsynced: Mutex<u64>,
    hangs_until: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
    writes_hang_until: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
    /// Bytes of the read that brought the most.
    largest_read: Mutex<usize>,
}

impl LogStore for Counting {
    fn write(&self, batch: LogBatch, sync: bool) -> io::Result<()> {
        *self.unsynced.lock() += u64::from(!sync);
        let hangs_until = self.writes_hang_until.lock().take();
        if let Some(answers) = hangs_until {
            answers.recv_timeout(PATIENCE).map_err(io::Error::other)?;
        }
        self.store.write(batch, sync)
    }

    fn read(
        &self,
        shard: ShardId,
        range: Range<u64>,
        max_bytes: usize,
    ) -> io::Result<Vec<(u64, Bytes)>> {
        let hangs_until = self.hangs_until.lock().take();
        if let Some(answers) = hangs_until {
            answers.recv_timeout(PATIENCE).map_err(io::Error::other)?;
        }
        let rows = self.store.read(shard, range, max_bytes)?;
        let bytes: usize = rows.iter().map(|(_, entry)| entry.len()).sum();
        let mut largest = self.largest_read.lock();
        *largest = bytes.max(*largest);
        Ok(rows)
    }

    fn bounds(&self, shard: ShardId) -> io::Result<Option<(u64, u64)>> {
        self.store.bounds(shard)
    }

    fn last(&self, shard: ShardId) -> io::Result<Option<(u64, Bytes)>> {
        self.store.last(shard)
    }

    fn mark(&self, shard: ShardId, mark: LogMark) -> io::Result<Option<Bytes>> {
        self.store.mark(shard, mark)
    }

    fn lost(&self, shard: ShardId) -> Option<Lost> {
        self.store.lost(shard)
    }

    fn made_good(&self, shard: ShardId) -> io::Result<()> {
        self.store.made_good(shard)
    }

    fn keep_note(&self) -> io::Result<()> {
        self.store.keep_note()
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        self.store.disk_bytes()
    }

    fn compact(&self) -> io::Result<()> {
        self.store.compact()
    }
}

fn counting() -> Arc<Counting> {
    let store: Arc<dyn LogStore> = Stores::memory().open_log().expect("a log");
    Arc::new(Counting {
        store,
        unsynced: Mutex::default(),
        hangs_until: Mutex::default(),
        writes_hang_until: Mutex::default(),
        largest_read: Mutex::default(),
    })
}

fn open(store: &Arc<Counting>) -> SharedLog {
    SharedLog::open(store.clone(), Clock::system(), Arc::new(()))
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term), index)
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    Entry::new(
        log_id(term, index),
        Payload::Normal(Commands(Bytes::from(vec![7; bytes]))),
    )
}

async fn until(reached: impl Fn() -> bool) {
    let reaching = async {
        while !reached() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, reaching)
        .await
        .expect("in time");
}

async fn fill(log: &mut ShardLog, range: Range<u64>, bytes: usize) {
    log.blocking_append(range.map(|index| entry(1, index, bytes)))
        .await
        .expect("appended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_costs_no_write_of_its_own_and_reaches_the_file_soon_and_at_the_end() {
    let store = counting();
    let shared = open(&store);
    let mut log = shared.shard(0).expect("a shard's log");
    let clock = Clock::system();
    for index in 1..200 {
        log.blocking_append([entry(1, index, 10)])
            .await
            .expect("appended");
        log.save_committed(Some(log_id(1, index)))
            .await
            .expect("saved");
        // Not in one group with the next entry.
        until(|| shared.inner.queue.capacity() == QUEUE).await;
    }
    let paused = u64::try_from(clock.monotonic().as_millis()).expect("not so long") / 100;
    assert!(
        *store.unsynced.lock() <= paused,
        "{} writes for committed indexes alone",
        *store.unsynced.lock()
    );

    // Nothing follows: it gets there by itself.
    let there = async {
        while log.read_committed().await.expect("readable") != Some(log_id(1, 199)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, there)
        .await
        .expect("within a moment");

    log.save_committed(Some(log_id(1, 150)))
        .await
        .expect("saved");
    shared.close().await;
    let reopened = open(&store);
    let mut log = reopened.shard(0).expect("a shard's log");
    assert_eq!(
        log.read_committed().await.expect("readable"),
        Some(log_id(1, 150))
    );
    reopened.close().await;
}

/// On one thread: a read on it would stop everything.
#[tokio::test]
async fn a_device_that_hangs_stops_no_other_task() {
    let store = counting();
    let shared = open(&store);
    fill(&mut shared.shard(0).expect("a shard's log"), 1..11, 10).await;
    shared.close().await;
    let shared = open(&store);
    let log = shared.shard(0).expect("a shard's log");

    let (device, answers) = std::sync::mpsc::channel();
    *store.hangs_until.lock() = Some(answers);
    let reading = tokio::spawn(async move { log.entries(1, 11, usize::MAX).await });
    until(|| store.hangs_until.lock().is_none()).await;
    device.send(()).expect("the read waits");
    assert_eq!(reading.await.expect("ran").expect("read").len(), 10);
    shared.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_from_store_and_memory_together_passes_its_bound_by_one_entry_at_most() {
    const ENTRY: usize = 1 << 20;
    let store = counting();
    let shared = open(&store);
    let mut log = shared.shard(0).expect("a shard's log");
    // More than memory holds: the first entries are in the store alone.
    fill(&mut log, 1..101, ENTRY).await;
    let first = log.tail.state.read().first;
    assert!((2..101).contains(&first));

    for max in [1, ENTRY, 3 * ENTRY, 10 * ENTRY, usize::MAX] {
        for start in [first.saturating_sub(8).max(1), first - 1, first] {
            let entries = log.entries(start, 101, max).await.expect("read");
            assert!(!entries.is_empty());
            let indexes: Vec<u64> = entries.iter().map(|entry| entry.log_id().index()).collect();
            assert_eq!(
                indexes,
                (start..start + entries.len() as u64).collect::<Vec<_>>(),
                "without a hole"
            );
            let but_last: usize = entries[..entries.len() - 1].iter().map(entry_bytes).sum();
            assert!(
                but_last < max,
                "{but_last} bytes before the last entry, of {max}"
            );
            if max == usize::MAX {
                assert_eq!(indexes.last(), Some(&100));
            }
        }
    }
    shared.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_large_entries_is_purged_by_its_bytes_after_a_restart_too() {
    const ENTRY: usize = 1 << 20;
    let store = counting();
    let shared = open(&store);
    let mut log = shared.shard(0).expect("a shard's log");
    fill(&mut log, 1..61, ENTRY).await;
    assert!(
        !log.is_worth_purging(log.keep_from(KEPT), KEPT),
        "it holds less than is kept"
    );
    fill(&mut log, 61..121, ENTRY).await;
    let keep_from = log.keep_from(KEPT);
    assert!(
        (50..=57).contains(&keep_from),
        "{keep_from}: 64 of 120 entries stay, and a mark's distance"
    );
    assert!(log.is_worth_purging(keep_from, KEPT));

    // What was there at the start counts.
    shared.close().await;
    let shared = open(&store);
    let mut log = shared.shard(0).expect("a shard's log");
    let keep_from = log.keep_from(KEPT);
    assert!((50..=57).contains(&keep_from), "{keep_from}");
    assert!(log.is_worth_purging(keep_from, KEPT));
    log.purge(log_id(1, keep_from - 1)).await.expect("purged");
    assert_eq!(log.first_index(), keep_from);
    assert!(
        !log.is_worth_purging(log.keep_from(KEPT), KEPT),
        "what went is gone"
    );
    fill(&mut log, 121..141, ENTRY).await;
    assert!(log.is_worth_purging(log.keep_from(KEPT), KEPT));

    // What is taken back weighs nothing.
    log.truncate_after(Some(log_id(1, 121)))
        .await
        .expect("truncated");
    assert!(!log.is_worth_purging(log.keep_from(KEPT), KEPT));
    shared.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_log_is_purged_by_its_entries() {
    let kept = LogKept {
        entries: 800,
        bytes: u64::MAX,
    };
    let store = counting();
    let shared = open(&store);
    let mut log = shared.shard(0).expect("a shard's log");
    fill(&mut log, 0..899, 10).await;
    assert!(
        !log.is_worth_purging(log.keep_from(kept), kept),
        "a purge costs a flush"
    );
    fill(&mut log, 899..900, 10).await;
    assert_eq!(log.keep_from(kept), 100);
    assert!(log.is_worth_purging(100, kept));
    shared.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uncommitted_entries_in_the_place_of_applied_ones_are_removed_at_a_start() {
    let store = counting();
    let shared = open(&store);
    let mut log = shared.shard(0).expect("a shard's log");
    fill(&mut log, 1..11, 10).await;

    for applied in [
        None,
        Some(log_id(1, 5)),
        Some(log_id(1, 10)),
        Some(log_id(2, 11)),
    ] {
        log.heal(applied.as_ref().map(log_id_to))
            .await
            .expect("healed");
        assert_eq!(
            log.get_log_state().await.expect("known").last_log_id,
            Some(log_id(1, 10)),
            "a sound log is left alone"
        );
    }
    // The state has what the next leader committed as the eighth; this node's own tail lost.
    log.heal(Some(log_id_to(&log_id(2, 8))))
        .await
        .expect("healed");
    for reopen in [false, true] {
        if reopen {
            shared.close().await;
            let shared = open(&store);
            log = shared.shard(0).expect("a shard's log");
        }
        let state = log.get_log_state().await.expect("known");
        assert_eq!(
            (state.last_purged_log_id, state.last_log_id),
            (Some(log_id(2, 8)), Some(log_id(2, 8)))
        );
        assert_eq!(store.bounds(0).expect("readable"), None);
    }
    log.blocking_append([entry(2, 9, 10)])
        .await
        .expect("appended");
    assert_eq!(
        log.entries(0, 100, usize::MAX).await.expect("read").len(),
        1
    );
}

/// A sync ends after the log was truncated and filled again by another leader: what the store has
/// by then is what was taken back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_ends_after_a_truncation_gives_up_no_entry_that_is_not_in_the_store() {
    const ENTRY: usize = 1 << 20;
    let store = counting();
    let shared = open(&store);
    let mut log = shared.shard(0).expect("a shard's log");
    fill(&mut log, 1..11, 10).await;

    let (device, answers) = std::sync::mpsc::channel();
    *store.writes_hang_until.lock() = Some(answers);
    let mut appending = log.clone();
    let first = tokio::spawn(async move { fill(&mut appending, 11..21, 10).await });
    until(|| store.writes_hang_until.lock().is_none()).await;
    log.truncate_after(Some(log_id(1, 14)))
        .await
        .expect("truncated");
    // More than memory keeps of what is in the store.
    let mut appending = log.clone();
    let second = tokio::spawn(async move {
        appending
            .blocking_append((15..90).map(|index| entry(2, index, ENTRY)))
            .await
            .expect("appended");
    });
    until(|| log.last_index() == 89).await;
    let (next_device, next_answers) = std::sync::mpsc::channel();
    *store.writes_hang_until.lock() = Some(next_answers);
    device.send(()).expect("the write waits");
    until(|| store.writes_hang_until.lock().is_none()).await;

    let entries = log.entries(15, 21, usize::MAX).await.expect("read");
    let terms: Vec<u64> = entries
        .iter()
        .map(|entry| entry.log_id().committed_leader_id().term)
        .collect();
    assert_eq!(terms, [2; 6], "what was taken back is not read again");
    next_device.send(()).expect("the write waits");
    first.await.expect("ran");
    second.await.expect("ran");
    shared.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_belongs_to_one_node_of_one_cluster() {
    let store = counting();
    let shared = open(&store);
    assert_eq!(shared.owner().expect("readable"), None);
    assert_eq!(shared.claim("a", 1).await.expect("nobody's"), Claim::New);
    shared.close().await;
    let shared = open(&store);
    assert_eq!(shared.claim("a", 1).await.expect("its own"), Claim::Known);
    for (cluster, node) in [("b", 1), ("a", 2)] {
        let refused = shared.claim(cluster, node).await.expect_err("another's");
        assert!(
            refused
                .to_string()
                .contains("belongs to node 1 of cluster a"),
            "{refused}"
        );
    }
    shared.close().await;
}

/// A follower that comes back far behind holds a part of what it lags by, not all of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_to_be_applied_is_read_a_part_at_a_time() {
    const ENTRIES: u64 = 24;
    let store = counting();
    let shared = open(&store);
    fill(
        &mut shared.shard(0).expect("a shard's log"),
        1..ENTRIES + 1,
        1 << 20,
    )
    .await;
    shared.close().await;

    // Another process: nothing of it is in memory.
    let mut log = open(&store).shard(0).expect("a shard's log");
    let entries: Vec<_> = log
        .entries_stream(1..ENTRIES + 1)
        .await
        .map(|entry| entry.expect("reads").log_id().index())
        .collect()
        .await;
    assert_eq!(entries, (1..=ENTRIES).collect::<Vec<_>>());
    let largest = *store.largest_read.lock();
    assert!(
        (1 << 20..=READ_AHEAD_BYTES + (1 << 20)).contains(&largest),
        "{largest} bytes at once"
    );
}
