//! What makes a read linearizable: a round in which the leader proves that it still leads, after
//! which a replica waits until it has applied all that was committed when the round began. Rounds
//! are shared: a read joins only one that starts after it arrived, and one is under way at a time.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::leader_proof::{LeaderProof, Unproven};
use crate::task::Tasks;

/// Reads that wait for a round.
const QUEUE: usize = 16_384;

#[derive(Clone)]
pub(crate) struct ReadRounds {
    queue: mpsc::Sender<oneshot::Sender<Result<u64, Unproven>>>,
}

impl ReadRounds {
    pub(crate) fn start(tasks: &Tasks, proof: Arc<LeaderProof>) -> Self {
        let (queue, mut arrivals) = mpsc::channel::<oneshot::Sender<Result<u64, Unproven>>>(QUEUE);
        tasks.essential("read rounds", async move {
            while let Some(first) = arrivals.recv().await {
                // Everybody who is here now, and nobody who comes while the round is under way.
                let waiting: Vec<_> = std::iter::once(first)
                    .chain(std::iter::from_fn(|| arrivals.try_recv().ok()))
                    .collect();
                let result = proof.read_index().await;
                for waiter in waiting {
                    let _ = waiter.send(result);
                }
            }
        });
        Self { queue }
    }

    /// `None` if too many wait already, or this replica stops.
    pub(crate) async fn join(&self) -> Option<Result<u64, Unproven>> {
        let (done, result) = oneshot::channel();
        self.queue.try_send(done).ok()?;
        result.await.ok()
    }
}
