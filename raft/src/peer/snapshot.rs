//! A state on its way to a follower that the log can no longer bring up: a header, then files in
//! chunks.
//!
//! The sender makes a checkpoint only when it sends, off the async threads, and removes it
//! afterwards. The receiver writes into a directory of its own, checks sizes and checksums, syncs,
//! and hands the directory to `State::install`, which swaps. How far the snapshot is and who its
//! members are is read from the checkpoint itself: it may be newer than what was announced when the
//! transfer was decided.
//!
//! Bounded: two are sent and two received at a time, each for as long as a slow link may take and
//! no longer, and none is received for which the disk has no room.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use holdfast_proto::peer::{
    AppliedRecord, Header, InstallSnapshotRequest, InstallSnapshotResponse, SnapshotChunk,
    SnapshotFile, SnapshotHeader, install_snapshot_request::Part,
    replica_service_client::ReplicaServiceClient,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Semaphore, SemaphorePermit},
};
use tonic::{Status, Streaming, transport::Channel};
use xxhash_rust::xxh3::Xxh3;

use crate::{
    agreement::types::{Vote, vote_to},
    events::Events,
    state::{State, owner, record},
    store::{Family, Stores, space::DiskSpace},
    task,
};

const FORMAT: u32 = 1;
const CHUNK_BYTES: usize = 512 << 10;
/// A transfer on which nothing moves for this long has failed.
const STALLED: Duration = Duration::from_secs(30);
/// Snapshots that are sent at a time, each with its checkpoint, and received.
const AT_A_TIME: usize = 2;
/// What a link must carry at least: a transfer that takes longer has failed.
const BYTES_PER_SECOND_MIN: u64 = 256 << 10;
/// Files of one snapshot; a RocksDB checkpoint has a few hundred at most.
const FILES_MAX: usize = 100_000;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("the snapshot's files: {0}")]
    Io(#[from] io::Error),
    #[error("the peer: {0}")]
    Peer(Box<Status>),
    #[error("the peer took nothing of the snapshot for {} s", STALLED.as_secs())]
    Stalled,
    #[error("the snapshot was not transferred within {} s", .0.as_secs())]
    TooSlow(Duration),
    #[error("it takes {bytes} bytes, and the disk has room for {room}")]
    NoRoom { bytes: u64, room: u64 },
    #[error("{AT_A_TIME} snapshots are being received already")]
    TooMany,
    #[error("the peer did not install the snapshot within {} s", .0.as_secs())]
    NotInstalled(Duration),
    #[error("the snapshot is not usable here: {0}")]
    Unusable(String),
}

impl From<Status> for SnapshotError {
    fn from(status: Status) -> Self {
        Self::Peer(Box::new(status))
    }
}

/// Makes checkpoints and sends them.
pub(crate) struct Sender {
    stores: Stores,
    scratch: PathBuf,
    events: Arc<dyn Events>,
    space: Arc<DiskSpace>,
    sending: Semaphore,
    receiving: Semaphore,
    serial: AtomicU64,
}

/// A directory that is removed with its owner. Whoever works in it owns it: work off the async
/// threads goes on when the call that began it is cancelled, and would leave behind what it makes
/// after that.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let dir = std::mem::take(&mut self.0);
        // Gigabytes may go: not on a thread that others wait for.
        match tokio::runtime::Handle::try_current() {
            Ok(_) => drop(task::blocking(move || remove(&dir))),
            Err(_) => remove(&dir),
        }
    }
}

fn remove(dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, dir = %dir.display(), "a snapshot's scratch directory stays behind");
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        remove(&self.scratch);
    }
}

impl Sender {
    /// What an earlier process left in the scratch directory is removed.
    pub(crate) fn new(
        stores: Stores,
        scratch: PathBuf,
        events: Arc<dyn Events>,
        space: Arc<DiskSpace>,
    ) -> io::Result<Self> {
        if scratch.exists() {
            std::fs::remove_dir_all(&scratch)?;
        }
        std::fs::create_dir_all(&scratch)?;
        Ok(Self {
            stores,
            scratch,
            events,
            space,
            sending: Semaphore::new(AT_A_TIME),
            receiving: Semaphore::new(AT_A_TIME),
            serial: AtomicU64::new(0),
        })
    }

    fn scratch(&self, what: &str) -> Scratch {
        Scratch(self.scratch.join(format!(
            "{what}-{}",
            self.serial.fetch_add(1, Ordering::Relaxed)
        )))
    }

