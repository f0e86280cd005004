//! The connections of one upstream that can be used again.
//!
//! Promises that none is used that is older than a minute, so that a name that moved is followed,
//! and that idle ones are few. Must never dial.

use std::time::Duration;

use parking_lot::Mutex;

use super::connection::Connection;
use super::endpoint::Endpoint;
use super::redirect::Reach;

/// How long after it was dialled a connection may take another request.
const AGE_MAX: Duration = Duration::from_secs(60);
/// Idle connections kept: as many as an upstream has flights.
const IDLE_MAX: usize = 32;

#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Connection>>);

impl Pool {
    /// The latest that leads there, if there is one. `now` is on the monotonic clock.
    pub(super) async fn take(
        &self,
        endpoint: &Endpoint,
        reach: &Reach,
        now: Duration,
    ) -> Option<Connection> {
        loop {
            let mut connection = self.take_any(endpoint, reach, now)?;
            if connection.is_ready().await {
                return Some(connection);
            }
        }
    }

    /// One that is used no more, or that others may use too.
    pub(super) fn put(&self, connection: Connection, now: Duration) {
        let mut idle = self.0.lock();
        let is_known = connection.is_http2()
            && idle
                .iter()
                .any(|own| own.is_http2() && own.endpoint == connection.endpoint);
        if !is_known && is_usable(&connection, now) && idle.len() < IDLE_MAX {
            idle.push(connection);
        }
    }

    fn take_any(&self, endpoint: &Endpoint, reach: &Reach, now: Duration) -> Option<Connection> {
        let mut idle = self.0.lock();
        idle.retain(|connection| is_usable(connection, now));
        let leads_there =
            |own: &Connection| own.endpoint == *endpoint && reach.permits(own.address);
        let at = idle.iter().rposition(leads_there)?;
        Some(match idle[at].share() {
            Some(shared) => shared,
            None => idle.remove(at),
        })
    }
}

fn is_usable(connection: &Connection, now: Duration) -> bool {
    !connection.is_closed() && now.saturating_sub(connection.dialled_at) < AGE_MAX
}
