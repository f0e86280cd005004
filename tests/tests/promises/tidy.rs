//! The design's invariants of absence, held to by reading the workspace: which crate may know
//! which, what may be named where, and what every file has or has not. Knows no node and no
//! network.

mod contract;
mod manifests;
mod source;

use source::{Found, Source, none, sources, texts};

#[test]
fn rocksdb_is_named_only_in_the_store() {
    const ENGINE: [&str; 1] = ["raft/src/store/"];
    let outside = others().into_iter().filter(|source| !source.is_in(&ENGINE));
    none(
        "the storage engine is named outside raft/src/store",
        outside.flat_map(|source| source.uses_crate("rocksdb")),
    );
}

#[test]
fn openraft_stays_behind_the_replica() {
    const BEHIND: [&str; 5] = [
        "raft/src/agreement/",
        "raft/src/peer/",
        "raft/src/tests/",
        "raft/src/membership/",
        "raft/src/replica/",
    ];
    let outside = others().into_iter().filter(|source| !source.is_in(&BEHIND));
    none(
        "openraft is used outside agreement and peer",
        outside.flat_map(|source| source.uses_crate("openraft")),
    );
}

/// What is `pub` is reachable from outside the crate: the lint `unreachable_pub` sees to that.
#[test]
fn nothing_of_openraft_is_in_the_public_api() {
    let raft = sources()
        .into_iter()
        .filter(|source| source.is_in(&["raft/src/"]));
    none(
        "a public signature names a type of openraft",
        raft.flat_map(|source| {
            let mut of_openraft = source.imports_of("openraft");
            of_openraft.push("openraft".to_owned());
            source.found_in(source.public_signatures(), |signature| {
                of_openraft
                    .iter()
                    .any(|name| source::names(signature, name))
            })
        }),
    );
}

/// The records and the clients' outcomes are a part of what commands mean.
#[test]
fn apply_knows_no_clock_no_chance_and_no_files() {
    const FOREIGN: [&str; 10] = [
        "Clock",
        "SystemTime",
        "Instant",
        "rand",
        "RandomState",
        "fs",
        "env",
        "thread",
        "tokio",
        "tonic",
    ];
    let apply = ["apply", "clients", "record"]
        .map(|name| Source::read(&format!("raft/src/state/{name}.rs")));
    let knows = |line: &str| FOREIGN.iter().any(|word| source::names(line, word));
    none(
        "apply is a pure function of state, command and stamp",
        apply.iter().flat_map(|source| source.found(knows)),
    );
}

/// What covers an entry from outside its record is settled in one place, for every reader.
#[test]
fn the_node_judges_no_bare_record() {
    let knows = |line: &str| {
        ["EntryRecord", "Timeline"]
            .iter()
            .any(|word| source::names(line, word))
    };
    none(
        "the node is given views, which raft has settled",
        sources()
            .iter()
            .filter(|source| source.is_in(&["node/src/"]) && !source.is_test())
            .flat_map(|source| source.found_outside_tests(knows)),
    );
}

#[test]
fn every_file_says_what_it_is_for() {
    none(
        "a file opens with `//!`: what it is for, what it promises, what it must never know",
        sources()
            .iter()
            .filter(|source| !source.text.starts_with("//! "))
            .map(Source::whole),
    );
}

#[test]
fn no_file_is_a_place_for_anything() {
    const ANYTHING: [&str; 10] = [
        "util", "utils", "common", "helper", "helpers", "manager", "misc", "shared", "stuff",
        "lib2",
    ];
    let is_one = |source: &Source| {
        source
            .path
            .split(['/', '.', '_'])
            .any(|part| ANYTHING.contains(&part))
    };
    none(
        "a file is named after what it does",
        sources()
            .iter()
            .filter(|source| is_one(source))
            .map(Source::whole),
    );
}

#[test]
fn nothing_is_left_unfinished() {
    const UNFINISHED: [&str; 4] = ["todo!(", "unimplemented!(", "dbg!(", "#[ignore"];
    const MARKS: [&str; 4] = ["TODO", "FIXME", "XXX", "HACK"];
    let is_left = |line: &str| {
        UNFINISHED.iter().any(|left| line.contains(left))
            || MARKS.iter().any(|mark| source::names(line, mark))
    };
    none(
        "nothing is half done or switched off",
        others()
            .iter()
            .flat_map(|source| source.found_anywhere(is_left)),
    );
}

