//! Reads the write-ahead files of the log before RocksDB replays them, and tells a torn write from
//! damage, which RocksDB does not: it takes whatever it cannot read in the last 32 KiB for torn, and
//! goes on without it.
//!
//! ```text
//! file      blocks of 32 KiB, each filled up with zeros where no header fits
//! fragment  checksum u32 LE (CRC-32C of type and payload, masked) · length u16 LE · type u8 · payload; never over two blocks
//! ```
//! What follows the last good fragment decides. Nothing, zeros, or a fragment that is cut off by the
//! end of the file or by a sector of zeros is what a crash leaves: the file is cut back to its last good
//! fragment, because RocksDB takes some of those for damage. Anything else is damage, and so is a
//! fragment that looks cut off but whose checksum holds for fewer bytes than its length says: then
//! the length is what changed. Whether what was cut off had been acknowledged is not seen here
//! (`synced.rs`).

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use super::crc32c::Crc32c;
use crate::store::durable;

const BLOCK_BYTES: usize = 32 << 10;
const HEADER_BYTES: usize = 7;
/// What a disk writes whole or not at all: zeros in the place of what was not written begin with it.
const SECTOR_BYTES: usize = 512;

/// RocksDB's types of fragments: full, first, middle, last; the compression of what follows; sizes
/// of timestamps; what is known of the file before.
const TYPES: [u8; 7] = [1, 2, 3, 4, 9, 10, 130];

/// An error of the kind `InvalidData` if one of the directory's write-ahead files is damaged. Torn
/// ones are cut back to what is whole.
pub(super) fn mend_torn(directory: &Path) -> io::Result<()> {
    for file in fs::read_dir(directory)? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "log")
            && let Some(whole_bytes) = torn_at(&path)?
        {
            tracing::warn!(file = %path.display(), whole_bytes, "a write that a crash tore is cut off the log");
            let file = File::options().write(true).open(&path);
            file.and_then(|file| file.set_len(whole_bytes).and_then(|()| file.sync_all()))
                .map_err(|error| durable::named(error, "cut", &path))?;
        }
    }
    Ok(())
}

