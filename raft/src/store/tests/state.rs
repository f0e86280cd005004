//! The state on both engines.

use std::fs;
use std::path::Path;

use bytes::Bytes;

use super::{Home, bytes, homes};
use crate::store::{Family, StateBatch, StateStore};

fn change(state: &dyn StateStore, change: impl FnOnce(&mut StateBatch)) {
    let mut batch = StateBatch::default();
    change(&mut batch);
    state.write(batch).unwrap();
}

/// Puts the same record into every family.
fn put_everywhere(state: &dyn StateStore, key: &'static str, value: &'static str) {
    change(state, |batch| {
        Family::ALL
            .iter()
            .for_each(|family| batch.put(*family, key, value))
    });
}

/// What every family has under the key, if they agree.
fn everywhere(state: &dyn StateStore, key: &str) -> Option<Bytes> {
    let found = Family::ALL.map(|family| state.get(family, key.as_bytes()).unwrap());
    assert!(
        found.windows(2).all(|pair| pair[0] == pair[1]),
        "families disagree about {key}: {found:?}"
    );
    found[0].clone()
}

fn keys(state: &dyn StateStore, family: Family, from: &str, end: Option<&str>) -> Vec<Bytes> {
    state
        .scan(family, from.as_bytes(), end.map(str::as_bytes))
        .map(|record| record.unwrap().0)
        .collect()
}

#[test]
fn changes_of_a_batch_happen_in_their_order_over_families() {
    for home in homes() {
        let state = home.stores().open_state(0).unwrap();
        change(&*state, |batch| {
            batch.put(Family::Entry, "a", "1");
            batch.put(Family::Entry, "b", "1");
            batch.delete(Family::Entry, "a");
            batch.put(Family::Value, "a", "2");
            batch.put(Family::Due, "a", "1");
            batch.delete_range(Family::Due, "a", "b");
            batch.put(Family::Due, "aa", "3");
            batch.delete_range(Family::Entry, "z", "a");
        });
        assert_eq!(keys(&*state, Family::Entry, "", None), ["b"]);
        assert_eq!(state.get(Family::Value, b"a").unwrap(), Some(bytes("2")));
        assert_eq!(keys(&*state, Family::Due, "", None), ["aa"]);
        let found = state.get_many(Family::Entry, &[b"b", b"a", b"b"]).unwrap();
        assert_eq!(found, [Some(bytes("1")), None, Some(bytes("1"))]);
        assert_eq!(
            state.get_many(Family::Entry, &[]).unwrap(),
            [] as [Option<Bytes>; 0]
        );
    }
}

#[test]
fn a_scan_is_ordered_and_bounded() {
    for home in homes() {
        let state = home.stores().open_state(0).unwrap();
        change(&*state, |batch| {
            ["b", "", "a\0", "c", "a", "\u{7f}"]
                .iter()
                .for_each(|key| batch.put(Family::Entry, *key, ""))
        });
        assert_eq!(
            keys(&*state, Family::Entry, "", None),
            ["", "a", "a\0", "b", "c", "\u{7f}"]
        );
        assert_eq!(keys(&*state, Family::Entry, "a\0", Some("c")), ["a\0", "b"]);
        assert_eq!(keys(&*state, Family::Entry, "c", Some("a")), [""; 0]);
        assert_eq!(keys(&*state, Family::Entry, "", Some("")), [""; 0]);
        assert_eq!(keys(&*state, Family::Value, "", None), [""; 0]);
    }
}

#[test]
fn a_scan_shows_the_moment_it_began() {
    for home in homes() {
        let state = home.stores().open_state(0).unwrap();
        change(&*state, |batch| {
            ["a", "b", "c"]
                .iter()
                .for_each(|key| batch.put(Family::Entry, *key, "old"))
        });
        let mut scan = state.scan(Family::Entry, b"", None);
        assert_eq!(scan.next().unwrap().unwrap(), (bytes("a"), bytes("old")));

        change(&*state, |batch| {
            batch.put(Family::Entry, "b", "new");
            batch.delete(Family::Entry, "c");
            batch.put(Family::Entry, "d", "new");
        });
        state.flush().unwrap();

        let rest: Vec<_> = scan.map(Result::unwrap).collect();
        assert_eq!(
            rest,
            [(bytes("b"), bytes("old")), (bytes("c"), bytes("old"))]
        );
        assert_eq!(keys(&*state, Family::Entry, "", None), ["a", "b", "d"]);
    }
}

#[test]
fn a_state_opened_again_is_as_of_its_last_flush_in_all_families() {
    for home in homes() {
        let state = home.stores().open_state(3).unwrap();
        put_everywhere(&*state, "kept", "1");
        change(&*state, |batch| batch.put(Family::System, "applied", "10"));
        state.flush().unwrap();
        put_everywhere(&*state, "kept", "2");
        put_everywhere(&*state, "lost", "1");
        change(&*state, |batch| batch.put(Family::System, "applied", "12"));
        drop(state);

        let stores = home.stores();
        let state = stores.open_state(3).unwrap();
        assert_eq!(everywhere(&*state, "kept"), Some(bytes("1")));
        assert_eq!(everywhere(&*state, "lost"), None);
        assert_eq!(
            state.get(Family::System, b"applied").unwrap(),
            Some(bytes("10"))
        );
        assert_eq!(
            everywhere(&*stores.open_state(4).unwrap(), "kept"),
            None,
            "another shard's state"
        );
    }
}

