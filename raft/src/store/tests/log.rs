//! The log on both engines.

use bytes::Bytes;

use super::{bytes, homes};
use crate::store::{LogBatch, LogMark, LogStore};

/// Puts the indexes `first..=last` of a shard, each with its own number as the entry.
fn fill(log: &dyn LogStore, shard: u32, first: u64, last: u64) {
    let mut batch = LogBatch::default();
    (first..=last).for_each(|index| batch.put(shard, index, Bytes::from(index.to_string())));
    log.write(batch, true).unwrap();
}

fn change(log: &dyn LogStore, change: impl FnOnce(&mut LogBatch)) {
    let mut batch = LogBatch::default();
    change(&mut batch);
    log.write(batch, false).unwrap();
}

fn indexes(log: &dyn LogStore, shard: u32) -> Vec<u64> {
    log.read(shard, 0..u64::MAX, usize::MAX)
        .unwrap()
        .into_iter()
        .map(|(index, _)| index)
        .collect()
}

#[test]
fn changes_of_a_batch_happen_in_their_order() {
    for home in homes() {
        let log = home.stores().open_log().unwrap();
        change(&*log, |batch| {
            (1..=5).for_each(|index| batch.put(0, index, bytes("old")));
            batch.truncate_from(0, 3);
            batch.put(0, 3, bytes("new"));
            batch.purge_to(0, 1);
        });
        assert_eq!(
            log.read(0, 0..10, usize::MAX).unwrap(),
            [(2, bytes("old")), (3, bytes("new"))]
        );
        assert_eq!(log.last(0).unwrap(), Some((3, bytes("new"))));
        assert_eq!(log.bounds(0).unwrap(), Some((2, 3)));
    }
}

#[test]
fn merged_batches_keep_their_order() {
    for home in homes() {
        let log = home.stores().open_log().unwrap();
        let (mut first, mut second) = (LogBatch::default(), LogBatch::default());
        first.put(0, 1, bytes("one"));
        second.truncate_from(0, 1);
        second.put(0, 1, bytes("uno"));
        first.append(second);
        assert_eq!(first.size_bytes(), 6);
        log.write(first, true).unwrap();
        assert_eq!(log.last(0).unwrap(), Some((1, bytes("uno"))));
    }
}

#[test]
fn truncate_removes_the_index_and_all_after_it() {
    for home in homes() {
        let log = home.stores().open_log().unwrap();
        fill(&*log, 1, 5, 9);
        fill(&*log, 2, 1, 3);
        change(&*log, |batch| batch.truncate_from(1, 10));
        assert_eq!(indexes(&*log, 1), [5, 6, 7, 8, 9]);
        change(&*log, |batch| batch.truncate_from(1, 8));
        assert_eq!(indexes(&*log, 1), [5, 6, 7]);
        change(&*log, |batch| batch.truncate_from(1, 0));
        assert_eq!(indexes(&*log, 1), [0; 0]);
        assert_eq!((log.bounds(1).unwrap(), log.last(1).unwrap()), (None, None));
        change(&*log, |batch| batch.truncate_from(1, u64::MAX));
        assert_eq!(indexes(&*log, 2), [1, 2, 3], "another shard was touched");
    }
}

#[test]
fn purge_removes_the_index_and_all_before_it() {
    for home in homes() {
        let log = home.stores().open_log().unwrap();
        fill(&*log, 1, 5, 9);
        fill(&*log, 0, 1, 3);
        fill(&*log, 2, 1, 3);
        change(&*log, |batch| batch.purge_to(1, 4));
        assert_eq!(indexes(&*log, 1), [5, 6, 7, 8, 9]);
        change(&*log, |batch| batch.purge_to(1, 7));
        assert_eq!(
            (indexes(&*log, 1), log.bounds(1).unwrap()),
            (vec![8, 9], Some((8, 9)))
        );
        change(&*log, |batch| batch.purge_to(1, u64::MAX));
        assert_eq!((log.bounds(1).unwrap(), log.last(1).unwrap()), (None, None));
        change(&*log, |batch| batch.purge_to(1, 100));
        assert_eq!(
            (indexes(&*log, 0), indexes(&*log, 2)),
            (vec![1, 2, 3], vec![1, 2, 3]),
            "another shard was touched"
        );

        fill(&*log, 1, 2, 3);
        assert_eq!(
            log.bounds(1).unwrap(),
            Some((2, 3)),
            "a log begun anew below its purge"
        );
        fill(&*log, 1, u64::MAX, u64::MAX);
        assert_eq!(log.bounds(1).unwrap(), Some((2, u64::MAX)));
    }
}

#[test]
fn a_read_is_cut_by_bytes_but_gives_one_entry() {
    for home in homes() {
        let log = home.stores().open_log().unwrap();
        change(&*log, |batch| {
            (1..=4).for_each(|index| batch.put(0, index, bytes("ten bytes!")))
        });
        let count = |range, max_bytes| log.read(0, range, max_bytes).unwrap().len();
        assert_eq!(count(1..5, 0), 1);
        assert_eq!(count(1..5, 10), 1);
        assert_eq!(count(1..5, 11), 2);
        assert_eq!(count(2..4, usize::MAX), 2);
        assert_eq!(count(3..3, usize::MAX), 0);
        #[expect(
            clippy::reversed_empty_ranges,
            reason = "a caller's mistake must not panic"
        )]
        let reversed = 4..2;
        assert_eq!(count(reversed, usize::MAX), 0);
        assert_eq!(count(5..99, 0), 0);
    }
}

#[test]
fn a_log_opened_again_has_its_entries_and_marks() {
    for home in homes() {
        let log = home.stores().open_log().unwrap();
        fill(&*log, 7, 1, 4);
        change(&*log, |batch| {
            batch.purge_to(7, 1);
            batch.set_mark(7, LogMark::Vote, bytes("first"));
            batch.set_mark(7, LogMark::Vote, bytes("vote"));
            batch.set_mark(7, LogMark::Purged, bytes("purged"));
            batch.set_mark(8, LogMark::Committed, bytes("committed"));
        });
        drop(log);

        let log = home.stores().open_log().unwrap();
        assert_eq!(indexes(&*log, 7), [2, 3, 4]);
        assert_eq!(log.mark(7, LogMark::Vote).unwrap(), Some(bytes("vote")));
        assert_eq!(log.mark(7, LogMark::Purged).unwrap(), Some(bytes("purged")));
        assert_eq!(log.mark(7, LogMark::Committed).unwrap(), None);
        assert_eq!(
            log.mark(8, LogMark::Committed).unwrap(),
            Some(bytes("committed"))
        );
        assert!(log.disk_bytes().unwrap() > 0);
    }
}

#[test]
fn marks_outlive_the_entries() {
    for home in homes() {
        let log = home.stores().open_log().unwrap();
        fill(&*log, 0, 1, 4);
        change(&*log, |batch| {
            LogMark::ALL
                .iter()
                .for_each(|mark| batch.set_mark(0, *mark, bytes("kept")))
        });
        change(&*log, |batch| batch.truncate_from(0, 0));
        change(&*log, |batch| batch.purge_to(0, u64::MAX));
        for mark in LogMark::ALL {
            assert_eq!(log.mark(0, mark).unwrap(), Some(bytes("kept")));
        }
    }
}

#[test]
fn a_log_is_open_once() {
    for home in homes() {
        let stores = home.stores();
        let first = stores.open_log().unwrap();
        assert!(stores.open_log().is_err());
        drop(first);
        stores.open_log().unwrap();
    }
}
