//! One call through its tries: a node, a connection, an answer or the decision what follows. Holds
//! the deadline over all of it, and remembers whether any try may have happened.

use std::{sync::Arc, time::Duration};

use tonic::{Response, Status, transport::Channel};

use crate::{
    deadline::Deadline,
    error::{self, Applied, Error},
    retry::{self, Backoff, Kind, Verdict},
    route::{Node, Routes},
};

pub(crate) struct Call<'a> {
    routes: &'a Routes,
    kind: Kind,
    deadline: Deadline,
    backoff: Backoff,
    /// Asked in this round.
    tried: Vec<Arc<Node>>,
    /// A connection was made in this round.
    asked: bool,
    /// The longest pause a node asked for in this round.
    pause_asked: Option<Duration>,
    overloaded: u32,
    /// Rounds left in which nobody can be connected to.
    unreachable_left: u32,
    /// A try of this mutation ended without a word of what became of it.
    unknown: bool,
    last: Option<Error>,
}

impl<'a> Call<'a> {
    /// `rounds`: how often all nodes may be asked again; `unreachable`: how often if none can be
    /// connected to.
    pub(crate) fn new(
        routes: &'a Routes,
        kind: Kind,
        deadline: Deadline,
        rounds: u32,
        unreachable: u32,
    ) -> Self {
        Self {
            routes,
            kind,
            deadline,
            backoff: Backoff::new(rounds),
            tried: Vec::new(),
            asked: false,
            pause_asked: None,
            overloaded: 0,
            unreachable_left: unreachable,
            unknown: false,
            last: None,
        }
    }

    /// `send` sends the request over the channel given, with the time left as its deadline.
    pub(crate) async fn run<T, F, S>(mut self, send: F) -> Result<T, Error>
    where
        F: Fn(Channel, Duration) -> S,
        S: Future<Output = Result<Response<T>, Status>>,
    {
        loop {
            let Some(node) = self.routes.pick(self.kind, &self.tried, self.asked) else {
                self.next_round().await?;
                continue;
            };
            self.tried.push(node.clone());
            match self.try_on(&node, &send).await {
                Ok(response) => return Ok(self.answered(&node, response)),
                Err(error) => self.failed(&node, error).await?,
            }
        }
    }

    async fn try_on<T, F, S>(&mut self, node: &Arc<Node>, send: &F) -> Result<Response<T>, Error>
    where
        F: Fn(Channel, Duration) -> S,
        S: Future<Output = Result<Response<T>, Status>>,
    {
        let mutation = self.kind.is_mutation();
        let others = self.routes.has_other(self.kind, &self.tried);
        let half = |left: Duration| if others { left / 2 } else { left };
        let connect_limit = half(self.deadline.left()).min(self.routes.connect_timeout());
        let connected = node
            .connected(connect_limit)
            .await
            .map_err(|why| Error::connect(node.address(), &why, mutation))?;
        self.asked = true;

        let left = self.deadline.left();
        if left.is_zero() {
            return Err(Error::deadline(
                self.deadline.total(),
                mutation.then_some(Applied::No),
            ));
        }
        // A read gives a silent node half of its time. A mutation stays: a cut would turn the
        // node's `no` into our `unknown`.
        let limit = if mutation { left } else { half(left) };
        match tokio::time::timeout(limit, send(connected.channel, left)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(status)) => {
                if std::error::Error::source(&status).is_some() {
                    node.lost(connected.generation);
                }
                let error = Error::from_status(&status, mutation);
                if matches!(error, Error::Connect { .. }) {
                    node.rest();
                }
                Err(error)
            }
            Err(_) if limit < left => {
                self.routes.doubt(node);
                Err(Error::no_answer(node.address(), limit))
            }
            Err(_) => Err(Error::deadline(
                self.deadline.total(),
                mutation.then_some(Applied::Unknown),
            )),
        }
    }

    fn answered<T>(&self, node: &Arc<Node>, response: Response<T>) -> T {
        if let Some(leader) = error::header(response.metadata()) {
            self.routes.learn_leader(&leader);
        }
        self.routes.answered(self.kind, node);
        response.into_inner()
    }

    /// Ok if another try follows.
    async fn failed(&mut self, node: &Arc<Node>, error: Error) -> Result<(), Error> {
        self.note(node, &error);
        let verdict = self.kind.verdict(&error, self.overloaded);
        // A node's word says more than a connection refused elsewhere, and than the end of the time
        // in a read's next try.
        let says_less = match error {
            Error::Connect { .. } => verdict != Verdict::GiveUp,
            Error::Deadline { .. } => !self.kind.is_mutation(),
            _ => false,
        };
        if self.last.is_none() || !says_less {
            self.last = Some(error);
        }
        match verdict {
            Verdict::GiveUp => Err(self.settled()),
            Verdict::Elsewhere if self.deadline.left().is_zero() => Err(self.settled()),
            Verdict::Elsewhere => Ok(()),
            Verdict::After(asked) => {
                self.pause_asked = Some(asked);
                self.next_round().await
            }
        }
    }

    fn note(&mut self, node: &Arc<Node>, error: &Error) {
        match error {
            Error::Deadline { .. } => self.routes.doubt(node),
            Error::Overloaded { .. } => self.overloaded += 1,
            Error::Unavailable { retry_after, .. } => {
                self.pause_asked = self.pause_asked.max(*retry_after)
            }
            _ => {}
        }
        if retry::speaks_against_leading(error) {
            self.routes.not_leader(node);
        }
        if let Some(leader) = error.leader() {
            self.routes.learn_leader(leader);
        }
        self.unknown |= self.kind.is_mutation() && error.applied() == Applied::Unknown;
    }

    /// Ok after a pause; the last error at once if no pause is left or the time would run out in
    /// it.
    async fn next_round(&mut self) -> Result<(), Error> {
        if !self.asked {
            let Some(left) = self.unreachable_left.checked_sub(1) else {
                return Err(self.settled());
            };
            self.unreachable_left = left;
        }
        let pause = match self.pause_asked.take() {
            Some(asked) => self.backoff.pause_asked(asked),
            None => self.backoff.pause(),
        };
        let Some(pause) = pause.filter(|pause| *pause < self.deadline.left()) else {
            return Err(self.settled());
        };
        tokio::time::sleep(pause).await;
        self.tried.clear();
        self.asked = false;
        Ok(())
    }

    /// The error to report. It never says `no` of a mutation of which any try may have happened.
    fn settled(&mut self) -> Error {
        let nothing_sent = self.kind.is_mutation().then_some(Applied::No);
        let error = self
            .last
            .take()
            .unwrap_or_else(|| Error::deadline(self.deadline.total(), nothing_sent));
        if self.unknown {
            error.after_unknown_try()
        } else {
            error
        }
    }
}
