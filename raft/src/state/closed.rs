//! What is left of a state that was closed: whoever still reads finds an error, never another
//! state.

use std::{io, path::Path};

use bytes::Bytes;

use crate::store::{Family, Scan, StateBatch, StateStore};

pub(super) struct Closed;

pub(super) fn closed<T>() -> io::Result<T> {
    Err(io::Error::new(
        io::ErrorKind::NotConnected,
        "the state is closed",
    ))
}

impl StateStore for Closed {
    fn get(&self, _: Family, _: &[u8]) -> io::Result<Option<Bytes>> {
        closed()
    }

    fn get_many(&self, _: Family, _: &[&[u8]]) -> io::Result<Vec<Option<Bytes>>> {
        closed()
    }

    fn scan<'a>(&'a self, _: Family, _: &[u8], _: Option<&[u8]>) -> Scan<'a> {
        Box::new(std::iter::once(closed()))
    }

    fn write(&self, _: StateBatch) -> io::Result<()> {
        closed()
    }

    fn flush(&self) -> io::Result<()> {
        closed()
    }

    fn checkpoint(&self, _: &Path) -> io::Result<()> {
        closed()
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        closed()
    }

    fn compact(&self) -> io::Result<()> {
        closed()
    }
}
