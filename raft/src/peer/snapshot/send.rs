//! A snapshot on its way out: the files of a checkpoint in chunks, and a watch on whether they move.

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
    InstallSnapshotRequest, SnapshotChunk, SnapshotFile, install_snapshot_request::Part,
};
use tokio::io::AsyncReadExt;
use xxhash_rust::xxh3::Xxh3;

use super::{CHUNK_BYTES, SnapshotError};

/// How far a transfer is.
#[derive(Default)]
pub(super) struct Progress {
    pub(super) chunks: AtomicU64,
    /// Everything was taken: what the receiver does from here on is the installation.
    all_taken: AtomicBool,
}

/// Resolves once nothing has moved for too long, or the installation takes too long.
pub(super) async fn stalled(
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
pub(super) fn chunks(
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

/// What there is to send, with sizes and checksums. Reads everything: off the async threads.
pub(super) fn list_files(dir: &Path) -> io::Result<Vec<SnapshotFile>> {
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
