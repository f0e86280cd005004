//! Reading every key of a state in the background: what fits comes into memory, and what does not is
//! noted in memory's filter.

use std::{io, sync::Arc};

use bytes::Bytes;

use super::{
    Generation, State,
    memory::{Loaded, Memory},
    read::read_entry,
};
use crate::store::{Family, StateStore};

impl State {
    /// Brings the stored entries into memory in the background. Until it ends, a look-up that finds
    /// nothing asks the disk.
    pub(super) fn load_memory(self: &Arc<Self>) {
        self.read_through(|generation, keys| {
            if let Err(error) = load(generation, keys) {
                tracing::warn!(%error, "loading entries into memory stopped: reads go to the disk");
            }
        });
    }

    /// Keys that came and went wear out what memory knows of the store's keys.
    pub(super) fn renew_filter(self: &Arc<Self>) {
        self.read_through(|generation, keys| {
            if let Err(error) = renew_filter(&generation.memory, keys) {
                tracing::warn!(%error, "the store's keys could not be read: more misses go to the disk");
            }
        });
    }

    /// Reads every key of the store in the background.
    fn read_through(self: &Arc<Self>, work: impl FnOnce(&Generation, Keys<'_>) + Send + 'static) {
        let generation = self.generation.load_full();
        let state = Arc::downgrade(self);
        // Detached on purpose: it holds one generation, ends by itself, and stops when the state is
        // gone or replaced.
        drop(crate::task::blocking(move || {
            let is_replaced = || {
                state
                    .upgrade()
                    .is_none_or(|state| !Arc::ptr_eq(&state.generation.load(), &generation))
            };
            let keys = Keys {
                store: generation.store.as_ref(),
                is_replaced: &is_replaced,
            };
            work(&generation, keys);
        }));
    }
}

/// The keys of one generation's store, read for as long as it is the state's.
struct Keys<'g> {
    store: &'g dyn StateStore,
    is_replaced: &'g dyn Fn() -> bool,
}

impl Keys<'_> {
    /// Whether all of them were.
    fn each(&self, mut each: impl FnMut(Bytes) -> io::Result<()>) -> io::Result<bool> {
        const CHECK_EVERY: usize = 1024;
        for (n, row) in self.store.scan(Family::Entry, b"", None).enumerate() {
            if n % CHECK_EVERY == 0 && (self.is_replaced)() {
                return Ok(false);
            }
            each(row?.0)?;
        }
        Ok(true)
    }
}

fn load(generation: &Generation, keys: Keys<'_>) -> io::Result<()> {
    let memory = &generation.memory;
    let mut is_full = false;
    let all = keys.each(|key| {
        // Once it is full the values need not be read.
        if is_full {
            memory.note_stored(&key);
            return Ok(());
        }
        // The ticket comes before the read; a key that changed meanwhile is read again.
        loop {
            let ticket = memory.ticket(&key);
            let Some(entry) = read_entry(generation.store.as_ref(), &key)? else {
                return Ok(());
            };
            match memory.load(&key, ticket, Arc::new(entry)) {
                Loaded::Kept => return Ok(()),
                Loaded::Changed => {}
                Loaded::Full => {
                    is_full = true;
                    return Ok(());
                }
            }
        }
    })?;
    if all {
        memory.loaded();
    }
    Ok(())
}

fn renew_filter(memory: &Memory, keys: Keys<'_>) -> io::Result<()> {
    // Another one may just have ended.
    if !memory.filter_is_worn() {
        return Ok(());
    }
    let Some(rebuild) = memory.rebuild_filter() else {
        return Ok(());
    };
    let all = keys.each(|key| {
        rebuild.note_stored(&key);
        Ok(())
    })?;
    if all {
        rebuild.finish();
    }
    Ok(())
}
