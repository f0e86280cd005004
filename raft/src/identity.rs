//! Who this node is, in its data directory: a name, an incarnation drawn once, and the cluster it
//! belongs to.
//!
//! Each change is a new file, synced, renamed over the old one, and its directory synced. A lock
//! keeps a second process out.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use holdfast_proto::peer::{ClusterRecord, Formation, IdentityRecord, Retired};
use parking_lot::Mutex;

use crate::state::record;

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("the data directory {}: {error}", dir.display())]
    Io { dir: PathBuf, error: io::Error },
    #[error("the data directory {} belongs to node `{found}`, this is `{wanted}`", dir.display())]
    OtherName {
        dir: PathBuf,
        found: String,
        wanted: String,
    },
    #[error("the data directory {} is in use by another process", dir.display())]
    InUse { dir: PathBuf },
    #[error(
        "the data directory {} has data in `{found}` and no `identity`: whose data it is cannot be known. Restore the file, or remove all of the directory's content to join as a new node",
        dir.display()
    )]
    NoIdentity { dir: PathBuf, found: &'static str },
}

/// The identity as it is on disk, or only in memory for the memory engine.
pub(crate) struct IdentityFile {
    dir: Option<PathBuf>,
    record: ArcSwap<IdentityRecord>,
    /// Whoever changes the record waits for the disk; who reads it does not.
    changing: Mutex<()>,
    /// Held until the node has closed.
    lock: Mutex<Option<File>>,
}

const FILE: &str = "identity";

