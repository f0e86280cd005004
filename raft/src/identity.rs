//! Who this node is, in its data directory: a name, an incarnation drawn once, and the cluster it
//! belongs to.
//!
//! Each change is a new file, synced, renamed over the old one, and its directory synced. A lock
//! keeps a second process out.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use holdfast_proto::peer::{ClusterRecord, Formation, IdentityRecord};
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
}

/// The identity as it is on disk, or only in memory for the memory engine.
pub(crate) struct IdentityFile {
    dir: Option<PathBuf>,
    record: Mutex<IdentityRecord>,
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
                record: Mutex::new(record),
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
            record: Mutex::new(record),
            lock: Mutex::new(Some(lock)),
        })
    }

    pub(crate) fn record(&self) -> IdentityRecord {
        self.record.lock().clone()
    }

    pub(crate) fn incarnation(&self) -> u64 {
        self.record.lock().incarnation
    }

    /// Lets another process, or this one again, use the directory.
    pub(crate) fn release(&self) {
        self.lock.lock().take();
    }

    /// Accepts a formation, durably. One, ever: another one is refused, the same one again is fine.
    pub(crate) fn accept(&self, formation: &Formation) -> io::Result<bool> {
        let mut record = self.record.lock();
        match &record.accepted {
            Some(accepted) => return Ok(accepted == formation),
            None if record.cluster.is_some() => return Ok(false),
            None => {}
        }
        let changed = IdentityRecord {
            accepted: Some(formation.clone()),
            ..record.clone()
        };
        self.store(&changed)?;
        *record = changed;
        Ok(true)
    }

    pub(crate) fn belong(&self, cluster: ClusterRecord) -> io::Result<()> {
        let mut record = self.record.lock();
        let changed = IdentityRecord {
            cluster: Some(cluster),
            ..record.clone()
        };
        self.store(&changed)?;
        *record = changed;
        Ok(())
    }

    fn store(&self, record: &IdentityRecord) -> io::Result<()> {
        match &self.dir {
            Some(dir) => write(dir, record),
            None => Ok(()),
        }
    }
}

/// Never 0, which stands for none.
fn draw() -> u64 {
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
    let (temporary, target) = (dir.join("identity.new"), dir.join(FILE));
    let mut file = File::create(&temporary)?;
    file.write_all(&record::encode(record))?;
    file.sync_all()?;
    std::fs::rename(&temporary, &target)?;
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
        drop(file);
        assert!(matches!(
            IdentityFile::open(Some(dir.path()), "b"),
            Err(IdentityError::OtherName { .. })
        ));
    }
}
