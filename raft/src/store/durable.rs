//! Files and directories that are there after power loss. A file is durable only with its own sync
//! and that of the directory which names it, so both live here. Must never know whose files they
//! are.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Makes the entries of a directory durable: what was created, renamed or removed in it.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)
        .and_then(|opened| opened.sync_all())
        .map_err(|error| named(error, "sync", directory))
}

/// Makes the directory that names `path` durable. A lone name is named by the working directory.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        None => Ok(()),
        Some(parent) if parent.as_os_str().is_empty() => sync_directory(Path::new(".")),
        Some(parent) => sync_directory(parent),
    }
}

/// Makes a directory of plain files durable, and its name.
pub(super) fn sync_files(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        File::open(&path)
            .and_then(|file| file.sync_all())
            .map_err(|error| named(error, "sync", &path))?;
    }
    sync_directory(directory)?;
    sync_parent(directory)
}

/// Creates a directory with its missing parents, each durable in its parent. One that is there may
/// have been made a moment ago by who did not sync its name: that is made good, unless its parent
/// is somebody else's and cannot be opened.
pub(super) fn create_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return match sync_parent(directory) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            synced => synced,
        };
    }
    if let Some(parent) = directory
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        create_directory(parent)?;
    }
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(named(error, "create", directory))
        }
        _ => sync_parent(directory),
    }
}

/// Replaces a small file: after a crash it holds the old bytes or the new ones.
pub(super) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new).map_err(|error| named(error, "create", &new))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path).map_err(|error| named(error, "replace", path))?;
    sync_parent(path)
}

/// Removes a directory and what is in it; one that is not there is fine.
pub(super) fn remove_directory(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(named(error, "remove", directory))
        }
        _ => sync_parent(directory),
    }
}

/// Bytes of all files below a directory. A file that goes away meanwhile counts as gone.
pub(super) fn size_bytes(directory: &Path) -> io::Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        match entry.metadata() {
            Ok(found) if found.is_dir() => total += size_bytes(&entry.path())?,
            Ok(found) => total += found.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(total)
}

/// The standard library's errors do not say which file.
pub(super) fn named(error: io::Error, verb: &str, path: &Path) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot {verb} {}: {error}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_name_is_made_durable_where_it_is() {
        sync_parent(Path::new("holdfast-data")).unwrap();
    }

    #[test]
    fn a_directory_is_created_with_its_parents_and_again() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("a").join("b");
        create_directory(&directory).unwrap();
        create_directory(&directory).unwrap();
        assert!(directory.is_dir());
    }
}
