//! What a run does to the store, and to the hash of the state with it.

use bytes::Bytes;

use super::hash::Sum;
use crate::store::{Family, StateBatch};

pub(crate) struct Effects {
    pub(crate) batch: StateBatch,
    pub(crate) sum: Sum,
}

impl Effects {
    pub(crate) fn new(sum: Sum) -> Self {
        Self {
            batch: StateBatch::default(),
            sum,
        }
    }

    pub(crate) fn put(&mut self, family: Family, key: impl Into<Bytes>, record: impl Into<Bytes>) {
        self.batch.put(family, key, record);
    }

    pub(crate) fn delete(&mut self, family: Family, key: impl Into<Bytes>) {
        self.batch.delete(family, key);
    }
}
