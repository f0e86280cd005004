//! What only a disk can break: torn files, crashes between steps, and a database whose directory is
//! replaced under its readers.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use tempfile::TempDir;

use super::RocksDisk;
use crate::store::{Budget, Family, LogBatch, LogMark, LogStore, Lost, StateBatch, StateStore};

fn disk(at: &Path) -> RocksDisk {
    RocksDisk::new(at, Budget::default()).unwrap()
}

/// The files as a kill -9 at this moment leaves them: what a process has in its memory is not among
/// them.
fn crash(data_dir: &Path) -> TempDir {
    let image = tempfile::tempdir().unwrap();
    copy(data_dir, image.path());
    image
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&target).unwrap();
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

fn entry(index: u64, size_bytes: usize) -> Bytes {
    let word = index.to_be_bytes();
    word.iter().copied().cycle().take(size_bytes).collect()
}

fn put_log(log: &dyn LogStore, first: u64, last: u64, size_bytes: usize) {
    for index in first..=last {
        let mut batch = LogBatch::default();
        batch.put(0, index, entry(index, size_bytes));
        log.write(batch, index == last).unwrap();
    }
}

fn put_everywhere(state: &dyn StateStore, value: &'static str) {
    let mut batch = StateBatch::default();
    Family::ALL
        .iter()
        .for_each(|family| batch.put(*family, "key", value));
    state.write(batch).unwrap();
}

fn everywhere(state: &dyn StateStore) -> Vec<Option<Bytes>> {
    Family::ALL
        .iter()
        .map(|family| state.get(*family, b"key").unwrap())
        .collect()
}

#[test]
fn a_kill_keeps_the_synced_log_and_the_flushed_state() {
    let home = tempfile::tempdir().unwrap();
    let disk_before = disk(home.path());
    let (log, state) = (
        disk_before.open_log().unwrap(),
        disk_before.open_state(0).unwrap(),
    );
    put_log(&*log, 1, 3, 10);
    let mut batch = LogBatch::default();
    batch.set_mark(0, LogMark::Vote, Bytes::from_static(b"vote"));
    batch.purge_to(0, 1);
    log.write(batch, true).unwrap();
    put_everywhere(&*state, "flushed");
    state.flush().unwrap();
    put_everywhere(&*state, "written");

    let image = crash(home.path());
    let disk_after = disk(image.path());
    let log = disk_after.open_log().unwrap();
    assert_eq!(log.bounds(0).unwrap(), Some((2, 3)));
    assert_eq!(
        log.mark(0, LogMark::Vote).unwrap(),
        Some(Bytes::from_static(b"vote"))
    );
    let state = disk_after.open_state(0).unwrap();
    assert_eq!(
        everywhere(&*state),
        vec![Some(Bytes::from_static(b"flushed")); Family::ALL.len()]
    );
}

fn wal(data_dir: &Path) -> std::path::PathBuf {
    let files = fs::read_dir(data_dir.join("log"))
        .unwrap()
        .map(|file| file.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.max_by_key(|path| path.metadata().unwrap().len())
        .unwrap()
}

#[test]
fn a_torn_tail_of_the_log_is_cut_off() {
    let home = tempfile::tempdir().unwrap();
    let disk_before = disk(home.path());
    let log = disk_before.open_log().unwrap();
    put_log(&*log, 1, 100, 1000);

    let image = crash(home.path());
    let wal = wal(image.path());
    let torn = fs::File::options().write(true).open(&wal).unwrap();
    torn.set_len(wal.metadata().unwrap().len() - 500).unwrap();
    drop(torn);

    let log = disk(image.path()).open_log().unwrap();
    assert_eq!(log.last(0).unwrap(), Some((99, entry(99, 1000))));
    assert_eq!(log.lost(0), Some(Lost { acknowledged: 100 }));
    put_log(&*log, 100, 101, 10);
    assert_eq!(log.bounds(0).unwrap(), Some((1, 101)));
}

/// A crash leaves no such thing, wherever it is: in the length of the last record too.
#[test]
fn a_flipped_bit_in_the_last_records_of_the_log_is_damage() {
    let home = tempfile::tempdir().unwrap();
    let disk_before = disk(home.path());
    let log = disk_before.open_log().unwrap();
    put_log(&*log, 1, 40, 300);

    let image = crash(home.path());
    let wal = wal(image.path());
    let good = fs::read(&wal).unwrap();
    for at in good.len() - 800..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&wal, &damaged).unwrap();
        let said = disk(image.path()).open_log().map(|_| ()).unwrap_err();
        assert_eq!(
            said.kind(),
            std::io::ErrorKind::InvalidData,
            "byte {at}: {said}"
        );
        assert!(said.to_string().contains("is damaged at byte"), "{said}");
    }
    fs::write(&wal, good).unwrap();
    let log = disk(image.path()).open_log().unwrap();
    assert_eq!(log.last(0).unwrap(), Some((40, entry(40, 300))));
    assert_eq!(log.lost(0), None);
}

