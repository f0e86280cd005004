//! The names of mutations (request ids), and which of them are in flight. All sessions of a client
//! share them: the state remembers outcomes of so many clients only, and a web server has more
//! users than that. Knows no network.

use std::collections::BTreeSet;

use bytes::Bytes;
use holdfast_proto::{
    limits::{CLIENT_ID_BYTES, OUTCOMES_PER_CLIENT_MAX},
    v1::RequestId,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

pub(crate) struct Mutations {
    /// 16 random bytes, drawn once per client.
    client: Bytes,
    numbers: Mutex<Numbers>,
    /// A mutation has ended.
    ended: Notify,
}

struct Numbers {
    next_seq: u64,
    in_flight: BTreeSet<u64>,
}

/// A mutation in flight. Dropped when its outcome is known or nobody waits for it any more: it is
/// never sent again.
pub(crate) struct Mutation<'a> {
    mutations: &'a Mutations,
    seq: u64,
    done_below: u64,
}

impl Mutations {
    pub(crate) fn new() -> Self {
        Self {
            client: Bytes::copy_from_slice(&rand::random::<[u8; CLIENT_ID_BYTES]>()),
            numbers: Mutex::new(Numbers {
                next_seq: 1,
                in_flight: BTreeSet::new(),
            }),
            ended: Notify::new(),
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
        let mut numbers = self.numbers.lock();
        let seq = numbers.next_seq;
        let done_below = numbers.in_flight.first().copied().unwrap_or(seq);
        if seq - done_below >= OUTCOMES_PER_CLIENT_MAX as u64 {
            return None;
        }
        numbers.next_seq += 1;
        numbers.in_flight.insert(seq);
        Some(Mutation {
            mutations: self,
            seq,
            done_below,
        })
    }
}

impl Mutation<'_> {
    /// The same on every try.
    pub(crate) fn id(&self) -> RequestId {
        RequestId {
            client: self.mutations.client.clone(),
            seq: self.seq,
            done_below: self.done_below,
        }
    }
}

impl Drop for Mutation<'_> {
    fn drop(&mut self) {
        self.mutations.numbers.lock().in_flight.remove(&self.seq);
        self.mutations.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn done_below_is_the_lowest_mutation_still_in_flight() {
        let mutations = Mutations::new();
        let first = mutations.begin().await;
        let second = mutations.begin().await;
        assert_eq!((first.id().seq, first.id().done_below), (1, 1));
        assert_eq!((second.id().seq, second.id().done_below), (2, 1));
        drop(first);
        let third = mutations.begin().await;
        assert_eq!((third.id().seq, third.id().done_below), (3, 2));
        drop((second, third));
        assert_eq!(mutations.begin().await.id().done_below, 4);
    }

    #[tokio::test]
    async fn two_clients_have_different_names_of_16_bytes() {
        let (a, b) = (Mutations::new(), Mutations::new());
        assert_eq!(a.begin().await.id().client.len(), 16);
        assert_ne!(a.begin().await.id().client, b.begin().await.id().client);
    }

    #[tokio::test]
    async fn no_more_outcomes_are_asked_for_than_the_state_remembers() {
        let mutations = Mutations::new();
        let oldest = mutations.begin().await;
        for _ in 1..OUTCOMES_PER_CLIENT_MAX {
            mutations.begin().await;
        }
        assert!(mutations.begin_now().is_none());
        let (next, ()) = tokio::join!(mutations.begin(), async { drop(oldest) });
        assert_eq!(next.id().done_below, next.id().seq);
    }
}
