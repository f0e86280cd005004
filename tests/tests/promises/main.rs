//! The promises, each held to by real servers. One binary, so that the workspace is linked once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must stop")]

mod bad_input;
mod busy_threads;
mod clocks;
mod command_line;
mod configuration;
mod consistency;
#[cfg(feature = "rocksdb")]
mod disks;
mod distance;
#[cfg(feature = "rocksdb")]
mod divergence;
#[cfg(feature = "rocksdb")]
mod durability;
#[cfg(feature = "rocksdb")]
mod failover;
mod fairness;
mod fencing;
mod first_minutes;
mod forming;
#[cfg(feature = "rocksdb")]
mod health;
#[cfg(feature = "rocksdb")]
mod isolation;
mod lag;
#[cfg(feature = "rocksdb")]
mod linearizability;
mod membership;
mod membership_truth;
mod negative;
mod operation;
mod origin_headers;
#[cfg(feature = "rocksdb")]
mod overdue;
mod proposals;
mod read_controls;
mod refresh;
mod rolling_configuration;
#[cfg(feature = "rocksdb")]
mod slow_disks;
#[cfg(feature = "rocksdb")]
mod snapshots;
mod stale;
mod tidy;
mod tracing;
#[cfg(target_os = "linux")]
mod untaken;
mod unwanted;
mod upstream_http;

use holdfast_tests::cluster::{Place, Programs, Setup};
#[cfg(feature = "rocksdb")]
use rand::{SeedableRng, rngs::StdRng};

/// What is built with the tests, never a stale one.
const PROGRAMS: Programs = Programs {
    holdfastd: env!("CARGO_BIN_EXE_holdfastd-under-test"),
    holdfast: env!("CARGO_BIN_EXE_holdfast-under-test"),
};

/// Three nodes in this process.
fn in_process() -> Setup {
    Setup::new(PROGRAMS, Place::InProcess)
}

/// Three nodes as child processes.
fn processes() -> Setup {
    Setup::new(PROGRAMS, Place::Processes)
}

/// A number that the environment may set.
fn from_environment<N: std::str::FromStr>(name: &str) -> Option<N> {
    std::env::var(name).ok().map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number"))
    })
}

/// What is random in a test is the same again with the seed that it prints.
fn seed() -> u64 {
    let seed = from_environment("HOLDFAST_SEED").unwrap_or_else(rand::random);
    println!("HOLDFAST_SEED={seed}");
    seed
}

#[cfg(feature = "rocksdb")]
fn seeded() -> StdRng {
    StdRng::seed_from_u64(seed())
}

/// A random number below a bound, with a seed that is printed.
#[cfg(feature = "rocksdb")]
fn seeded_below(bound: usize) -> usize {
    rand::RngExt::random_range(&mut seeded(), 0..bound)
}