#[test]
fn a_log_that_lost_what_it_had_acknowledged_says_so_and_has_its_vote_again() {
    let home = tempfile::tempdir().unwrap();
    let disk_before = disk(home.path());
    let log = disk_before.open_log().unwrap();
    put_log(&*log, 1, 50, 300);
    let mut batch = LogBatch::default();
    batch.put(1, 1, entry(1, 10));
    log.write(batch, true).unwrap();
    put_log(&*log, 51, 60, 300);
    let mut batch = LogBatch::default();
    batch.set_mark(0, LogMark::Vote, Bytes::from_static(b"the last vote"));
    log.write(batch, true).unwrap();

    let image = crash(home.path());
    let wal = wal(image.path());
    let cut = fs::File::options().write(true).open(&wal).unwrap();
    cut.set_len(wal.metadata().unwrap().len() - 1).unwrap();
    drop(cut);
    for _ in 0..2 {
        let log = disk(image.path()).open_log().unwrap();
        assert_eq!(log.lost(0), Some(Lost { acknowledged: 60 }));
        assert_eq!(log.lost(1), None, "the other shard lost nothing");
        let vote = log.mark(0, LogMark::Vote).unwrap();
        assert_eq!(vote, Some(Bytes::from_static(b"the last vote")));
        // What is written from here on does not hide it.
        put_log(&*log, 61, 70, 10);
    }
    let log = disk(image.path()).open_log().unwrap();
    log.made_good(0).unwrap();
    drop(log);
    assert_eq!(disk(image.path()).open_log().unwrap().lost(0), None);
}

#[test]
fn what_was_never_synced_is_not_missed() {
    let home = tempfile::tempdir().unwrap();
    let disk_before = disk(home.path());
    let log = disk_before.open_log().unwrap();
    put_log(&*log, 1, 50, 300);
    let synced = wal(home.path()).metadata().unwrap().len();
    let mut batch = LogBatch::default();
    batch.set_mark(0, LogMark::Committed, Bytes::from_static(b"50"));
    log.write(batch, false).unwrap();

    let image = crash(home.path());
    let cut = fs::File::options()
        .write(true)
        .open(wal(image.path()))
        .unwrap();
    cut.set_len(synced + 3).unwrap();
    drop(cut);
    let log = disk(image.path()).open_log().unwrap();
    assert_eq!(log.lost(0), None);
    assert_eq!(log.last(0).unwrap(), Some((50, entry(50, 300))));
}

#[test]
fn a_log_whose_files_are_gone_has_lost_them() {
    let home = tempfile::tempdir().unwrap();
    let log = disk(home.path()).open_log().unwrap();
    put_log(&*log, 1, 50, 300);
    drop(log);
    for file in fs::read_dir(home.path().join("log")).unwrap() {
        let path = file.unwrap().path();
        if !path.ends_with("SYNCED") {
            fs::remove_file(path).unwrap();
        }
    }
    let log = disk(home.path()).open_log().unwrap();
    assert_eq!(log.lost(0), Some(Lost { acknowledged: 50 }));
}

