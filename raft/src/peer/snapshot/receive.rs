//! A snapshot on its way in: chunks become files, each checked before the next.

use std::path::Path;

use holdfast_proto::peer::{
    InstallSnapshotRequest, SnapshotChunk, SnapshotHeader, install_snapshot_request::Part,
};
use tokio::io::AsyncWriteExt;
use tonic::Streaming;
use xxhash_rust::xxh3::Xxh3;

use super::{STALLED, SnapshotError};

/// Files of one snapshot; a RocksDB checkpoint has a few hundred at most.
const FILES_MAX: usize = 100_000;

/// Writes each file as it comes and checks it before the next.
pub(super) async fn receive_files(
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