    /// The follower has so long to install what it was sent.
    pub(crate) async fn send(
        &self,
        state: &Arc<State>,
        client: ReplicaServiceClient<Channel>,
        header: Option<Header>,
        vote: &Vote,
        install_timeout: Duration,
    ) -> Result<InstallSnapshotResponse, SnapshotError> {
        let header = SnapshotHeader {
            header,
            vote: Some(vote_to(vote)),
            ..Default::default()
        };
        self.send_as(state, client, header, install_timeout).await
    }

    /// As `send`, to a follower whose state has diverged.
    pub(crate) async fn repair(
        &self,
        state: &Arc<State>,
        client: ReplicaServiceClient<Channel>,
        header: Option<Header>,
        vote: &Vote,
        install_timeout: Duration,
    ) -> Result<InstallSnapshotResponse, SnapshotError> {
        let header = SnapshotHeader {
            header,
            vote: Some(vote_to(vote)),
            repair: true,
            ..Default::default()
        };
        self.send_as(state, client, header, install_timeout).await
    }

    async fn send_as(
        &self,
        state: &Arc<State>,
        mut client: ReplicaServiceClient<Channel>,
        header: SnapshotHeader,
        install_timeout: Duration,
    ) -> Result<InstallSnapshotResponse, SnapshotError> {
        let _turn = self.sending.acquire().await.map_err(io::Error::other)?;
        let (scratch, source, stores) = (self.scratch("send"), state.clone(), self.stores.clone());
        let (scratch, applied, files) = task::blocking(move || -> io::Result<_> {
            source.checkpoint(scratch.path())?;
            let files = list_files(scratch.path())?;
            let applied = read_applied(&stores, scratch.path())?;
            Ok((scratch, applied, files))
        })
        .await
        .map_err(io::Error::other)??;

        let bytes = files.iter().map(|file| file.size_bytes).sum();
        tracing::info!(
            shard = state.shard(),
            bytes,
            files = files.len(),
            "sending a snapshot"
        );
        let announced = SnapshotHeader {
            format: FORMAT,
            engine: self.stores.engine_version().into(),
            last_log_id: applied.last_applied,
            membership_log_id: applied.membership_log_id,
            membership: applied.membership,
            files: files.clone(),
            ..header
        };
        let progress = Arc::new(Progress::default());
        let parts = futures::stream::once(futures::future::ready(InstallSnapshotRequest {
            part: Some(Part::Header(announced)),
        }))
        .chain(chunks(scratch.path().to_owned(), files, progress.clone()));
        let response = tokio::select! {
            response = client.install_snapshot(parts) => response?.into_inner(),
            error = stalled(progress, STALLED, install_timeout) => return Err(error),
            () = tokio::time::sleep(transfer_timeout(bytes) + install_timeout) => {
                return Err(SnapshotError::TooSlow(transfer_timeout(bytes)));
            }
        };
        self.events.snapshot_sent(state.shard(), bytes);
        Ok(response)
    }

    /// Keeps a copy of a state that is about to be replaced: one for each shard, the newest.
    pub(crate) async fn set_aside(&self, state: Arc<State>) -> io::Result<()> {
        let Some(data) = self.scratch.parent().filter(|_| self.stores.is_durable()) else {
            return Ok(());
        };
        let dir = data.join("diverged").join(state.shard().to_string());
        task::blocking(move || {
            remove(&dir);
            std::fs::create_dir_all(dir.parent().unwrap_or(&dir))?;
            state.checkpoint(&dir)
        })
        .await
        .map_err(io::Error::other)?
    }

    /// The state as files, for who is here.
    pub(crate) async fn copy(&self, state: Arc<State>) -> io::Result<Scratch> {
        let scratch = self.scratch("copy");
        task::blocking(move || state.checkpoint(scratch.path()).map(|()| scratch))
            .await
            .map_err(io::Error::other)?
    }

