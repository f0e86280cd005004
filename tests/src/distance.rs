//! Nodes far from each other: a proxy in front of each peer port that delays what goes through it,
//! in both directions and in order, without narrowing it.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use holdfast_raft::Clock;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};

/// Chunks on their way.
const ON_THE_WAY: usize = 4096;
const CHUNK_BYTES: usize = 64 << 10;

pub struct Distance {
    addresses: Vec<SocketAddr>,
    targets: Vec<Arc<OnceLock<SocketAddr>>>,
    _accepting: JoinSet<()>,
}

impl Distance {
    /// Half of the round trip passes on each way.
    pub async fn between(nodes: usize, round_trip: Duration, clock: &Clock) -> io::Result<Self> {
        let (mut addresses, mut targets, mut accepting) = (Vec::new(), Vec::new(), JoinSet::new());
        for _ in 0..nodes {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let target = Arc::new(OnceLock::new());
            addresses.push(listener.local_addr()?);
            accepting.spawn(accept(
                listener,
                target.clone(),
                round_trip / 2,
                clock.clone(),
            ));
            targets.push(target);
        }
        Ok(Self {
            addresses,
            targets,
            _accepting: accepting,
        })
    }

    /// Where each node is reached.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Where the ways to each node lead.
    pub fn lead_to(&self, node: usize, peer: SocketAddr) {
        let _ = self.targets[node].set(peer);
    }
}

async fn accept(
    listener: TcpListener,
    target: Arc<OnceLock<SocketAddr>>,
    one_way: Duration,
    clock: Clock,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((from, _)) = listener.accept() => {
                if let Some(&target) = target.get() {
                    connections.spawn(carry(from, target, one_way, clock.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Ends with either side.
async fn carry(from: TcpStream, target: SocketAddr, one_way: Duration, clock: Clock) {
    let Ok(to) = TcpStream::connect(target).await else {
        return;
    };
    let _ = (from.set_nodelay(true), to.set_nodelay(true));
    let ((from_read, from_write), (to_read, to_write)) = (from.into_split(), to.into_split());
    tokio::select! {
        () = delayed(from_read, to_write, one_way, &clock) => {}
        () = delayed(to_read, from_write, one_way, &clock) => {}
    }
}

async fn delayed(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    one_way: Duration,
    clock: &Clock,
) {
    let (sent, mut arriving) = mpsc::channel::<(Duration, Bytes)>(ON_THE_WAY);
    let read = async {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(size) = from.read(&mut chunk).await
            && size > 0
        {
            let due = clock.monotonic() + one_way;
            let bytes = Bytes::copy_from_slice(&chunk[..size]);
            if sent.send((due, bytes)).await.is_err() {
                return;
            }
        }
    };
    let write = async {
        while let Some((due, bytes)) = arriving.recv().await {
            tokio::time::sleep(due.saturating_sub(clock.monotonic())).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = write => {}
    }
}