/// How much of the file is whole, if a fragment is cut off after it.
fn torn_at(path: &Path) -> io::Result<Option<u64>> {
    let failed = |error| durable::named(error, "read", path);
    let mut file = File::open(path).map_err(failed)?;
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    let (mut offset, mut torn, mut ended) = (0u64, None, false);
    loop {
        block.clear();
        let mut part = Read::by_ref(&mut file).take(BLOCK_BYTES as u64);
        if part.read_to_end(&mut block).map_err(failed)? == 0 {
            return Ok(torn);
        }
        let checked = match ended {
            true => zeros_from(&block, 0).map(|()| End::Zeros),
            false => check_block(&block),
        };
        match checked {
            Ok(End::OfBlock) => {}
            Ok(End::Zeros) => ended = true,
            Ok(End::CutOff { at }) => (torn, ended) = (Some(offset + at as u64), true),
            Err(Damage { at, what }) => {
                let message = format!(
                    "{} is damaged at byte {}: {what}. No crash leaves that behind, so what was acknowledged may be lost: restore this node's data from a copy, or remove it and let the node join again",
                    path.display(),
                    offset + at as u64
                );
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
        offset += block.len() as u64;
    }
}

/// How the good part of a block ends. Zeros at most may follow the second and third.
#[derive(Debug, PartialEq, Eq)]
enum End {
    OfBlock,
    Zeros,
    CutOff { at: usize },
}

#[derive(Debug, PartialEq, Eq)]
struct Damage {
    at: usize,
    what: &'static str,
}

fn check_block(block: &[u8]) -> Result<End, Damage> {
    let mut at = 0;
    loop {
        let rest = &block[at..];
        let Some((header, payload)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return match block.len() {
                // No header fits: zeros fill the block up.
                BLOCK_BYTES => zeros_from(block, at).map(|()| End::OfBlock),
                _ if rest.is_empty() => Ok(End::Zeros),
                _ => Ok(End::CutOff { at }),
            };
        };
        match check_fragment(at, header, payload) {
            Fragment::Good { length } => at += HEADER_BYTES + length,
            Fragment::Zeros => return Ok(End::Zeros),
            Fragment::CutOff => return Ok(End::CutOff { at }),
            Fragment::Damaged(what) => return Err(Damage { at, what }),
        }
    }
}

enum Fragment {
    Good { length: usize },
    Zeros,
    CutOff,
    Damaged(&'static str),
}

/// At a place in its block; `payload` is all that follows the header there.
fn check_fragment(at: usize, header: &[u8; HEADER_BYTES], payload: &[u8]) -> Fragment {
    let begin = at + HEADER_BYTES;
    let [c0, c1, c2, c3, l0, l1, kind] = *header;
    let (checksum, length) = (
        u32::from_le_bytes([c0, c1, c2, c3]),
        usize::from(u16::from_le_bytes([l0, l1])),
    );
    let written = payload.len() - payload.iter().rev().take_while(|byte| **byte == 0).count();
    if kind == 0 && written == 0 {
        return match header {
            [0, 0, 0, 0, 0, 0, 0] => Fragment::Zeros,
            _ => Fragment::CutOff,
        };
    }
    if !TYPES.contains(&kind) {
        return Fragment::Damaged("there is no such type of record");
    }
    if begin + length > BLOCK_BYTES {
        return Fragment::Damaged("a record is longer than its block");
    }
    if let Some(whole) = payload.get(..length) {
        if checksum_of(kind, whole) == checksum {
            return Fragment::Good { length };
        }
        let last_sector = (begin + length).saturating_sub(1) / SECTOR_BYTES * SECTOR_BYTES;
        if begin + written > last_sector {
            return Fragment::Damaged("a record's checksum does not hold");
        }
    }
    if holds_for_less(kind, payload, checksum) {
        return Fragment::Damaged("a record's length does not hold");
    }
    Fragment::CutOff
}

fn checksum_of(kind: u8, payload: &[u8]) -> u32 {
    let mut sum = Crc32c::new();
    sum.update(&[kind]);
    sum.update(payload);
    sum.masked()
}

/// Whether the checksum is that of a beginning of the payload.
fn holds_for_less(kind: u8, payload: &[u8], checksum: u32) -> bool {
    let mut sum = Crc32c::new();
    sum.update(&[kind]);
    std::iter::once(sum)
        .chain(payload.iter().map(|byte| {
            sum.update(std::slice::from_ref(byte));
            sum
        }))
        .any(|sum| sum.masked() == checksum)
}

fn zeros_from(block: &[u8], at: usize) -> Result<(), Damage> {
    match block[at..].iter().position(|byte| *byte != 0) {
        None => Ok(()),
        Some(position) => Err(Damage {
            at: at + position,
            what: "there is something after the last record",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(payload.len()).expect("fits");
        let checksum = checksum_of(kind, payload).to_le_bytes();
        [&checksum[..], &length.to_le_bytes(), &[kind], payload].concat()
    }

    /// Two fragments, and where the second begins.
    fn two() -> (Vec<u8>, usize) {
        let first = fragment(1, b"the first");
        let at = first.len();
        ([first, fragment(1, &[7; 300])].concat(), at)
    }

    #[test]
    fn a_block_that_was_written_whole_is_good() {
        let (good, _) = two();
        assert_eq!(check_block(&good), Ok(End::Zeros));
        let full = fragment(2, &vec![9; BLOCK_BYTES - HEADER_BYTES]);
        assert_eq!(check_block(&full), Ok(End::OfBlock));
        let trailer = [
            fragment(1, &vec![9; BLOCK_BYTES - HEADER_BYTES - 3]),
            vec![0; 3],
        ]
        .concat();
        assert_eq!(check_block(&trailer), Ok(End::OfBlock));
    }

    #[test]
    fn what_is_cut_off_anywhere_is_torn() {
        let (good, at) = two();
        for end in at + 1..good.len() {
            let cut = &good[..end];
            assert_eq!(check_block(cut), Ok(End::CutOff { at }), "cut at {end}");
        }
        let zeros = [&good[..], &[0; 1000]].concat();
        assert_eq!(check_block(&zeros), Ok(End::Zeros));
    }

    #[test]
    fn sectors_that_were_not_written_are_torn_and_zeros_of_the_record_are_not() {
        let (mut good, _) = two();
        let at = good.len();
        let ends_in_zeros = [vec![7; 3000], vec![0; 100]].concat();
        good.extend(fragment(1, &ends_in_zeros));
        assert_eq!(check_block(&good), Ok(End::Zeros));
        for sector in 1..=good.len() / SECTOR_BYTES {
            let mut torn = good.clone();
            torn[sector * SECTOR_BYTES..].fill(0);
            assert_eq!(
                check_block(&torn),
                Ok(End::CutOff { at }),
                "sector {sector}"
            );
        }
        good[at + 100] ^= 1;
        assert!(check_block(&good).is_err());
    }

    #[test]
    fn one_flipped_bit_anywhere_is_damage() {
        let (good, _) = two();
        for bit in 0..good.len() * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(check_block(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn something_after_the_end_is_damage() {
        let (good, _) = two();
        let late = [&good[..], &[0; 1000], b"x"].concat();
        assert!(check_block(&late).is_err());
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("000001.log");
        fs::write(&path, [&good[..], &[0; 2 * BLOCK_BYTES], b"x"].concat()).unwrap();
        let said = mend_torn(home.path()).unwrap_err();
        assert_eq!(said.kind(), io::ErrorKind::InvalidData);
        assert!(said.to_string().contains("damaged at byte"), "{said}");
    }

    #[test]
    fn a_torn_file_is_cut_back_to_what_is_whole() {
        let (good, at) = two();
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("000001.log");
        fs::write(&path, &good[..at + 50]).unwrap();
        mend_torn(home.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), &good[..at]);
    }
}
