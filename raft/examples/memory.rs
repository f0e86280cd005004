//! Measures the memory tier: what an entry costs beside its own bytes, and look-ups a second.
//!
//! ```text
//! cargo run --release -p holdfast-raft --no-default-features --example memory
//! ```

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_proto::Key;
use holdfast_proto::peer::EntryRecord;

// Nobody outside the crate sees the memory tier; it needs nothing else of the crate.
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "the crate uses all of it"
)]
#[path = "../src/state/memory/mod.rs"]
mod memory;

use memory::{ENTRY_OVERHEAD_BYTES, Entry, Lookup, Memory};

const ENTRIES: u64 = 1_000_000;
const VALUE_BYTES: usize = 100;

fn main() {
    let before = resident_bytes();
    let memory = Memory::new(1 << 40);
    let took = time(|| (0..ENTRIES).for_each(|n| memory.apply([(key(n), Some(entry()))])));
    println!(
        "apply     {:>10.0}/s, one thread",
        ENTRIES as f64 / took.as_secs_f64()
    );

    // A read of a value shares it, which costs a few bytes more: as long-lived entries have been
    // read, read all.
    (0..ENTRIES).for_each(|n| drop(found(memory.get(&key(n))).map(|entry| entry.value.clone())));
    let own = ENTRIES * (VALUE_BYTES as u64 + key(0).len() as u64);
    let overhead = (resident_bytes() - before - own) / ENTRIES;
    println!("overhead  {overhead:>10} bytes an entry, counted as {ENTRY_OVERHEAD_BYTES}");

    for threads in [1, 2, 4] {
        let took = time(|| {
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    let memory = &memory;
                    scope.spawn(move || read(memory, thread));
                }
            });
        });
        println!(
            "get       {:>10.0}/s, {threads} threads",
            (threads * ENTRIES) as f64 / took.as_secs_f64()
        );
    }

    let small = Memory::new(memory.bytes() / 10);
    let took =
        time(|| (0..ENTRIES).for_each(|n| _ = small.fill(&key(n), small.ticket(&key(n)), entry())));
    println!(
        "fill      {:>10.0}/s, each evicting one, one thread",
        ENTRIES as f64 / took.as_secs_f64()
    );
}

fn found(lookup: Lookup) -> Option<Arc<Entry>> {
    match lookup {
        Lookup::Found(entry) => Some(entry),
        Lookup::Absent | Lookup::Unknown(_) => None,
    }
}

/// Every entry once, in an order that caches do not foresee.
fn read(memory: &Memory, thread: u64) {
    let mut name = *b"user/00000000/profile";
    for n in 0..ENTRIES {
        write_number(&mut name, (n * 7_919 + thread * 104_729) % ENTRIES);
        assert!(found(memory.get(&name)).is_some());
    }
}

fn key(n: u64) -> Key {
    let mut name = *b"user/00000000/profile";
    write_number(&mut name, n);
    Key::new(Bytes::copy_from_slice(&name)).expect("short")
}

fn write_number(name: &mut [u8; 21], mut n: u64) {
    for digit in name[5..13].iter_mut().rev() {
        *digit = b'0' + (n % 10) as u8;
        n /= 10;
    }
}

fn entry() -> Arc<Entry> {
    Arc::new(Entry::new(EntryRecord::default(), vec![7; VALUE_BYTES]))
}

#[allow(clippy::disallowed_methods, reason = "measures real time")]
fn time(work: impl FnOnce()) -> Duration {
    let start = std::time::Instant::now();
    work();
    start.elapsed()
}

/// Linux only.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    pages
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok())
        .expect("the second number is resident pages")
        * 4096
}