/// Clippy says the same, but not to who runs the tests only.
#[test]
fn only_tests_unwrap() {
    let is_unwrap = |line: &str| line.contains(".unwrap()") || line.contains(".unwrap_err()");
    let crates = sources()
        .into_iter()
        .filter(|source| source.is_in(&["proto/src/", "raft/src/", "node/src/", "client/src/"]));
    none(
        "an unwrap outside tests",
        crates
            .filter(|source| !source.is_test())
            .flat_map(|source| source.found_outside_tests(is_unwrap)),
    );
}

#[test]
fn no_file_names_a_place_on_somebodys_machine() {
    const PLACES: [&str; 4] = ["/home/", "/root/", "/Users/", "/work/"];
    let names_one = |line: &str| PLACES.iter().any(|place| line.contains(place));
    let texts = texts().into_iter().filter(|source| !is_own(source));
    none(
        "a path that only one machine has",
        texts.flat_map(|source| source.found_anywhere(names_one)),
    );
}

/// DESIGN's promises by their numbers: `p4_…` is a test of P4.
#[test]
fn every_promise_is_the_name_of_a_test() {
    const PROMISES: std::ops::RangeInclusive<u32> = 1..=10;
    let tests: Vec<Source> = sources()
        .into_iter()
        .filter(|source| source.is_in(&["tests/tests/promises/"]) && !is_own(source))
        .collect();
    let names = |promise: &u32| {
        let begins = [format!("async fn p{promise}_"), format!("fn p{promise}_")];
        let is_named = |line: &str| begins.iter().any(|begin| line.starts_with(begin));
        tests
            .iter()
            .any(|source| !source.found_anywhere(is_named).is_empty())
    };
    none(
        "a promise without a test that has its number",
        PROMISES
            .filter(|promise| !names(promise))
            .map(|promise| format!("P{promise}")),
    );
}

#[test]
fn the_default_configuration_is_the_one_that_is_deployed() {
    let deployed = Source::read("deploy/holdfastd.yaml");
    assert!(
        deployed.text == holdfast_node::config::DEFAULT_YAML,
        "`holdfastd default-config` prints another file than deploy/holdfastd.yaml"
    );
    let loaded = holdfast_node::config::Config::load(
        Some(&source::root().join(&deployed.path)),
        std::iter::empty(),
        &holdfast_node::config::Overrides::default(),
    );
    assert!(
        loaded.is_ok(),
        "deploy/holdfastd.yaml: {}",
        loaded.unwrap_err()
    );
}

/// The words that are looked for stand in these files.
fn is_own(source: &Source) -> bool {
    source.is_in(&["tests/tests/promises/tidy"])
}

fn others() -> Vec<Source> {
    sources()
        .into_iter()
        .filter(|source| !is_own(source))
        .collect()
}

#[test]
fn the_scan_finds_what_it_looks_for() {
    let text = "//! For this.\n\nuse openraft::{\n    Vote, raft::{LogId as Id},\n};\n\n// a.unwrap()\npub fn first(\n    vote: Vote,\n) -> u8 {\n    a.unwrap()\n}\n\n#[cfg(test)]\nmod tests {\n    b.unwrap()\n}\n";
    let source = Source {
        path: "raft/src/some.rs".into(),
        text: text.into(),
    };
    let lines = |found: Vec<Found>| {
        found
            .into_iter()
            .map(|found| found.line)
            .collect::<Vec<_>>()
    };
    assert_eq!(source.imports_of("openraft"), ["Vote", "Id"]);
    assert_eq!(lines(source.uses_crate("openraft")), [3]);
    assert_eq!(
        lines(
            source.found_in(source.public_signatures(), |signature| source::names(
                signature, "Vote"
            ))
        ),
        [8]
    );
    assert_eq!(
        lines(source.found_outside_tests(|line| line.contains(".unwrap()"))),
        [11]
    );
    assert_eq!(
        lines(source.found(|line| line.contains(".unwrap()"))),
        [11, 16]
    );
    assert_eq!(
        lines(source.found_anywhere(|line| line.contains(".unwrap()"))),
        [7, 11, 16]
    );
    assert!(
        source::names("a Vote!", "Vote")
            && !source::names("Votes", "Vote")
            && !source::names("pre_Vote", "Vote")
    );
}
