//! What this node is configured to do with keys: the policies and the upstreams that they name.
//!
//! Promises that all of a set belongs together: a request takes the current set once and is judged
//! by it to its end, so that the set can be replaced while requests run. Must never know who takes
//! it.

use std::sync::Arc;

use arc_swap::ArcSwap;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    policy::{Matched, Policies, Policy},
    upstream::{Upstream, Upstreams},
};

/// One set of rules, never changed.
#[derive(Debug, Default)]
pub struct Rules {
    policies: Policies,
    upstreams: Upstreams,
    hash: u64,
}

/// The set that holds now. `load_full` it once per request, or per batch of background work.
pub type CurrentRules = Arc<ArcSwap<Rules>>;

impl Rules {
    pub fn new(policies: Policies, upstreams: Upstreams) -> Self {
        let hash = xxh3_64(format!("{policies:?}").as_bytes());
        Self {
            policies,
            upstreams,
            hash,
        }
    }

    /// Of the policies: nodes of one configuration and one version have the same.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn current(self) -> CurrentRules {
        Arc::new(ArcSwap::from_pointee(self))
    }

    /// `None` for a key without upstream.
    pub fn policy(&self, key: &[u8]) -> Option<&Policy> {
        self.policies.of(key)
    }

    /// As `policy`, with what its pattern captured.
    pub fn matched<'a>(&'a self, key: &'a [u8]) -> Option<Matched<'a>> {
        self.policies.find(key)
    }

    pub fn upstream(&self, name: &str) -> Option<&Arc<Upstream>> {
        self.upstreams.get(name)
    }
}
