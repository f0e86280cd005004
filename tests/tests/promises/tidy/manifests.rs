//! Which crate may depend on which, in the manifests and down to the last dependency of the lock
//! file.

use std::collections::{BTreeSet, HashMap};

use super::source::{Source, none};

/// Crate, and what it must not depend on, not for its tests either.
const FOREIGN: [(&str, &[&str]); 4] = [
    (
        "proto",
        &[
            "holdfast-raft",
            "holdfast-node",
            "holdfast-client",
            "holdfast-tests",
            "openraft",
            "rocksdb",
            "tokio",
            "axum",
            "reqwest",
            "hyper",
        ],
    ),
    (
        "raft",
        // `http` names only what a gRPC question is wrapped in: nothing serves or fetches with it.
        &[
            "holdfast-node",
            "holdfast-client",
            "holdfast-tests",
            "axum",
            "reqwest",
            "hyper",
            "hyper-util",
            "clap",
            "serde",
            "serde_json",
            "serde-saphyr",
            "opentelemetry",
            "opentelemetry_sdk",
            "opentelemetry-otlp",
            "tracing-opentelemetry",
            "tracing-subscriber",
            "prometheus-client",
            "anyhow",
        ],
    ),
    (
        "node",
        &[
            "holdfast-client",
            "holdfast-tests",
            "openraft",
            "openraft-rt",
            "openraft-rt-tokio",
            "openraft-macros",
            "rocksdb",
            "papaya",
        ],
    ),
    (
        "client",
        &[
            "holdfast-raft",
            "holdfast-node",
            "holdfast-tests",
            "openraft",
            "rocksdb",
            "axum",
            "reqwest",
            "hyper",
            "opentelemetry",
            "prometheus-client",
            "anyhow",
        ],
    ),
];

#[test]
fn a_crate_depends_only_on_what_it_may_know() {
    let wrong = FOREIGN.iter().flat_map(|&(name, foreign)| {
        let manifest = Source::read(&format!("{name}/Cargo.toml"));
        let depends = dependencies(&manifest.text);
        assert!(
            depends.len() > 3,
            "{name}/Cargo.toml is not read as it is written"
        );
        let known = foreign.iter().filter(|foreign| depends.contains(**foreign));
        known
            .map(|foreign| format!("  {name} depends on {foreign}"))
            .collect::<Vec<_>>()
    });
    none("a crate knows only what is below it", wrong);
}

/// A library that pulls in a storage engine is not light, whoever brings it.
#[test]
fn the_client_is_free_of_consensus_and_storage_to_its_last_dependency() {
    let lock = lock(&Source::read("Cargo.lock").text);
    let client = closure(&lock, "holdfast-client");
    assert!(
        client.contains("tonic") && client.contains("tokio"),
        "Cargo.lock is not read as it is written"
    );
    let heavy = |name: &&String| {
        ["openraft", "rocksdb", "holdfast-raft", "holdfast-node"]
            .iter()
            .any(|heavy| name.contains(heavy))
    };
    none("the client brings along", client.iter().filter(heavy));
}

#[test]
fn every_crate_keeps_the_workspaces_lints_and_licence() {
    let crates = ["proto", "raft", "node", "client", "tests"]
        .map(|name| Source::read(&format!("{name}/Cargo.toml")));
    let kept = |source: &Source| {
        source.text.contains("[lints]\nworkspace = true")
            && source.text.contains("\nlicense.workspace = true")
    };
    none(
        "`[lints] workspace = true` and `license.workspace = true`",
        crates
            .iter()
            .filter(|source| !kept(source))
            .map(Source::whole),
    );
}

/// Names in every table of dependencies: usual, build, development, by target.
fn dependencies(manifest: &str) -> BTreeSet<&str> {
    let mut inside = false;
    let mut names = BTreeSet::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(table) = line.strip_prefix('[') {
            let table = table.trim_end_matches(']');
            inside = table.ends_with("dependencies");
            // [dependencies.name]
            names.extend(table.rsplit_once("dependencies.").map(|(_, name)| name));
        } else if inside && !line.starts_with('#') {
            names.extend(
                line.split(['.', '=', ' '])
                    .next()
                    .filter(|name| !name.is_empty()),
            );
        }
    }
    names
}

/// Package name to the names it depends on. Versions of one name are taken together.
fn lock(text: &str) -> HashMap<String, Vec<String>> {
    let mut lock: HashMap<String, Vec<String>> = HashMap::new();
    for package in text.split("[[package]]").skip(1) {
        let quoted: Vec<&str> = package.split('"').skip(1).step_by(2).collect();
        let depends = package
            .split_once("dependencies = [")
            .map_or("", |(_, list)| list);
        let depends = depends
            .split('"')
            .skip(1)
            .step_by(2)
            .filter_map(|name| name.split(' ').next())
            .map(str::to_owned);
        lock.entry(quoted[0].to_owned())
            .or_default()
            .extend(depends);
    }
    lock
}

fn closure(lock: &HashMap<String, Vec<String>>, of: &str) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    let mut ahead = vec![of.to_owned()];
    while let Some(name) = ahead.pop() {
        if reached.insert(name.clone()) {
            ahead.extend(lock.get(&name).into_iter().flatten().cloned());
        }
    }
    reached
}

#[test]
fn the_manifests_are_read_as_cargo_reads_them() {
    let manifest = "[package]\nname = \"x\"\n[dependencies]\na.workspace = true\n# b = 1\nc = { version = \"1\" }\n[dev-dependencies.d]\nversion = \"1\"\n[target.'cfg(unix)'.build-dependencies]\ne = \"1\"\n[lints]\nf = 1\n";
    assert_eq!(dependencies(manifest), BTreeSet::from(["a", "c", "d", "e"]));
    let text = "[[package]]\nname = \"a\"\nversion = \"1\"\ndependencies = [\n \"b 2.0\",\n]\n[[package]]\nname = \"b\"\nversion = \"2.0\"\ndependencies = [\n \"c\",\n]\n[[package]]\nname = \"z\"\nversion = \"1\"\n";
    assert_eq!(
        closure(&lock(text), "a"),
        BTreeSet::from(["a", "b", "c"].map(str::to_owned))
    );
}
