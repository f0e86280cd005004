//! Who can see whom: a way from every node to every other one's peer port, which a test opens.
//!
//! A way that is not open takes connections and ends them at once. One that was opened stays open.
//! Nodes that have met dial each other's own addresses, which no way of these leads through.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

pub struct Links {
    /// From each node, to each node.
    links: Vec<Vec<Link>>,
    _accepting: JoinSet<()>,
}

struct Link {
    address: SocketAddr,
    way: Arc<Way>,
}

#[derive(Default)]
struct Way {
    open: AtomicBool,
    target: OnceLock<SocketAddr>,
}

impl Links {
    /// All closed.
    pub async fn between(nodes: usize) -> std::io::Result<Self> {
        let mut accepting = JoinSet::new();
        let mut links = Vec::new();
        for _ in 0..nodes {
            let mut row = Vec::new();
            for _ in 0..nodes {
                let listener = TcpListener::bind("127.0.0.1:0").await?;
                let (address, way) = (listener.local_addr()?, Arc::new(Way::default()));
                accepting.spawn(accept(listener, way.clone()));
                row.push(Link { address, way });
            }
            links.push(row);
        }
        Ok(Self {
            links,
            _accepting: accepting,
        })
    }

    /// What each node is told to look for.
    pub fn discover(&self) -> Vec<Vec<SocketAddr>> {
        self.links
            .iter()
            .map(|row| row.iter().map(|link| link.address).collect())
            .collect()
    }

    /// Where the ways to each node lead.
    pub fn lead_to(&self, peers: &[SocketAddr]) {
        for row in &self.links {
            row.iter()
                .zip(peers)
                .for_each(|(link, peer)| _ = link.way.target.set(*peer));
        }
    }

    pub fn open(&self, from: usize, to: usize) {
        self.links[from][to].way.open.store(true, Ordering::Relaxed);
    }

    pub fn open_all(&self) {
        self.links
            .iter()
            .flatten()
            .for_each(|link| link.way.open.store(true, Ordering::Relaxed));
    }
}

async fn accept(listener: TcpListener, way: Arc<Way>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((mut from, _)) = listener.accept() => {
                if let Some(target) = way.target.get().copied().filter(|_| way.open.load(Ordering::Relaxed)) {
                    connections.spawn(async move {
                        let Ok(mut to) = TcpStream::connect(target).await else { return };
                        // Ends with either side.
                        let _ = copy_bidirectional(&mut from, &mut to).await;
                    });
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}
