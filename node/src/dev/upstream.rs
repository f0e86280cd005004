//! The demo upstream: any path has a JSON value that changes with each call, after a little while,
//! as a real one would.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::{Path, State},
    http::header::CONTENT_TYPE,
    response::IntoResponse,
    routing::get,
};
use holdfast_raft::Clock;
use tokio::net::TcpListener;

use crate::serve::Serving;

/// Its name, and the first segment of its keys.
pub(super) const DEMO: &str = "demo";
/// Long enough that a reader who waited for it would notice.
const DELAY: Duration = Duration::from_millis(150);

pub(super) struct Demo {
    address: SocketAddr,
    serving: Serving,
}

struct Calls {
    clock: Clock,
    count: AtomicU64,
}

impl Demo {
    /// On any free port of loopback.
    pub(super) async fn start(clock: Clock) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let calls = Arc::new(Calls {
            clock,
            count: AtomicU64::new(0),
        });
        let router = Router::new()
            .route("/{*key}", get(answer))
            .with_state(calls);
        let serving = Serving::start(Arc::new(()), |drain, _| async move {
            if let Err(error) = axum::serve(listener, router)
                .with_graceful_shutdown(drain.cancelled_owned())
                .await
            {
                tracing::error!(%error, "the demo upstream ended");
            }
        });
        Ok(Self { address, serving })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) async fn stop(self) {
        self.serving.stop(Duration::ZERO).await;
    }
}

async fn answer(State(calls): State<Arc<Calls>>, Path(key): Path<String>) -> impl IntoResponse {
    let call = calls.count.fetch_add(1, Ordering::Relaxed) + 1;
    tokio::time::sleep(DELAY).await;
    let value =
        serde_json::json!({ "key": key, "call": call, "made_at_ms": calls.clock.wall_ms() });
    ([(CONTENT_TYPE, "application/json")], value.to_string())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn get(address: SocketAddr) -> serde_json::Value {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /a/b HTTP/1.1\r\nhost: demo\r\nconnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn its_values_change_with_each_call() {
        let demo = Demo::start(Clock::system()).await.unwrap();
        let (first, second) = (get(demo.address()).await, get(demo.address()).await);
        assert_eq!(
            (
                first["key"].as_str(),
                first["call"].as_u64(),
                second["call"].as_u64()
            ),
            (Some("a/b"), Some(1), Some(2))
        );
        demo.stop().await;
    }
}
