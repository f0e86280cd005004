//! What both engines promise, told once and held against each.

mod log;
mod model;
mod state;

use std::path::PathBuf;

use bytes::Bytes;
use tempfile::TempDir;

use super::{Budget, Engine, Stores};

/// A node's data directory, whose stores can be opened again and again.
struct Home {
    engine: Engine,
    directory: TempDir,
    memory: Stores,
}

impl Home {
    fn new(engine: Engine) -> Self {
        Self {
            engine,
            directory: tempfile::tempdir().unwrap(),
            memory: Stores::memory(),
        }
    }

    /// As after a restart, if all handles of before are dropped.
    fn stores(&self) -> Stores {
        match self.engine {
            Engine::Memory => self.memory.clone(),
            Engine::Rocksdb => {
                Stores::open(self.engine, self.directory.path(), Budget::default()).unwrap()
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// One home for each engine of this build.
fn homes() -> impl Iterator<Item = Home> {
    let engines: &[Engine] = if cfg!(feature = "rocksdb") {
        &[Engine::Memory, Engine::Rocksdb]
    } else {
        &[Engine::Memory]
    };
    engines.iter().map(|engine| Home::new(*engine))
}

fn bytes(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}
