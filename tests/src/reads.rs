//! Readers that go on while a test breaks other things, and may never fail.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use holdfast_client::{Client, Consistency};
use tokio::task::JoinSet;

use crate::{cluster::Cluster, writes::Writes};

/// Between two reads of one reader: several writes and many heartbeats fit in between, and other
/// tests run too.
const READ_EVERY: Duration = Duration::from_millis(5);
/// A key that is always there.
const STEADY: &str = "steady";

/// A reader for each of some nodes, that asks no other: LOCAL and SESSION at once, and SESSION with
/// the token of the newest write.
pub struct Readers {
    tasks: JoinSet<anyhow::Result<u64>>,
    stop: Arc<AtomicBool>,
}

impl Readers {
    pub async fn prepare(client: &Client) -> anyhow::Result<()> {
        client.set(STEADY, STEADY).await?;
        Ok(())
    }

    /// Needs the key that [`Readers::prepare`] sets.
    pub fn start(cluster: &Cluster, nodes: &[usize], writes: &Arc<Writes>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for &node in nodes {
            let reader = Reader {
                strict: strict(cluster, node),
                patient: cluster.client(node),
                writes: writes.clone(),
                stop: stop.clone(),
            };
            let name = cluster.name(node).to_owned();
            tasks.spawn(async move {
                reader
                    .read()
                    .await
                    .with_context(|| format!("a read on {name}"))
            });
        }
        Self { tasks, stop }
    }

    /// Ends them, and says whether any read failed.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ensure!(ended?? > 0, "a reader read nothing");
        }
        Ok(())
    }
}

struct Reader {
    /// Tries nothing twice.
    strict: Client,
    /// What others have written takes a while to arrive, or a next leader.
    patient: Client,
    writes: Arc<Writes>,
    stop: Arc<AtomicBool>,
}

impl Reader {
    /// How often it read.
    async fn read(self) -> anyhow::Result<u64> {
        let mut reads = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let local = self
                .strict
                .get(STEADY)
                .consistency(Consistency::Local)
                .await
                .context("LOCAL")?;
            ensure!(
                local.answer.value.as_deref() == Some(STEADY.as_bytes()),
                "LOCAL found {local:?}"
            );
            let session = self
                .strict
                .get(STEADY)
                .await
                .context("SESSION of its own")?;
            ensure!(session.answer.is_hit(), "SESSION found {session:?}");
            ensure!(
                session.replica.revision >= local.replica.revision,
                "the node went back from {local:?} to {session:?}"
            );
            if let Some((key, token)) = self.writes.newest() {
                let newest = self
                    .patient
                    .get(&key)
                    .token(token)
                    .await
                    .context("SESSION that has seen the newest write")?;
                ensure!(
                    newest.answer.is_hit(),
                    "{key} was acknowledged and a session that has seen it found {newest:?}"
                );
            }
            reads += 1;
            tokio::time::sleep(READ_EVERY).await;
        }
        Ok(reads)
    }
}

fn strict(cluster: &Cluster, node: usize) -> Client {
    let endpoint = cluster.addresses(node).client.to_string();
    Client::builder()
        .endpoints([endpoint])
        .retries(0)
        .build()
        .expect("an address is an endpoint")
}
