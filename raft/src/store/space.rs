//! What a node's disk has left, and what is held back of it, so that a full disk refuses values in
//! words before the engine fails, and what must go on has room to: deletes, the log, flushes, the
//! compactions that give space back.
//!
//! ```text
//! free      | what values may still take |     reserve      |   the file `ballast`   |
//!                                 full: values are refused ─┘
//! nothing is left: `ballast` goes, and its room is what goes on then; half of that left: out of room
//! ```
//! Two bounds count, the tighter of both: `storage.max_bytes` for what log and states take, and what
//! the file system has free, whoever filled it. Must never know what is stored.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::durable;

const FILE: &str = "ballast";
/// Of the file system, what is kept free: what the engine has in its buffers must fit in, and that
/// goes by the size of the file system too.
const RESERVE_SHARE: u64 = 64;
const RESERVE_BYTES_MIN: u64 = 8 << 20;
const RESERVE_BYTES_MAX: u64 = 256 << 20;
const BALLAST_BYTES_MAX: u64 = 64 << 20;

/// How a disk is, as it was last measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Fill {
    /// Of log and states.
    pub(crate) used_bytes: u64,
    /// Of the tighter bound, in thousandths: 1,000 and more is full.
    pub(crate) used_permille: u32,
    /// The file system has nothing left for values.
    pub(crate) file_system_is_full: bool,
}

/// One per node.
pub(crate) struct DiskSpace {
    /// None for the memory engine, which knows no file system.
    ballast: Option<Ballast>,
    max_bytes: u64,
    used_bytes: AtomicU64,
    is_out_of_room: AtomicBool,
}

struct Ballast {
    directory: PathBuf,
    reserve_bytes: u64,
    ballast_bytes: u64,
    held: Mutex<bool>,
}

impl DiskSpace {
    /// Before anything else is opened in the directory: a full disk gets the ballast's room, so that
    /// opening does not fail for want of it.
    pub(crate) fn open(directory: Option<&Path>, max_bytes: u64) -> io::Result<Self> {
        let ballast = directory.map(Ballast::open).transpose()?;
        Ok(Self {
            ballast,
            max_bytes,
            used_bytes: AtomicU64::new(0),
            is_out_of_room: AtomicBool::new(false),
        })
    }

    /// What log and states take, as it was last added up.
    pub(crate) fn set_used(&self, bytes: u64) {
        self.used_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Asks the file system. Takes the ballast away where nothing is left, and puts it back where
    /// there is room again. Off the async threads.
    pub(crate) fn measure(&self) -> io::Result<Fill> {
        let used_bytes = self.used_bytes.load(Ordering::Relaxed);
        let Some(ballast) = &self.ballast else {
            return Ok(judge(used_bytes, self.max_bytes, None));
        };
        let room = ballast.adjust()?;
        self.is_out_of_room.store(room.is_out(), Ordering::Relaxed);
        Ok(judge(used_bytes, self.max_bytes, Some(room)))
    }

    /// Hardly anything is left, for nothing at all.
    pub(crate) fn is_out_of_room(&self) -> bool {
        self.is_out_of_room.load(Ordering::Relaxed)
    }

    /// Room for values that are not written yet, as a snapshot's are.
    pub(crate) fn room_bytes(&self) -> io::Result<u64> {
        match &self.ballast {
            None => Ok(u64::MAX),
            Some(ballast) => {
                let held = *ballast.held.lock();
                Ok(ballast.room(held)?.for_values())
            }
        }
    }
}

/// What the file system has, and what is held back of it.
#[derive(Debug, Clone, Copy)]
struct Room {
    free_bytes: u64,
    reserve_bytes: u64,
    ballast_bytes: u64,
    ballast_is_held: bool,
}

impl Room {
    /// Without the ballast its room comes out of what is free: it goes back there first.
    fn for_values(self) -> u64 {
        let held_back = match self.ballast_is_held {
            true => self.reserve_bytes,
            false => self.reserve_bytes + self.ballast_bytes,
        };
        self.free_bytes.saturating_sub(held_back)
    }