#[test]
fn a_damaged_state_does_not_open_or_says_so_when_it_is_read() {
    let home = tempfile::tempdir().unwrap();
    let state = disk(home.path()).open_state(0).unwrap();
    put_everywhere(&*state, "value");
    state.flush().unwrap();
    drop(state);
    let directory = home.path().join("state/0/1");
    let files = fs::read_dir(&directory)
        .unwrap()
        .map(|file| file.unwrap().path());
    let tables: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "sst"))
        .collect();
    assert_eq!(tables.len(), Family::ALL.len());
    for table in tables {
        let good = fs::read(&table).unwrap();
        let mut damaged = good.clone();
        // In the one block of records.
        damaged[10] ^= 1;
        fs::write(&table, damaged).unwrap();
        let read = disk(home.path()).open_state(0).and_then(|state| {
            let keys = Family::ALL.map(|family| state.get(family, b"key"));
            keys.into_iter().collect::<std::io::Result<Vec<_>>>()
        });
        let said = read.unwrap_err();
        assert_eq!(said.kind(), std::io::ErrorKind::InvalidData, "{said}");
        fs::write(&table, good).unwrap();
    }
    let manifest = fs::read_dir(&directory)
        .unwrap()
        .map(|file| file.unwrap().path())
        .find(|path| path.to_string_lossy().contains("MANIFEST"))
        .unwrap();
    let mut damaged = fs::read(&manifest).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(&manifest, damaged).unwrap();
    let said = disk(home.path()).open_state(0).map(|_| ()).unwrap_err();
    assert_eq!(said.kind(), std::io::ErrorKind::InvalidData, "{said}");
}

#[test]
fn a_log_damaged_before_its_tail_does_not_open() {
    let home = tempfile::tempdir().unwrap();
    let disk_before = disk(home.path());
    let log = disk_before.open_log().unwrap();
    put_log(&*log, 1, 100, 1000);

    let image = crash(home.path());
    let wal = wal(image.path());
    let mut bytes = fs::read(&wal).unwrap();
    bytes[20_000] ^= 1;
    fs::write(&wal, bytes).unwrap();
    assert!(disk(image.path()).open_log().is_err());
}

#[test]
fn purged_entries_leave_the_disk() {
    let home = tempfile::tempdir().unwrap();
    // So small a budget that buffers become files all the time.
    let disk = RocksDisk::new(
        home.path(),
        Budget {
            block_cache_bytes: 1 << 20,
            write_buffer_bytes: 1 << 20,
        },
    )
    .unwrap();
    let log = disk.open_log().unwrap();
    for round in 0..20 {
        put_log(&*log, round * 100 + 1, round * 100 + 100, 20_000);
        let mut batch = LogBatch::default();
        batch.purge_to(0, round * 100 + 50);
        log.write(batch, round % 2 == 0).unwrap();
        assert_eq!(
            log.bounds(0).unwrap(),
            Some((round * 100 + 51, round * 100 + 100))
        );
    }
    log.compact().unwrap();
    let left = log.disk_bytes().unwrap();
    assert!(left < 4_000_000, "{left} bytes for 50 entries of 20 kB");
    let read = log.read(0, 0..u64::MAX, usize::MAX).unwrap();
    assert_eq!(
        read,
        (1951..=2000)
            .map(|index| (index, entry(index, 20_000)))
            .collect::<Vec<_>>()
    );
}