    /// Receives a snapshot into a directory. The header is what the caller has already taken from
    /// the stream and checked.
    pub(crate) async fn receive(
        &self,
        header: &SnapshotHeader,
        parts: &mut Streaming<InstallSnapshotRequest>,
    ) -> Result<(Scratch, AppliedRecord, u64), SnapshotError> {
        if header.format != FORMAT {
            return Err(SnapshotError::Unusable(format!(
                "it has format {}, this version reads {FORMAT}",
                header.format
            )));
        }
        if engine_family(&header.engine) != engine_family(self.stores.engine_version()) {
            let message = format!(
                "it was written by {}, this node keeps {}",
                header.engine,
                self.stores.engine_version()
            );
            return Err(SnapshotError::Unusable(message));
        }
        let _turn = self.begin_receiving()?;
        let bytes = self.room_for(header).await?;
        let scratch = self.scratch("receive");
        let made =
            task::blocking(move || std::fs::create_dir_all(scratch.path()).map(|()| scratch));
        let scratch = made.await.map_err(io::Error::other)??;
        let received = receive_files(scratch.path(), header, parts);
        tokio::time::timeout(transfer_timeout(bytes), received)
            .await
            .map_err(|_| SnapshotError::TooSlow(transfer_timeout(bytes)))??;
        let stores = self.stores.clone();
        let cluster_id = header
            .header
            .as_ref()
            .map_or(String::new(), |header| header.cluster_id.clone());
        let (scratch, applied) = task::blocking(move || -> io::Result<_> {
            sync_dir(scratch.path())?;
            if let Some(owner) =
                stores.read_checkpoint(scratch.path(), Family::System, record::CLUSTER)?
            {
                owner::check(owner, &cluster_id)?;
            }
            let applied = read_applied(&stores, scratch.path())?;
            Ok((scratch, applied))
        })
        .await
        .map_err(io::Error::other)??;
        Ok((scratch, applied, bytes))
    }

    fn begin_receiving(&self) -> Result<SemaphorePermit<'_>, SnapshotError> {
        self.receiving
            .try_acquire()
            .map_err(|_| SnapshotError::TooMany)
    }

    /// How many bytes are announced, if the disk has room for them.
    async fn room_for(&self, header: &SnapshotHeader) -> Result<u64, SnapshotError> {
        let bytes = header
            .files
            .iter()
            .fold(0u64, |sum, file| sum.saturating_add(file.size_bytes));
        let space = self.space.clone();
        let room = task::blocking(move || space.room_bytes())
            .await
            .map_err(io::Error::other)??;
        if bytes > room {
            return Err(SnapshotError::NoRoom { bytes, room });
        }
        Ok(bytes)
    }
}

/// What a transfer of so many bytes may take.
fn transfer_timeout(bytes: u64) -> Duration {
    STALLED + Duration::from_secs(bytes / BYTES_PER_SECOND_MIN)
}

/// How far a transfer is.
#[derive(Default)]
struct Progress {
    chunks: AtomicU64,
    /// Everything was taken: what the receiver does from here on is the installation.
    all_taken: AtomicBool,
}

/// Resolves once nothing has moved for too long, or the installation takes too long.
async fn stalled(
    progress: Arc<Progress>,
    stall: Duration,
    install_timeout: Duration,
) -> SnapshotError {
    let mut before = progress.chunks.load(Ordering::Relaxed);
    loop {
        tokio::time::sleep(stall).await;
        if progress.all_taken.load(Ordering::Relaxed) {
            tokio::time::sleep(install_timeout).await;
            return SnapshotError::NotInstalled(install_timeout);
        }
        let now = progress.chunks.load(Ordering::Relaxed);
        if now == before {
            return SnapshotError::Stalled;
        }
        before = now;
    }
}

/// The files' bytes in order.
fn chunks(
    dir: PathBuf,
    files: Vec<SnapshotFile>,
    progress: Arc<Progress>,
) -> impl Stream<Item = InstallSnapshotRequest> + Send {
    let chunks =
        futures::stream::iter(files.into_iter().enumerate()).flat_map(move |(number, file)| {
            let path = dir.join(&file.name);
            let open = async move { tokio::fs::File::open(path).await };
            futures::stream::once(open).flat_map(move |opened| match opened {
                Ok(file) => read_chunks(file, number).left_stream(),
                Err(error) => {
                    tracing::error!(%error, "a snapshot's file cannot be read");
                    futures::stream::empty().right_stream()
                }
            })
        });
    let moving = progress.clone();
    let end = futures::stream::poll_fn(move |_| {
        progress.all_taken.store(true, Ordering::Relaxed);
        Poll::Ready(None)
    });
    let moved = move |_: &InstallSnapshotRequest| {
        moving.chunks.fetch_add(1, Ordering::Relaxed);
    };
    chunks.inspect(moved).chain(end)
}