impl IdentityFile {
    /// Reads who this node is; draws an incarnation the first time. `dir` is `None` if nothing
    /// shall outlive the process.
    pub(crate) fn open(dir: Option<&Path>, name: &str) -> Result<Self, IdentityError> {
        let Some(dir) = dir else {
            let record = IdentityRecord {
                name: name.into(),
                incarnation: draw(),
                ..Default::default()
            };
            return Ok(Self {
                dir: None,
                record: ArcSwap::from_pointee(record),
                changing: Mutex::default(),
                lock: Mutex::default(),
            });
        };
        let failed = |error| IdentityError::Io {
            dir: dir.into(),
            error,
        };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let lock = lock(dir)?;
        let record = match std::fs::read(dir.join(FILE)) {
            Ok(bytes) => {
                let record: IdentityRecord =
                    record::decode("identity", &bytes.into()).map_err(|bad| failed(bad.into()))?;
                if record.name != name {
                    return Err(IdentityError::OtherName {
                        dir: dir.into(),
                        found: record.name,
                        wanted: name.into(),
                    });
                }
                record
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(found) = data_without_identity(dir).map_err(failed)? {
                    let dir = dir.into();
                    return Err(IdentityError::NoIdentity { dir, found });
                }
                let record = IdentityRecord {
                    name: name.into(),
                    incarnation: draw(),
                    ..Default::default()
                };
                write(dir, &record).map_err(failed)?;
                record
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Self {
            dir: Some(dir.into()),
            record: ArcSwap::from_pointee(record),
            changing: Mutex::default(),
            lock: Mutex::new(Some(lock)),
        })
    }

    pub(crate) fn record(&self) -> IdentityRecord {
        IdentityRecord::clone(&self.record.load())
    }

    pub(crate) fn incarnation(&self) -> u64 {
        self.record.load().incarnation
    }

    /// Lets another process, or this one again, use the directory.
    pub(crate) fn release(&self) {
        self.lock.lock().take();
    }

    /// Accepts a formation, durably. One, ever: another one is refused, the same one again is fine.
    pub(crate) fn accept(&self, formation: &Formation) -> io::Result<bool> {
        let _changing = self.changing.lock();
        let record = self.record.load_full();
        match &record.accepted {
            Some(accepted) => return Ok(accepted == formation),
            None if record.cluster.is_some() => return Ok(false),
            None => {}
        }
        let changed = IdentityRecord {
            accepted: Some(formation.clone()),
            ..IdentityRecord::clone(&record)
        };
        self.store(changed)?;
        Ok(true)
    }

    pub(crate) fn belong(&self, cluster: ClusterRecord) -> io::Result<()> {
        let _changing = self.changing.lock();
        let record = self.record.load_full();
        let changed = IdentityRecord {
            cluster: Some(cluster),
            ..IdentityRecord::clone(&record)
        };
        self.store(changed)?;
        Ok(())
    }

    /// It must never take part again, whatever becomes of the process. The first reason stays.
    pub(crate) fn retire(&self, retired: Retired) -> io::Result<()> {
        let _changing = self.changing.lock();
        let record = self.record.load_full();
        if record.retired.is_some() {
            return Ok(());
        }
        let changed = IdentityRecord {
            retired: Some(retired),
            ..IdentityRecord::clone(&record)
        };
        self.store(changed)?;
        Ok(())
    }

    /// `None` if nothing outlives the process.
    pub(crate) fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    fn store(&self, record: IdentityRecord) -> io::Result<()> {
        if let Some(dir) = &self.dir {
            write(dir, &record)?;
        }
        self.record.store(Arc::new(record));
        Ok(())
    }
}

/// Which of a node's data is there already: only a node that has an identity has any.
fn data_without_identity(dir: &Path) -> io::Result<Option<&'static str>> {
    for name in ["log", "state"] {
        match std::fs::read_dir(dir.join(name)) {
            Ok(mut files) => {
                if files.next().is_some() {
                    return Ok(Some(name));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Never 0, which stands for none.
pub(crate) fn draw() -> u64 {
    rand::random_range(1..u64::MAX)
}

fn lock(dir: &Path) -> Result<File, IdentityError> {
    let failed = |error| IdentityError::Io {
        dir: dir.into(),
        error,
    };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join("lock"))
        .map_err(failed)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| IdentityError::InUse { dir: dir.into() })?;
    Ok(file)
}

fn write(dir: &Path, record: &IdentityRecord) -> io::Result<()> {
    replace_file(dir, FILE, &record::encode(record))
}

/// Durable on return; after a crash it is the old file or the new one.
pub(crate) fn replace_file(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_stays_who_it_is_and_accepts_one_formation_ever() {
        let dir = tempfile::tempdir().unwrap();
        let first = Formation {
            cluster_id: "first".into(),
            ..Default::default()
        };
        let incarnation = {
            let file = IdentityFile::open(Some(dir.path()), "a").unwrap();
            assert!(matches!(
                IdentityFile::open(Some(dir.path()), "a"),
                Err(IdentityError::InUse { .. })
            ));
            assert!(file.accept(&first).unwrap());
            file.incarnation()
        };
        let file = IdentityFile::open(Some(dir.path()), "a").unwrap();
        assert_eq!(file.incarnation(), incarnation);
        assert!(file.accept(&first).unwrap(), "the same one again");
        assert!(
            !file
                .accept(&Formation {
                    cluster_id: "second".into(),
                    ..Default::default()
                })
                .unwrap()
        );
        file.retire(Retired {
            reason: "removed".into(),
            ..Default::default()
        })
        .unwrap();
        drop(file);
        let file = IdentityFile::open(Some(dir.path()), "a").unwrap();
        assert_eq!(file.record().retired.unwrap().reason, "removed");
        drop(file);
        assert!(matches!(
            IdentityFile::open(Some(dir.path()), "b"),
            Err(IdentityError::OtherName { .. })
        ));
    }

    #[test]
    fn data_without_an_identity_is_nobodys() {
        for name in ["log", "state"] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join(name)).unwrap();
            drop(IdentityFile::open(Some(dir.path()), "a").expect("an empty directory is no data"));
            std::fs::remove_file(dir.path().join(FILE)).unwrap();
            std::fs::write(dir.path().join(name).join("x"), "data").unwrap();
            match IdentityFile::open(Some(dir.path()), "a").map(|_| ()) {
                Err(IdentityError::NoIdentity { found, .. }) => assert_eq!(found, name),
                other => panic!("{other:?}"),
            }
        }
    }
}