#[test]
fn an_installed_checkpoint_replaces_the_state_under_open_readers() {
    for home in homes() {
        let stores = home.stores();
        let (source, incoming) = (stores.open_state(1).unwrap(), home.path("incoming"));
        put_everywhere(&*source, "which", "new");
        source.checkpoint(&incoming).unwrap();
        assert!(
            source.checkpoint(&incoming).is_err(),
            "a checkpoint over another"
        );
        put_everywhere(&*source, "which", "newer");

        let old = stores.open_state(0).unwrap();
        put_everywhere(&*old, "which", "old");
        change(&*old, |batch| {
            (0..1000).for_each(|number| batch.put(Family::Entry, format!("{number:04}"), "old"))
        });
        old.flush().unwrap();
        let mut scan = old.scan(Family::Entry, b"", None);
        scan.next().unwrap().unwrap();

        let new = stores.install_state(0, &incoming).unwrap();
        assert!(!incoming.exists(), "what was installed is used up");
        assert_eq!(everywhere(&*new, "which"), Some(bytes("new")));
        assert_eq!(everywhere(&*old, "which"), Some(bytes("old")));
        assert_eq!(scan.map(Result::unwrap).count(), 1000);
        put_everywhere(&*new, "after", "1");
        new.flush().unwrap();
        drop((old, new, source));
        drop(stores);

        let new = home.stores().open_state(0).unwrap();
        assert_eq!(everywhere(&*new, "which"), Some(bytes("new")));
        assert_eq!(everywhere(&*new, "after"), Some(bytes("1")));
        assert_eq!(new.get(Family::Entry, b"0001").unwrap(), None);
    }
}

#[test]
fn a_damaged_checkpoint_leaves_the_old_state() {
    for home in homes() {
        let stores = home.stores();
        let old = stores.open_state(0).unwrap();
        put_everywhere(&*old, "which", "old");
        old.flush().unwrap();

        let incoming = home.path("incoming");
        for damage in [absent, empty, cut_short] {
            damage(&home, &incoming);
            assert!(stores.install_state(0, &incoming).is_err());
            assert_eq!(everywhere(&*old, "which"), Some(bytes("old")));
            assert!(!incoming.exists(), "what failed is used up too");
        }

        put_everywhere(&*old, "still", "written");
        old.flush().unwrap();
        drop((old, stores));
        let old = home.stores().open_state(0).unwrap();
        assert_eq!(everywhere(&*old, "which"), Some(bytes("old")));
        assert_eq!(everywhere(&*old, "still"), Some(bytes("written")));
    }
}

fn absent(_: &Home, _: &Path) {}

fn empty(_: &Home, dir: &Path) {
    fs::create_dir(dir).unwrap();
}

/// A checkpoint whose files all end too soon.
fn cut_short(home: &Home, dir: &Path) {
    let source = home.stores().open_state(9).unwrap();
    put_everywhere(&*source, "which", "new");
    source.checkpoint(dir).unwrap();
    for file in fs::read_dir(dir).unwrap() {
        let path = file.unwrap().path();
        // A checkpoint's files may be hard links: the source keeps its own.
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    }
}

#[test]
fn compaction_gives_the_space_of_deleted_values_back() {
    for home in homes() {
        let state = home.stores().open_state(0).unwrap();
        let key = |number: u32| Bytes::from(number.to_be_bytes().to_vec());
        // Values that do not compress.
        let value = |number: u32| -> Bytes {
            (0..12_500_u64)
                .flat_map(|at| {
                    xxhash_rust::xxh3::xxh3_64(&(u64::from(number) << 32 | at).to_be_bytes())
                        .to_be_bytes()
                })
                .collect()
        };
        (0..40).for_each(|number| {
            change(&*state, |batch| {
                batch.put(Family::Value, key(number), value(number))
            })
        });
        state.flush().unwrap();
        let full = state.disk_bytes().unwrap();
        assert!(full >= 4_000_000, "{full}");

        (0..36)
            .for_each(|number| change(&*state, |batch| batch.delete(Family::Value, key(number))));
        state.compact().unwrap();

        let left = state.disk_bytes().unwrap();
        assert!(left < full / 4, "{left} of {full} bytes are left");
        assert_eq!(state.get(Family::Value, &key(39)).unwrap(), Some(value(39)));
    }
}

#[test]
fn a_state_is_open_once() {
    for home in homes() {
        let stores = home.stores();
        let first = stores.open_state(0).unwrap();
        assert!(stores.open_state(0).is_err());
        let _other = stores.open_state(1).unwrap();
        drop(first);
        stores.open_state(0).unwrap();
    }
}
