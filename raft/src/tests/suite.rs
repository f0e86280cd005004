//! openraft's own storage suite, on our log and state machine, with both engines.

use std::sync::Arc;

use openraft::{
    StorageError,
    testing::log::{StoreBuilder, Suite},
    type_config::TypeConfigExt,
};
use tempfile::TempDir;

use crate::{
    agreement::{
        log::{ShardLog, SharedLog},
        state_machine::StateMachine,
        types::Types,
    },
    clock::Clock,
    peer::snapshot,
    state::State,
    store::{Budget, Engine, Stores, space::DiskSpace},
};

struct Builder(Engine);

impl StoreBuilder<Types, ShardLog, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, ShardLog, StateMachine), StorageError<Types>> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let stores = Stores::open(self.0, dir.path(), Budget::default()).expect("stores");
        let log = SharedLog::open(
            stores.open_log().expect("a log"),
            Clock::system(),
            Arc::new(()),
        );
        let space = Arc::new(DiskSpace::open(None, u64::MAX).expect("a disk"));
        let scratch = dir.path().join("snapshots");
        let snapshots =
            snapshot::Sender::new(stores.clone(), scratch, Arc::new(()), space).expect("snapshots");
        let state = State::open(&stores, 0, 1 << 20).expect("a state");
        let machine =
            StateMachine::new(state, Arc::new(snapshots), Arc::new(())).expect("a state machine");
        Ok((dir, log.shard(0).expect("a shard's log"), machine))
    }
}

#[test]
fn openrafts_suite_passes_on_the_memory_engine() {
    Types::run(async {
        Suite::test_all(Builder(Engine::Memory))
            .await
            .expect("the suite")
    });
}

#[cfg(feature = "rocksdb")]
#[test]
fn openrafts_suite_passes_on_rocksdb() {
    Types::run(async {
        Suite::test_all(Builder(Engine::Rocksdb))
            .await
            .expect("the suite")
    });
}
