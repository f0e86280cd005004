//! What the machine has, for the limits that nobody set: memory as the cgroup allows it, the disk
//! under a directory, and descriptors.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// More than a node can use.
const DESCRIPTORS_ENOUGH: u64 = 1 << 20;
/// Where neither cgroup nor machine says how much memory there is.
const MEMORY_BYTES_UNKNOWN: u64 = 2 << 30;

/// The least limit of the cgroup and those above it, or all memory of the machine.
pub(crate) fn memory_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| total_of_meminfo(&text));
    let cgroup = fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|text| least_limit(&text, Path::new("/sys/fs/cgroup")));
    machine
        .into_iter()
        .chain(cgroup)
        .min()
        .unwrap_or(MEMORY_BYTES_UNKNOWN)
}

/// Size of the file system that holds `path`, which exists.
pub(crate) fn disk_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
}

/// Descriptors that this process may have open.
pub(crate) fn descriptors_max() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Those that it has open; `None` where the system does not say.
pub(crate) fn descriptors_open() -> Option<u64> {
    u64::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok()
}

/// Raises this process's own limit of descriptors as far as the system lets it: the usual soft limit
/// of 1,024 is for programs that wait with `select`.
pub(crate) fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit
        .maximum
        .unwrap_or(DESCRIPTORS_ENOUGH)
        .min(DESCRIPTORS_ENOUGH);
    if limit.current.is_none_or(|current| current >= wanted) {
        return;
    }
    let raised = Rlimit {
        current: Some(wanted),
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => tracing::info!(from = limit.current, to = wanted, "more descriptors"),
        Err(error) => tracing::warn!(%error, "the limit of descriptors could not be raised"),
    }
}

fn total_of_meminfo(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Lines are `0::/path` for cgroup 2, `n:memory:/path` for the memory controller of cgroup 1.
fn least_limit(own: &str, root: &Path) -> Option<u64> {
    own.lines().filter_map(|line| limit_of(line, root)).min()
}

fn limit_of(line: &str, root: &Path) -> Option<u64> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
    let (root, file): (PathBuf, &str) = match controllers {
        "" => (root.to_owned(), "memory.max"),
        named if named.split(',').any(|name| name == "memory") => {
            (root.join("memory"), "memory.limit_in_bytes")
        }
        _ => return None,
    };
    // Inside a container the path may be the host's, which is not there: then the root of what is
    // mounted counts.
    let own = root.join(path);
    let levels = own.ancestors().take_while(|level| level.starts_with(&root));
    // `max` is no number, and is no limit.
    levels
        .filter_map(|level| {
            fs::read_to_string(level.join(file))
                .ok()?
                .trim()
                .parse()
                .ok()
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_of_the_cgroups_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("pod/container");
        fs::create_dir_all(&inner).unwrap();
        fs::write(root.path().join("memory.max"), "max\n").unwrap();
        fs::write(root.path().join("pod/memory.max"), "1000\n").unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        assert_eq!(least_limit("0::/pod/container\n", root.path()), Some(1000));
        fs::write(inner.join("memory.max"), "500\n").unwrap();
        assert_eq!(least_limit("0::/pod/container\n", root.path()), Some(500));
        assert_eq!(least_limit("0::/not/mounted/here\n", root.path()), None);

        let version_1 = root.path().join("memory/docker");
        fs::create_dir_all(&version_1).unwrap();
        fs::write(version_1.join("memory.limit_in_bytes"), "700").unwrap();
        assert_eq!(
            least_limit("5:cpu,memory:/docker\n4:pids:/docker\n", root.path()),
            Some(700)
        );
    }

    #[test]
    fn the_machine_has_memory_and_disk() {
        assert_eq!(
            total_of_meminfo("MemTotal:       4039588 kB\nMemFree: 1 kB\n"),
            Some(4_039_588 * 1024)
        );
        assert!(memory_bytes() > 0 && disk_bytes(Path::new("/")).unwrap() > 0);
    }
}
