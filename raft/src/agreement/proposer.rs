//! Commands on their way into the log: one task per shard drains a queue, without lingering, into
//! log entries of many commands, stamps them with the leader's clock, and hands each caller its own
//! outcome.
//!
//! A caller whose time runs out takes its command back if it still waits in the queue: then it is
//! certain that it was not applied. Once it left the queue, only openraft's answer
//! `ForwardToLeader` is as certain.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use holdfast_proto::{
    limits::{ENTRY_BYTES_MAX, ENTRY_COMMANDS_MAX},
    peer::{Command, LogEntry, Outcome, command::Op},
};
use openraft::{
    errors::{ClientWriteError, ForwardToLeader},
    impls::OneshotResponder,
    type_config::async_runtime::watch::WatchReceiver,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::{
    RaftHandle,
    leadership::LeaderClock,
    types::{Commands, Types},
};
use crate::{error::WriteError, state::record::FORMAT, task::Tasks};

/// Commands that wait for the proposer; more are refused.
const QUEUE: usize = 16_384;
/// Entries proposed and not yet applied. Few: while they are on their way, the next one fills.
const IN_FLIGHT: usize = 4;

/// Emptied by the proposer, which takes the command, or by its caller, who withdraws it: one of the
/// two.
type Place = Arc<Mutex<Option<Command>>>;

struct Pending {
    place: Place,
    done: oneshot::Sender<Result<Outcome, WriteError>>,
}

#[derive(Clone)]
pub(crate) struct Proposer {
    queue: mpsc::Sender<Pending>,
}

impl Proposer {
    pub(crate) fn start(tasks: &Tasks, raft: RaftHandle, leader_clock: Arc<LeaderClock>) -> Self {
        let (queue, commands) = mpsc::channel(QUEUE);
        let answering = tasks.clone();
        let run = propose_all(raft, leader_clock, commands, answering);
        tasks.essential("proposer", run);
        Self { queue }
    }

    /// Commands in the queue.
    pub(crate) fn waiting(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }

    /// Proposes here and waits for the outcome. Only a leader gets one.
    pub(crate) async fn propose(
        &self,
        command: Command,
        timeout: Duration,
    ) -> Result<Outcome, WriteError> {
        let place = Arc::new(Mutex::new(Some(command)));
        let (done, outcome) = oneshot::channel();
        let pending = Pending {
            place: place.clone(),
            done,
        };
        self.queue.try_send(pending).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => WriteError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => WriteError::Stopped,
        })?;
        match tokio::time::timeout(timeout, outcome).await {
            Ok(Ok(outcome)) => outcome,
            // The proposer is gone, and left it in the queue.
            Ok(Err(_)) if place.lock().take().is_some() => Err(WriteError::Stopped),
            Ok(Err(_)) => Err(WriteError::Unknown("this node is stopping".into())),
            Err(_) if place.lock().take().is_some() => Err(WriteError::DeadlineBefore),
            Err(_) => Err(WriteError::DeadlineAfter),
        }
    }
}

/// Ends when every handle to the queue is gone.
async fn propose_all(
    raft: RaftHandle,
    leader_clock: Arc<LeaderClock>,
    mut commands: mpsc::Receiver<Pending>,
    answering: Tasks,
) {
    let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut held_back = None;
    loop {
        let first = match held_back.take() {
            Some(pending) => pending,
            None => match commands.recv().await {
                Some(pending) => pending,
                None => return,
            },
        };
        // A place in flight first: while we wait for it, more commands come and share the entry.
        let Ok(place) = in_flight.clone().acquire_owned().await else {
            return;
        };
        let (entry, next) = fill(first, &mut commands);
        held_back = next;
        if !entry.is_empty() {
            propose(&raft, &leader_clock, entry, place, &answering).await;
        }
    }
}

/// A command that left the queue, and who waits for it.
type Taken = (Command, oneshot::Sender<Result<Outcome, WriteError>>);

/// One entry's commands: what is queued, up to the bounds. The first one that does not fit is held
/// back for the next.
fn fill(first: Pending, commands: &mut mpsc::Receiver<Pending>) -> (Vec<Taken>, Option<Pending>) {
    let mut entry: Vec<Taken> = Vec::new();
    let mut bytes = 0;
    let mut next = Some(first);
    while let Some(pending) = next.take() {
        let size = pending
            .place
            .lock()
            .as_ref()
            .map_or(0, Command::encoded_len);
        if !entry.is_empty()
            && (bytes + size > ENTRY_BYTES_MAX || entry.len() == ENTRY_COMMANDS_MAX)
        {
            return (entry, Some(pending));
        }
        let taken = pending.place.lock().take();
        if let Some(command) = taken {
            bytes += size;
            entry.push((command, pending.done));
        }
        next = commands.try_recv().ok();
    }
    (entry, None)
}

async fn propose(
    raft: &RaftHandle,
    leader_clock: &LeaderClock,
    entry: Vec<Taken>,
    in_flight: OwnedSemaphorePermit,
    answering: &Tasks,
) {
    let (commands, callers): (Vec<_>, Vec<_>) = entry.into_iter().unzip();
    if !may_propose(raft, leader_clock, &commands) {
        answer_all(callers, &WriteError::NoQuorum);
        return;
    }
    let encoded = LogEntry {
        format: u32::from(FORMAT),
        stamp_ms: leader_clock.stamp(),
        commands,
    }
    .encode_to_vec();
    let (responder, applied) = OneshotResponder::<Types, _>::new_pair();
    let proposed = raft
        .client_write_ff(Commands(Bytes::from(encoded)), Some(responder))
        .await;
    // The core never took it.
    if proposed.is_err() {
        answer_all(callers, &WriteError::Stopped);
        return;
    }
    let answer = async move {
        let result = applied.await;
        drop(in_flight);
        match result {
            Ok(Ok(response)) => {
                let mut outcomes = response.data.0.into_iter();
                for caller in callers {
                    // None for what came with a state that took the place of the one here.
                    let unknown =
                        || WriteError::Unknown("this replica's state was replaced".into());
                    let _ = caller.send(outcomes.next().ok_or_else(unknown));
                }
            }
            Ok(Err(ClientWriteError::ForwardToLeader(forward))) => answer_all(
                callers,
                &WriteError::NotLeader {
                    leader: leader_of(&forward),
                },
            ),
            Ok(Err(other)) => answer_all(callers, &WriteError::Unknown(other.to_string())),
            Err(_) => answer_all(
                callers,
                &WriteError::Unknown("this replica has stopped".into()),
            ),
        }
    };
    // It ends with openraft, which stops after the tasks.
    answering.detach("answers", answer);
}

/// A leader that no quorum acknowledges proposes nothing for anybody: it would be of unknown outcome.
/// It may go on with what only the cluster itself waits for. Who does not lead is told so by
/// openraft.
fn may_propose(raft: &RaftHandle, leader_clock: &LeaderClock, commands: &[Command]) -> bool {
    let of_the_cluster =
        |command: &Command| matches!(command.op, Some(Op::Tick(_) | Op::SetPace(_)));
    let (leads, term) = {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        (metrics.state.is_leader(), metrics.current_term)
    };
    !leads
        || commands.iter().all(of_the_cluster)
        || leader_clock.has_lease(term, leader_clock.monotonic())
}

fn leader_of(forward: &ForwardToLeader<Types>) -> Option<u64> {
    forward.leader_id
}

fn answer_all(callers: Vec<oneshot::Sender<Result<Outcome, WriteError>>>, error: &WriteError) {
    for caller in callers {
        let _ = caller.send(Err(error.clone()));
    }
}
