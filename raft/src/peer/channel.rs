//! Channels to other nodes: the one place that dials, kept by address and purpose.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tonic::transport::{Channel, Endpoint};

/// A dial that takes longer is given up; the next request dials again, resolving the name again.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// HTTP/2 windows: the product of a fast link and a far region's round trip.
const WINDOW_BYTES: u32 = 16 << 20;

/// What a channel is for: heartbeats and votes never queue behind appends, nor either behind a
/// snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    Append,
    Control,
    /// Reads and fetches that readers wait for: they may be many, slow and large.
    Fetch,
    Bulk,
}

pub(super) struct Channels {
    /// Where Raft runs: whoever uses its channels first, their bytes move there.
    runtime: Handle,
    open: Mutex<HashMap<(String, Purpose), Channel>>,
}

impl Channels {
    /// To be called on the threads that Raft runs on.
    pub(super) fn new() -> Self {
        Self {
            runtime: Handle::current(),
            open: Mutex::default(),
        }
    }

    pub(super) fn to(&self, address: &str, purpose: Purpose) -> Channel {
        let mut open = self.open.lock();
        if let Some(channel) = open.get(&(address.to_owned(), purpose)) {
            return channel.clone();
        }
        let channel = match purpose {
            Purpose::Fetch => dial(address),
            Purpose::Append | Purpose::Control | Purpose::Bulk => {
                let _entered = self.runtime.enter();
                dial(address)
            }
        };
        open.insert((address.to_owned(), purpose), channel.clone());
        channel
    }

    #[cfg(test)]
    pub(super) fn used_for(&self) -> Vec<Purpose> {
        self.open
            .lock()
            .keys()
            .map(|&(_, purpose)| purpose)
            .collect()
    }
}

/// A channel that dials when it is used, and resolves its host name at each dial.
pub(super) fn dial(address: &str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .unwrap_or_else(|_| Endpoint::from_static("http://address.invalid"));
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .connect_lazy()
}
