//! What one client remembers between calls: what it has seen (its token), and which of its
//! mutations are in flight. Knows no network.

use std::collections::BTreeSet;

use bytes::Bytes;
use holdfast_proto::{
    Token,
    limits::{CLIENT_ID_BYTES, OUTCOMES_PER_CLIENT_MAX},
    v1::RequestId,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

pub(crate) struct Session {
    token: Mutex<Token>,
    /// 16 random bytes, drawn once per client instance.
    client: Bytes,
    mutations: Mutex<Mutations>,
    /// A mutation has ended.
    ended: Notify,
}

struct Mutations {
    next_seq: u64,
    in_flight: BTreeSet<u64>,
}

/// A mutation in flight. Dropped when its outcome is known or nobody waits for it any more: it is
/// never sent again.
pub(crate) struct Mutation<'a> {
    session: &'a Session,
    seq: u64,
    done_below: u64,
}

impl Session {
    pub(crate) fn new() -> Self {
        Self {
            token: Mutex::new(Token::default()),
            client: Bytes::copy_from_slice(&rand::random::<[u8; CLIENT_ID_BYTES]>()),
            mutations: Mutex::new(Mutations {
                next_seq: 1,
                in_flight: BTreeSet::new(),
            }),
            ended: Notify::new(),
        }
    }

    pub(crate) fn token(&self) -> Token {
        self.token.lock().clone()
    }

    pub(crate) fn see(&self, token: &Token) {
        self.token.lock().merge(token);
    }

    /// The token is from before a restore: what it has seen can be seen no more. One that was
    /// renewed meanwhile stays.
    pub(crate) fn forget_epoch(&self, epoch: u64) {
        let mut token = self.token.lock();
        if token.epoch() == epoch {
            *token = Token::default();
        }
    }

    /// A name for a new mutation. Waits while the oldest in flight is a window behind: the state
    /// remembers only so many outcomes of a client, and forgetting that one's would let its retry
    /// happen twice.
    pub(crate) async fn begin(&self) -> Mutation<'_> {
        loop {
            // Before the look, so that an end between look and wait is not missed.
            let ended = self.ended.notified();
            if let Some(mutation) = self.begin_now() {
                return mutation;
            }
            ended.await;
        }
    }

    /// Counter and set are under one lock: a seq drawn but not yet in the set could otherwise be
    /// declared done by a neighbour.
    fn begin_now(&self) -> Option<Mutation<'_>> {
        let mut mutations = self.mutations.lock();
        let seq = mutations.next_seq;
        let done_below = mutations.in_flight.first().copied().unwrap_or(seq);
        if seq - done_below >= OUTCOMES_PER_CLIENT_MAX as u64 {
            return None;
        }
        mutations.next_seq += 1;
        mutations.in_flight.insert(seq);
        Some(Mutation {
            session: self,
            seq,
            done_below,
        })
    }
}

impl Mutation<'_> {
    /// The same on every try.
    pub(crate) fn id(&self) -> RequestId {
        RequestId {
            client: self.session.client.clone(),
            seq: self.seq,
            done_below: self.done_below,
        }
    }
}

impl Drop for Mutation<'_> {
    fn drop(&mut self) {
        self.session.mutations.lock().in_flight.remove(&self.seq);
        self.session.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(epoch: u64, revision: u64) -> Token {
        let mut token = Token::new(epoch);
        token.see(0, revision);
        token
    }

    #[test]
    fn a_session_never_forgets_what_it_has_seen() {
        let session = Session::new();
        session.see(&token(1, 7));
        session.see(&token(1, 3));
        assert_eq!(session.token().revision(0), 7);
        session.see(&token(2, 1));
        assert_eq!(
            (session.token().epoch(), session.token().revision(0)),
            (2, 1)
        );
    }

    #[test]
    fn a_token_from_before_a_restore_is_let_go_but_not_a_newer_one() {
        let session = Session::new();
        session.see(&token(1, 7));
        session.forget_epoch(1);
        assert!(session.token().is_empty());
        session.see(&token(2, 4));
        session.forget_epoch(1);
        assert_eq!(session.token().revision(0), 4);
    }

    #[tokio::test]
    async fn done_below_is_the_lowest_mutation_still_in_flight() {
        let session = Session::new();
        let first = session.begin().await;
        let second = session.begin().await;
        assert_eq!((first.id().seq, first.id().done_below), (1, 1));
        assert_eq!((second.id().seq, second.id().done_below), (2, 1));
        drop(first);
        let third = session.begin().await;
        assert_eq!((third.id().seq, third.id().done_below), (3, 2));
        drop((second, third));
        assert_eq!(session.begin().await.id().done_below, 4);
    }

    #[tokio::test]
    async fn two_clients_have_different_names_of_16_bytes() {
        let (a, b) = (Session::new(), Session::new());
        assert_eq!(a.begin().await.id().client.len(), 16);
        assert_ne!(a.begin().await.id().client, b.begin().await.id().client);
    }

    #[tokio::test]
    async fn no_more_outcomes_are_asked_for_than_the_state_remembers() {
        let session = Session::new();
        let oldest = session.begin().await;
        for _ in 1..OUTCOMES_PER_CLIENT_MAX {
            session.begin().await;
        }
        assert!(session.begin_now().is_none());
        let (next, ()) = tokio::join!(session.begin(), async { drop(oldest) });
        assert_eq!(next.id().done_below, next.id().seq);
    }
}
