//! What makes a read linearizable: a round in which the leader proves that it still leads, after
//! which a replica waits until it has applied all that was committed when the round began. Rounds
//! are shared: a read joins only one that starts after it arrived, and one is under way at a time.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

/// Reads that wait for a round.
const QUEUE: usize = 16_384;

/// Why a round proved nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unproven {
    #[error("nobody leads the shard")]
    NoLeader,
    #[error("the leader cannot reach a quorum")]
    NoQuorum,
}

/// Runs one round: the index to wait for.
pub(crate) trait Round: Send + Sync + 'static {
    fn run(&self) -> impl Future<Output = Result<u64, Unproven>> + Send;
}

#[derive(Clone)]
pub(crate) struct ReadRounds {
    queue: mpsc::Sender<oneshot::Sender<Result<u64, Unproven>>>,
}

impl ReadRounds {
    pub(crate) fn start(round: Arc<impl Round>) -> Self {
        let (queue, mut arrivals) = mpsc::channel::<oneshot::Sender<Result<u64, Unproven>>>(QUEUE);
        crate::task::spawn(async move {
            while let Some(first) = arrivals.recv().await {
                // Everybody who is here now, and nobody who comes while the round is under way.
                let waiting: Vec<_> = std::iter::once(first)
                    .chain(std::iter::from_fn(|| arrivals.try_recv().ok()))
                    .collect();
                let result = round.run().await;
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
