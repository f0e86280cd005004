//! The leader's end of a follower's questions.
//!
//! Promises to judge each by this node's policies and to say when the upstream is called for it;
//! bounded work for each follower and upstream; and that a question which is withdrawn, or whose
//! follower is gone, waits for nothing any more. Must never ask another node.

use std::{collections::HashMap, sync::Arc};

use holdfast_proto::{
    Key,
    limits::FETCH_TIMEOUT_MAX,
    peer::{FetchQuestion, FetchRequest, FetchResponse, fetch_response},
};
use holdfast_raft::Replica;
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::Instrument;

use super::{
    Refresher,
    ask::QUESTIONS_MAX,
    join::Question,
    outcome::{FetchOutcome, Need},
};
use crate::telemetry;

/// Answers on their way; each may carry a value.
const ANSWERS: usize = 16;

pub(crate) type Answers = ReceiverStream<Result<FetchResponse, Status>>;

/// The questions of one stream.
struct Asker {
    refresher: Arc<Refresher>,
    replica: Arc<Replica>,
    answers: mpsc::Sender<Result<FetchResponse, Status>>,
    /// Each ends with its question's id.
    running: JoinSet<u64>,
    by_id: HashMap<u64, AbortHandle>,
}

impl Refresher {
    /// Answers a follower's questions about keys of this replica's shard until it closes its
    /// stream.
    pub(crate) fn answer_peer(
        self: &Arc<Self>,
        replica: Arc<Replica>,
        first: FetchRequest,
        questions: Streaming<FetchRequest>,
    ) -> Answers {
        let (answers, stream) = mpsc::channel(ANSWERS);
        let asker = Asker {
            refresher: self.clone(),
            replica,
            answers,
            running: JoinSet::new(),
            by_id: HashMap::new(),
        };
        let stop = self.stop.clone();
        self.tasks.spawn("answer peers", async move {
            tokio::select! {
                () = asker.answer(first, questions) => {}
                () = stop.cancelled() => {}
            }
        });
        ReceiverStream::new(stream)
    }

    async fn answer_question(
        self: &Arc<Self>,
        key: &Key,
        need: Need,
        replica: &Arc<Replica>,
        called: &CancellationToken,
    ) -> FetchOutcome {
        let rules = self.rules.load_full();
        let Some(term) = replica.leads() else {
            return FetchOutcome::NotLeading;
        };
        let Some(policy) = rules.policy(key) else {
            return FetchOutcome::NoPolicy;
        };
        // The follower says when nobody waits any more.
        let deadline = self.clock.deadline(FETCH_TIMEOUT_MAX);
        let question = Question {
            key,
            replica,
            term,
            need,
        };
        self.join(question, policy, &deadline, called).await
    }
}

impl Asker {
    async fn answer(mut self, first: FetchRequest, mut questions: Streaming<FetchRequest>) {
        self.take(first);
        loop {
            tokio::select! {
                message = questions.message() => match message {
                    Ok(Some(message)) => self.take(message),
                    Ok(None) | Err(_) => return,
                },
                Some(answered) = self.running.join_next() => {
                    // One that was aborted is not known any more.
                    if let Ok(id) = answered {
                        self.by_id.remove(&id);
                    }
                }
                () = self.answers.closed() => return,
            }
        }
    }

    fn take(&mut self, message: FetchRequest) {
        for question in message.questions {
            let id = question.id;
            let is_refused = self.by_id.len() >= QUESTIONS_MAX;
            let span = telemetry::span_of_peer(&question.traceparent);
            let answered = self.answered(question, is_refused).instrument(span);
            let handle = self.running.spawn(answered);
            self.by_id.insert(id, handle);
        }
        for id in message.withdrawn {
            if let Some(question) = self.by_id.remove(&id) {
                question.abort();
            }
        }
    }

    fn answered(
        &self,
        question: FetchQuestion,
        is_refused: bool,
    ) -> impl Future<Output = u64> + Send + 'static {
        let (refresher, replica) = (self.refresher.clone(), self.replica.clone());
        let (answers, id) = (self.answers.clone(), question.id);
        let owner = refresher.replicas.of_key(&question.key);
        let is_ours = owner.is_some_and(|owner| owner.shard() == replica.shard());
        let key = Key::new(question.key).ok().filter(|_| is_ours);
        let need = match question.anew {
            true => Need::Anew,
            false => Need::IfDue,
        };
        async move {
            let answer = |result: Option<fetch_response::Result>| {
                Ok(FetchResponse {
                    header: Some(replica.reply()),
                    id,
                    result,
                })
            };
            let called = CancellationToken::new();
            let outcome = match &key {
                Some(_) if is_refused => FetchOutcome::Overloaded,
                None => FetchOutcome::NotLeading,
                Some(key) => {
                    let fetch = refresher.answer_question(key, need, &replica, &called);
                    let mut fetch = Box::pin(fetch);
                    tokio::select! {
                        outcome = &mut fetch => outcome,
                        () = called.cancelled() => {
                            let _ = answers.send(answer(None)).await;
                            fetch.await
                        }
                    }
                }
            };
            // Fails if the follower is gone.
            let _ = answers.send(answer(Some(outcome.into()))).await;
            id
        }
    }
}
