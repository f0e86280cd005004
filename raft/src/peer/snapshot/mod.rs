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

mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use holdfast_proto::peer::{
    AppliedRecord, Header, InstallSnapshotRequest, InstallSnapshotResponse, SnapshotHeader,
    install_snapshot_request::Part, replica_service_client::ReplicaServiceClient,
};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Status, Streaming, transport::Channel};

use self::{
    receive::receive_files,
    send::{Progress, chunks, list_files, stalled},
};
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
