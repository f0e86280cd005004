//! That a state is not the majority's, in the state itself: a restart does not make it right. The
//! mark goes with the state when another one takes its place.

use std::io;

use bytes::Bytes;

use super::record::{self, FORMAT};
use crate::store::{Family, StateBatch, StateStore};

/// Durable on return.
pub(super) fn mark(store: &dyn StateStore) -> io::Result<()> {
    let mut batch = StateBatch::default();
    let mark = Bytes::from_static(&[FORMAT]);
    batch.put(Family::System, record::DIVERGED, mark);
    store.write(batch)?;
    store.flush()
}

pub(super) fn is_marked(store: &dyn StateStore) -> io::Result<bool> {
    Ok(store.get(Family::System, record::DIVERGED)?.is_some())
}