fn read_chunks(
    file: tokio::fs::File,
    number: usize,
) -> impl Stream<Item = InstallSnapshotRequest> + Send {
    futures::stream::unfold(file, move |mut file| async move {
        let mut data = Vec::with_capacity(CHUNK_BYTES);
        match (&mut file)
            .take(CHUNK_BYTES as u64)
            .read_to_end(&mut data)
            .await
        {
            Ok(0) => None,
            Ok(_) => {
                let chunk = SnapshotChunk {
                    file: u32::try_from(number).unwrap_or(u32::MAX),
                    data: Bytes::from(data),
                };
                Some((
                    InstallSnapshotRequest {
                        part: Some(Part::Chunk(chunk)),
                    },
                    file,
                ))
            }
            // The receiver misses bytes and says so.
            Err(error) => {
                tracing::error!(%error, "a snapshot's file cannot be read");
                None
            }
        }
    })
}

/// Writes each file as it comes and checks it before the next.
async fn receive_files(
    dir: &Path,
    header: &SnapshotHeader,
    parts: &mut Streaming<InstallSnapshotRequest>,
) -> Result<(), SnapshotError> {
    if header.files.len() > FILES_MAX {
        return Err(SnapshotError::Unusable(format!(
            "it has {} files",
            header.files.len()
        )));
    }
    let mut pending: Option<SnapshotChunk> = None;
    for (number, file) in header.files.iter().enumerate() {
        let mut out = tokio::fs::File::create_new(dir.join(safe_name(&file.name)?)).await?;
        let (mut hasher, mut size) = (Xxh3::new(), 0u64);
        while size < file.size_bytes {
            let chunk = match pending.take() {
                Some(chunk) => chunk,
                None => next_chunk(parts).await?,
            };
            if usize::try_from(chunk.file).ok() != Some(number)
                || size + chunk.data.len() as u64 > file.size_bytes
            {
                return Err(SnapshotError::Unusable(format!(
                    "file `{}` is not as it was announced",
                    file.name
                )));
            }
            size += chunk.data.len() as u64;
            hasher.update(&chunk.data);
            out.write_all(&chunk.data).await?;
        }
        if hasher.digest() != file.checksum {
            return Err(SnapshotError::Unusable(format!(
                "file `{}` was damaged on its way",
                file.name
            )));
        }
        out.sync_all().await?;
    }
    Ok(())
}

async fn next_chunk(
    parts: &mut Streaming<InstallSnapshotRequest>,
) -> Result<SnapshotChunk, SnapshotError> {
    let message = tokio::time::timeout(STALLED, parts.message())
        .await
        .map_err(|_| SnapshotError::Stalled)??;
    match message.and_then(|message| message.part) {
        Some(Part::Chunk(chunk)) => Ok(chunk),
        _ => Err(SnapshotError::Unusable("it ends early".into())),
    }
}

/// A peer names files, not paths.
fn safe_name(name: &str) -> Result<&str, SnapshotError> {
    let plain =
        !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0']);
    plain
        .then_some(name)
        .ok_or_else(|| SnapshotError::Unusable("one of its files has no plain name".into()))
}

fn list_files(dir: &Path) -> io::Result<Vec<SnapshotFile>> {
    let mut files = Vec::new();
    for item in std::fs::read_dir(dir)? {
        let item = item?;
        if !item.file_type()?.is_file() {
            continue;
        }
        let mut file = std::fs::File::open(item.path())?;
        let (mut hasher, mut size_bytes, mut buffer) = (Xxh3::new(), 0u64, vec![0; CHUNK_BYTES]);
        loop {
            let read = io::Read::read(&mut file, &mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            size_bytes += read as u64;
        }
        let name = item
            .file_name()
            .into_string()
            .map_err(|_| io::Error::other("a checkpoint file has an odd name"))?;
        files.push(SnapshotFile {
            name,
            size_bytes,
            checksum: hasher.digest(),
        });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn read_applied(stores: &Stores, dir: &Path) -> io::Result<AppliedRecord> {
    let bytes = stores.read_checkpoint(dir, Family::System, record::APPLIED)?;
    let bytes = bytes.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "a checkpoint without its applied record",
        )
    })?;
    Ok(record::decode("applied", &bytes)?)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}

/// Files of one engine can be read by other versions of it, never by the other engine.
fn engine_family(version: &str) -> &str {
    version.split_whitespace().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

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
}
