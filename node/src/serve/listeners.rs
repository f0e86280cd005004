//! The three listeners' terms, of one process's descriptors.

use std::{sync::Arc, time::Duration};

use holdfast_raft::Clock;

use super::{Connections, Terms};
use crate::resources;

/// Connections of each listener, where the limit of descriptors allows so many.
const CLIENTS_MAX: usize = 10_000;
/// Each member has a handful.
const PEERS_MAX: usize = 1024;
/// Probes and scrapers.
const ADMINS_MAX: usize = 256;
/// How long a connection may be idle: clients dial again without noticing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// No probe and no scrape takes so long.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Who is connected to a node.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) client: Arc<Connections>,
    pub(crate) peer: Arc<Connections>,
    pub(crate) admin: Arc<Connections>,
}

impl Listeners {
    /// A fifth of the descriptors is left to storage, other nodes and upstreams.
    pub(crate) fn new(clock: &Clock) -> Arc<Self> {
        let descriptors = resources::descriptors_max();
        let listener = |listener, most: usize, part: u64, busy| {
            let share = usize::try_from(descriptors / part).unwrap_or(usize::MAX);
            let terms = Terms {
                listener,
                connections_max: most.min(share),
                descriptors_max: descriptors / 5 * 4,
                idle: IDLE_TIMEOUT,
                busy,
            };
            Connections::new(terms, clock.clone())
        };
        Arc::new(Self {
            client: listener("client", CLIENTS_MAX, 2, None),
            peer: listener("peer", PEERS_MAX, 8, None),
            admin: listener("admin", ADMINS_MAX, 16, Some(ADMIN_TIMEOUT)),
        })
    }
}
