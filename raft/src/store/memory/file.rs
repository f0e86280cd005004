//! The memory engine's checkpoint: one file with every record and a checksum, so that snapshots of
//! both engines take the same path.
//!
//! ```text
//! "holdfast memory state 1\n" · (family u8 · key bytes u32 · value bytes u32 · key · value)* · 255 · xxh3 of all before, u64
//! ```

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use super::Tables;
use crate::store::{Family, durable};

const NAME: &str = "memory.state";
const OPENING: &[u8] = b"holdfast memory state 1\n";
const END: u8 = 255;
/// No record of a state comes near it: a damaged length must not ask for all memory.
const FIELD_BYTES_MAX: u32 = 64 << 20;

/// Writes `dir`, which must not exist, with the one file in it, durable on return.
pub(super) fn write(dir: &Path, tables: &Tables) -> io::Result<()> {
    std::fs::create_dir(dir).map_err(|error| durable::named(error, "create", dir))?;
    let mut writer = Hashed {
        inner: BufWriter::new(File::create(dir.join(NAME))?),
        hash: Xxh3::new(),
    };
    writer.put(OPENING)?;
    for family in Family::ALL {
        for (key, value) in tables.families[family as usize].iter() {
            writer.put(&[family as u8])?;
            writer.put(&length_of(key)?)?;
            writer.put(&length_of(value)?)?;
            writer.put(key)?;
            writer.put(value)?;
        }
    }
    writer.put(&[END])?;
    let checksum = writer.hash.digest();
    writer.inner.write_all(&checksum.to_be_bytes())?;
    writer
        .inner
        .into_inner()
        .map_err(|failed| failed.into_error())?
        .sync_all()?;
    durable::sync_files(dir)
}

/// Reads what [`write()`] wrote; anything else is an error.
pub(super) fn read(dir: &Path) -> io::Result<Tables> {
    let path = dir.join(NAME);
    let file = File::open(&path).map_err(|error| durable::named(error, "open", &path))?;
    let mut reader = Hashed {
        inner: BufReader::new(file),
        hash: Xxh3::new(),
    };
    if reader.take(OPENING.len())? != OPENING {
        return Err(damaged("it is of another format"));
    }
    let mut tables = Tables::default();
    loop {
        let tag = reader.take(1)?[0];
        if tag == END {
            break;
        }
        let family = *Family::ALL
            .get(usize::from(tag))
            .ok_or_else(|| damaged("it names an unknown family"))?;
        let key_bytes = reader.take_length()?;
        let value_bytes = reader.take_length()?;
        let key = reader.take(key_bytes)?;
        let value = reader.take(value_bytes)?;
        tables.put(family, &key, &value);
    }
    let expected = reader.hash.digest();
    let mut found = [0; 8];
    reader.inner.read_exact(&mut found)?;
    if u64::from_be_bytes(found) != expected {
        return Err(damaged("its checksum is wrong"));
    }
    Ok(tables)
}

/// Everything that passes is part of the checksum.
struct Hashed<S> {
    inner: S,
    hash: Xxh3,
}

impl<S: Write> Hashed<S> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.inner.write_all(bytes)
    }
}

impl<S: Read> Hashed<S> {
    fn take(&mut self, size_bytes: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; size_bytes];
        self.inner.read_exact(&mut bytes)?;
        self.hash.update(&bytes);
        Ok(bytes)
    }

    fn take_length(&mut self) -> io::Result<usize> {
        let bytes = self.take(4)?;
        let length = bytes
            .iter()
            .fold(0, |length, byte| length << 8 | u32::from(*byte));
        if length > FIELD_BYTES_MAX {
            return Err(damaged("a record in it is too long"));
        }
        Ok(length as usize)
    }
}

fn length_of(field: &[u8]) -> io::Result<[u8; 4]> {
    match u32::try_from(field.len()) {
        Ok(length) if length <= FIELD_BYTES_MAX => Ok(length.to_be_bytes()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a record of the state is over 64 MiB",
        )),
    }
}

fn damaged(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the file {NAME} cannot be read: {why}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> (tempfile::TempDir, std::path::PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("copy");
        let mut tables = Tables::default();
        tables.put(Family::Entry, b"a", b"1");
        tables.put(Family::System, b"", b"");
        write(&dir, &tables).unwrap();
        (home, dir)
    }

    #[test]
    fn what_was_written_is_read() {
        let (_home, dir) = written();
        let tables = read(&dir).unwrap();
        assert_eq!(
            tables.families[Family::Entry as usize]
                .get(&b"a"[..])
                .unwrap(),
            &b"1"[..]
        );
        assert_eq!(tables.families[Family::System as usize].len(), 1);
        assert_eq!(tables.size_bytes, 2);
    }

    #[test]
    fn any_damage_is_an_error() {
        let (_home, dir) = written();
        let path = dir.join(NAME);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bent = whole.clone();
            bent[at] ^= 0x40;
            std::fs::write(&path, &bent).unwrap();
            assert!(
                read(&dir).is_err(),
                "a flipped bit in byte {at} went unseen"
            );
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(read(&dir).is_err(), "a file cut at {at} went unseen");
        }
    }
}