#[test]
fn a_replaced_state_lives_until_its_last_reader_goes() {
    let home = tempfile::tempdir().unwrap();
    let (disk, generation) = (disk(home.path()), |number: u64| {
        home.path().join("state/0").join(number.to_string())
    });
    let first = disk.open_state(0).unwrap();
    put_everywhere(&*first, "first");
    for number in 2..=3 {
        let incoming = home.path().join("incoming");
        first.checkpoint(&incoming).unwrap();
        let state = disk.install_state(0, &incoming).unwrap();
        assert!(generation(1).is_dir() && generation(number).is_dir());
        assert_eq!(everywhere(&*state), everywhere(&*first));
    }
    drop(first);
    assert!(!generation(1).exists() && !generation(2).exists());
    assert!(generation(3).is_dir());
}

#[test]
fn a_crash_during_an_install_leaves_one_of_the_two_states() {
    let home = tempfile::tempdir().unwrap();
    let disk_before = disk(home.path());
    let state = disk_before.open_state(0).unwrap();
    put_everywhere(&*state, "new");
    let received = home.path().join("received");
    state.checkpoint(&received).unwrap();
    put_everywhere(&*state, "old");
    state.flush().unwrap();

    let (old, new) = (Bytes::from_static(b"old"), Bytes::from_static(b"new"));
    for (pointer, expected) in [("1\n", old), ("2\n", new)] {
        let image = crash(home.path());
        fs::rename(
            image.path().join("received"),
            image.path().join("state/0/2"),
        )
        .unwrap();
        fs::write(image.path().join("state/0/GENERATION"), pointer).unwrap();
        let state = disk(image.path()).open_state(0).unwrap();
        assert_eq!(everywhere(&*state), vec![Some(expected); Family::ALL.len()]);
        assert_eq!(
            fs::read_dir(image.path().join("state/0")).unwrap().count(),
            2,
            "one generation and the pointer"
        );
    }
}

#[test]
fn a_state_can_begin_with_an_installed_checkpoint() {
    let home = tempfile::tempdir().unwrap();
    let disk_before = disk(home.path());
    let source = disk_before.open_state(1).unwrap();
    put_everywhere(&*source, "new");
    let received = home.path().join("received");
    source.checkpoint(&received).unwrap();
    drop(disk_before.install_state(0, &received).unwrap());
    assert_eq!(
        everywhere(&*disk_before.open_state(0).unwrap()),
        everywhere(&*source)
    );
}

#[test]
fn a_store_that_failed_to_write_refuses_everything() {
    let home = tempfile::tempdir().unwrap();
    let disk = disk(home.path());
    let (log, state) = (disk.open_log().unwrap(), disk.open_state(0).unwrap());
    let failure = || Err::<(), _>(std::io::Error::other("disk on fire"));
    log.poison.watch(failure()).unwrap_err();
    state.poison.watch(failure()).unwrap_err();

    let told = log
        .write(LogBatch::default(), true)
        .unwrap_err()
        .to_string();
    assert!(told.contains("disk on fire"), "{told}");
    assert!(log.read(0, 0..1, 1).is_err() && log.bounds(0).is_err() && log.last(0).is_err());
    assert!(
        log.mark(0, LogMark::Vote).is_err() && log.disk_bytes().is_err() && log.compact().is_err()
    );
    assert!(
        state.write(StateBatch::default()).is_err()
            && state.flush().is_err()
            && state.get(Family::Entry, b"").is_err()
    );
    assert!(
        state.get_many(Family::Entry, &[]).is_err()
            && state
                .scan(Family::Entry, b"", None)
                .next()
                .unwrap()
                .is_err()
    );
    assert!(
        state.checkpoint(&home.path().join("copy")).is_err()
            && state.disk_bytes().is_err()
            && state.compact().is_err()
    );
}

#[test]
fn the_version_said_is_the_one_linked() {
    let lock = include_str!("../../../../Cargo.lock");
    let package = lock
        .split("[[package]]")
        .find(|package| package.contains("name = \"librocksdb-sys\""))
        .unwrap();
    let version = super::VERSION.strip_prefix("rocksdb ").unwrap();
    assert!(package.contains(&format!("+{version}\"")), "{package}");
}
