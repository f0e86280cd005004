//! Snapshots on their way: what is left behind, what is refused, and when a transfer has failed.

use futures::FutureExt;
use holdfast_proto::peer::SnapshotFile;

use super::*;
use crate::store::Engine;

const PATIENCE: Duration = Duration::from_secs(20);

fn sender(home: &Path) -> (Sender, Arc<State>) {
    let stores =
        Stores::open(Engine::DEFAULT, home, crate::store::Budget::default()).expect("stores");
    let state = State::open(&stores, 0, 1 << 20).expect("a state");
    let space = Arc::new(DiskSpace::open(Some(home), u64::MAX).expect("a disk"));
    let sender = Sender::new(stores, home.join("snapshots"), Arc::new(()), space);
    (sender.expect("a sender"), state)
}

fn announced(sizes_bytes: &[u64]) -> SnapshotHeader {
    let files = sizes_bytes.iter().map(|size_bytes| SnapshotFile {
        size_bytes: *size_bytes,
        ..Default::default()
    });
    SnapshotHeader {
        files: files.collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_snapshot_for_which_the_disk_has_no_room_is_refused() {
    let home = tempfile::tempdir().expect("a directory");
    let (sender, _state) = sender(home.path());
    let bytes = sender
        .room_for(&announced(&[1000, 24]))
        .await
        .expect("room");
    assert_eq!(bytes, 1024);
    for sizes in [&[u64::MAX / 2][..], &[u64::MAX, u64::MAX]] {
        let refused = sender.room_for(&announced(sizes)).await;
        assert!(
            matches!(refused, Err(SnapshotError::NoRoom { .. })),
            "{refused:?}"
        );
    }
}

#[tokio::test]
async fn so_many_snapshots_are_received_at_a_time_and_no_more() {
    let home = tempfile::tempdir().expect("a directory");
    let (sender, _state) = sender(home.path());
    let mut turns: Vec<_> = (0..AT_A_TIME)
        .map(|_| sender.begin_receiving().expect("a turn"))
        .collect();
    assert!(matches!(
        sender.begin_receiving(),
        Err(SnapshotError::TooMany)
    ));
    turns.pop();
    drop(sender.begin_receiving().expect("one has ended"));
}

/// Waits until the snapshots of a node take no place.
async fn nothing_left(scratch: &Path) {
    let emptied = async {
        while std::fs::read_dir(scratch)
            .expect("it is there")
            .next()
            .is_some()
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, emptied)
        .await
        .expect("the scratch directories go");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_whose_transfer_was_cancelled_leaves_nothing_behind() {
    let home = tempfile::tempdir().expect("a directory");
    let (sender, state) = sender(home.path());
    for _ in 0..20 {
        // Polled once: the checkpoint has begun, and goes on when its caller is gone.
        drop(sender.copy(state.clone()).now_or_never());
    }
    let ended = async {
        while Arc::strong_count(&state) > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended)
        .await
        .expect("the checkpoints end");
    nothing_left(&sender.scratch).await;
}

#[tokio::test]
async fn a_received_snapshot_that_is_not_installed_goes() {
    let home = tempfile::tempdir().expect("a directory");
    let (sender, _state) = sender(home.path());
    let scratch = sender.scratch("receive");
    std::fs::create_dir(scratch.path()).expect("created");
    std::fs::write(scratch.path().join("file"), "data").expect("written");
    let refused = crate::agreement::state_machine::SnapshotData::Received {
        dir: scratch,
        bytes: 4,
    };
    drop(refused);
    nothing_left(&sender.scratch).await;
}

#[tokio::test]
async fn an_installation_is_not_taken_for_a_stalled_transfer() {
    const STALL: Duration = Duration::from_millis(10);
    let still = Arc::new(Progress::default());
    assert!(matches!(
        stalled(still, STALL, PATIENCE).await,
        SnapshotError::Stalled
    ));

    let home = tempfile::tempdir().expect("a directory");
    std::fs::write(home.path().join("file"), vec![7; CHUNK_BYTES + 1]).expect("written");
    let progress = Arc::new(Progress::default());
    let files = list_files(home.path()).expect("listed");
    let sent: Vec<_> = chunks(home.path().to_owned(), files, progress.clone())
        .collect()
        .await;
    assert_eq!(
        (sent.len(), progress.chunks.load(Ordering::Relaxed)),
        (2, 2)
    );
    let installing = stalled(progress.clone(), STALL, Duration::from_secs(3600));
    assert!(
        tokio::time::timeout(STALL * 10, installing).await.is_err(),
        "it has an hour"
    );
    assert!(matches!(
        stalled(progress, STALL, STALL).await,
        SnapshotError::NotInstalled(_)
    ));
}