    fn is_out(self) -> bool {
        !self.ballast_is_held && self.free_bytes < self.ballast_bytes / 2
    }
}

fn judge(used_bytes: u64, max_bytes: u64, room: Option<Room>) -> Fill {
    let of_bound = |bound: u64| match bound {
        0 => 1000,
        bound => {
            u32::try_from(u128::from(used_bytes) * 1000 / u128::from(bound)).unwrap_or(u32::MAX)
        }
    };
    let for_values = room.map_or(u64::MAX, Room::for_values);
    let by_file_system = match for_values {
        0 => 1000,
        left => of_bound(used_bytes.saturating_add(left)),
    };
    Fill {
        used_bytes,
        used_permille: of_bound(max_bytes).max(by_file_system),
        file_system_is_full: for_values == 0,
    }
}

impl Ballast {
    fn open(directory: &Path) -> io::Result<Self> {
        durable::create_directory(directory)?;
        let reserve_bytes =
            (total_bytes(directory)? / RESERVE_SHARE).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX);
        let ballast_bytes = reserve_bytes.min(BALLAST_BYTES_MAX);
        let held = match fs::metadata(directory.join(FILE)) {
            Ok(file) => file.len() == ballast_bytes,
            Err(_) => false,
        };
        let ballast = Self {
            directory: directory.to_owned(),
            reserve_bytes,
            ballast_bytes,
            held: Mutex::new(held),
        };
        ballast.adjust()?;
        Ok(ballast)
    }

    fn adjust(&self) -> io::Result<Room> {
        let mut held = self.held.lock();
        let free = free_bytes(&self.directory)?;
        if *held && free < self.reserve_bytes / 2 {
            remove(&self.directory)?;
            *held = false;
            tracing::error!(
                free_bytes = free,
                "the disk is full: values are refused until there is space again"
            );
        } else if !*held && free > self.reserve_bytes + 2 * self.ballast_bytes {
            match allocate(&self.directory, self.ballast_bytes) {
                Ok(()) => *held = true,
                // Somebody else was faster, or the file system cannot be written: as before.
                Err(error) => {
                    tracing::debug!(%error, "no space was put aside");
                    remove(&self.directory)?;
                }
            }
        }
        self.room(*held)
    }

    fn room(&self, ballast_is_held: bool) -> io::Result<Room> {
        Ok(Room {
            free_bytes: free_bytes(&self.directory)?,
            reserve_bytes: self.reserve_bytes,
            ballast_bytes: self.ballast_bytes,
            ballast_is_held,
        })
    }
}

fn allocate(directory: &Path, bytes: u64) -> io::Result<()> {
    let path = directory.join(FILE);
    let file = File::create(&path).map_err(|error| durable::named(error, "create", &path))?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
    Ok(())
}

fn remove(directory: &Path) -> io::Result<()> {
    let path = directory.join(FILE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(durable::named(error, "remove", &path))
        }
        _ => Ok(()),
    }
}

/// What others than root may still take.
fn free_bytes(directory: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(directory)
        .map_err(|error| durable::named(error.into(), "look at the disk of", directory))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The size of the file system.
pub(super) fn total_bytes(directory: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(directory)
        .map_err(|error| durable::named(error.into(), "look at the disk of", directory))?;
    Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn room(free: u64, ballast_is_held: bool) -> Option<Room> {
        Some(Room {
            free_bytes: free * MIB,
            reserve_bytes: 10 * MIB,
            ballast_bytes: 10 * MIB,
            ballast_is_held,
        })
    }

    #[test]
    fn the_tighter_of_both_bounds_counts() {
        let permille = |used: u64, max: u64, room| judge(used * MIB, max * MIB, room).used_permille;
        assert_eq!(permille(50, 100, None), 500);
        assert_eq!(
            permille(50, 100, room(60, true)),
            500,
            "as much is left by either"
        );
        assert_eq!(
            permille(50, 100, room(35, true)),
            666,
            "25 MiB are left for values"
        );
        assert_eq!(permille(150, 100, room(1000, true)), 1500);
        assert_eq!(
            permille(0, 100, room(10, true)),
            1000,
            "nothing is left, nothing is used"
        );
        assert_eq!(permille(0, 100, room(1000, true)), 0);
        assert_eq!(permille(1, 0, None), 1000);
    }

    #[test]
    fn a_file_system_is_full_before_it_is_out_of_room() {
        let fill = |free, held| {
            let room = room(free, held);
            let fill = judge(0, u64::MAX, room);
            (fill.file_system_is_full, room.is_some_and(Room::is_out))
        };
        assert_eq!(fill(11, true), (false, false));
        assert_eq!(fill(10, true), (true, false));
        assert_eq!(
            fill(20, false),
            (true, false),
            "the ballast goes back first"
        );
        assert_eq!(fill(5, false), (true, false));
        assert_eq!(fill(4, false), (true, true));
        assert_eq!(fill(21, false), (false, false));
    }

    #[test]
    fn space_is_put_aside() {
        let home = tempfile::tempdir().unwrap();
        let space = DiskSpace::open(Some(home.path()), u64::MAX).unwrap();
        let fill = space.measure().unwrap();
        let aside = fs::metadata(home.path().join(FILE)).unwrap().len();
        assert!(aside >= RESERVE_BYTES_MIN, "{aside}");
        assert!(!fill.file_system_is_full && !space.is_out_of_room());
        assert!(space.room_bytes().unwrap() > 0);
    }
}
