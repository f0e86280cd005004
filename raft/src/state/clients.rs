//! Request outcomes: what the state remembers of each client's mutations, so that a retry happens
//! once.
//!
//! Bounded three ways, all of them functions of the log alone: 1,024 outcomes a client (the lowest
//! is forgotten, and refused from then on rather than done twice), 100,000 clients (the longest
//! silent is forgotten), 10 idle minutes of log time.

use std::{
    collections::{BTreeSet, HashMap},
    io,
};

use holdfast_proto::{
    limits::{CLIENT_IDLE, CLIENTS_MAX, OUTCOMES_PER_CLIENT_MAX},
    peer::{ClientRecord, Outcome},
    timeline::Millis,
    v1::RequestId,
};

use super::{
    effects::Effects,
    hash,
    record::{self, BadRecord, ClientId, client_head_key, client_outcome_key},
};
use crate::store::{Family, StateStore};

/// Idle clients forgotten per log entry: bounds the work of one entry.
const FORGET_PER_ENTRY: usize = 64;

/// The heads of all clients, in memory; their outcomes are in the store.
#[derive(Default)]
pub(crate) struct Clients {
    heads: HashMap<ClientId, ClientRecord>,
    by_last_seen: BTreeSet<(Millis, ClientId)>,
    /// Outcomes of the run that is being applied: not yet in the store.
    unwritten: HashMap<(ClientId, u64), Outcome>,
    /// Clients whose head that run changed: each is written once, at its end.
    changed: BTreeSet<ClientId>,
}

/// What is known of a request.
pub(crate) enum Recall {
    New,
    Done(Outcome),
    /// Answered once, long ago.
    Forgotten,
}

impl Clients {
    pub(crate) fn load(store: &dyn StateStore) -> io::Result<Self> {
        let mut clients = Self::default();
        for row in store.scan(Family::Client, b"h", Some(b"i")) {
            let (key, bytes) = row?;
            let head: ClientRecord = record::decode("client", &bytes)?;
            let client = key
                .get(1..)
                .and_then(|id| ClientId::try_from(id).ok())
                .ok_or_else(|| BadRecord::Damaged {
                    what: "client",
                    reason: "its key is not a client id".into(),
                })?;
            clients.by_last_seen.insert((head.last_seen_ms, client));
            clients.heads.insert(client, head);
        }
        Ok(clients)
    }

    /// Looks a request up and notes that its client is alive.
    pub(crate) fn recall(
        &mut self,
        store: &dyn StateStore,
        request: &RequestId,
        now: Millis,
        effects: &mut Effects,
    ) -> io::Result<Recall> {
        let Some(client) = client_id(request) else {
            return Ok(Recall::New);
        };
        self.see(client, request, now, effects);
        let head = &self.heads[&client];
        if request.seq < head.done_below {
            return Ok(Recall::Forgotten);
        }
        if head.seqs.binary_search(&request.seq).is_err() {
            return Ok(Recall::New);
        }
        if let Some(outcome) = self.unwritten.get(&(client, request.seq)) {
            return Ok(Recall::Done(outcome.clone()));
        }
        match store.get(Family::Client, &client_outcome_key(&client, request.seq))? {
            Some(bytes) => Ok(Recall::Done(record::decode("outcome", &bytes)?)),
            None => Err(BadRecord::Damaged {
                what: "outcome",
                reason: "its client remembers it and the store does not".into(),
            }
            .into()),
        }
    }

    pub(crate) fn remember(
        &mut self,
        request: &RequestId,
        outcome: &Outcome,
        effects: &mut Effects,
    ) {
        let Some(client) = client_id(request) else {
            return;
        };
        let Some(head) = self.heads.get_mut(&client) else {
            return;
        };
        if let Err(place) = head.seqs.binary_search(&request.seq) {
            head.seqs.insert(place, request.seq);
            effects.sum.toggle(hash::outcome(&client, request.seq));
        }
        effects.put(
            Family::Client,
            client_outcome_key(&client, request.seq),
            record::encode(outcome),
        );
        self.unwritten
            .insert((client, request.seq), outcome.clone());
        if head.seqs.len() > OUTCOMES_PER_CLIENT_MAX {
            effects.sum.toggle(hash::client(&client, head));
            let lowest = head.seqs.remove(0);
            head.done_below = lowest + 1;
            effects.sum.toggle(hash::client(&client, head));
            effects.sum.toggle(hash::outcome(&client, lowest));
            effects.delete(Family::Client, client_outcome_key(&client, lowest));
        }
        self.changed.insert(client);
    }

    /// Forgets clients that have been silent too long, a bounded number at a time.
    pub(crate) fn forget_idle(&mut self, now: Millis, effects: &mut Effects) {
        for _ in 0..FORGET_PER_ENTRY {
            let Some(&(last_seen, client)) = self.by_last_seen.first() else {
                return;
            };
            if last_seen.saturating_add(CLIENT_IDLE.as_millis() as Millis) > now {
                return;
            }
            self.forget(client, effects);
        }
    }

    /// Ends a run: what became of each client's head.
    pub(crate) fn finish(&mut self, effects: &mut Effects) {
        for client in std::mem::take(&mut self.changed) {
            match self.heads.get(&client) {
                Some(head) => effects.put(
                    Family::Client,
                    client_head_key(&client),
                    record::encode(head),
                ),
                None => effects.delete(Family::Client, client_head_key(&client)),
            }
        }
    }

    /// The run's batch is in the store.
    pub(crate) fn written(&mut self) {
        self.unwritten.clear();
    }

    fn see(&mut self, client: ClientId, request: &RequestId, now: Millis, effects: &mut Effects) {
        if !self.heads.contains_key(&client)
            && self.heads.len() >= CLIENTS_MAX
            && let Some(&(_, longest_silent)) = self.by_last_seen.first()
        {
            self.forget(longest_silent, effects);
        }
        self.changed.insert(client);
        if let Some(head) = self.heads.get(&client) {
            effects.sum.toggle(hash::client(&client, head));
        }
        let head = self.heads.entry(client).or_default();
        self.by_last_seen.remove(&(head.last_seen_ms, client));
        head.last_seen_ms = now;
        self.by_last_seen.insert((now, client));

        // The client says what it needs no more; it cannot give up what it has not asked yet.
        let done_below = request.done_below.min(request.seq);
        if done_below > head.done_below {
            head.done_below = done_below;
            let known = head.seqs.partition_point(|&seq| seq < done_below);
            for seq in head.seqs.drain(..known) {
                effects.sum.toggle(hash::outcome(&client, seq));
                effects.delete(Family::Client, client_outcome_key(&client, seq));
                self.unwritten.remove(&(client, seq));
            }
        }
        effects.sum.toggle(hash::client(&client, head));
    }

    fn forget(&mut self, client: ClientId, effects: &mut Effects) {
        let Some(head) = self.heads.remove(&client) else {
            return;
        };
        self.by_last_seen.remove(&(head.last_seen_ms, client));
        effects.sum.toggle(hash::client(&client, &head));
        for seq in head.seqs {
            effects.sum.toggle(hash::outcome(&client, seq));
            effects.delete(Family::Client, client_outcome_key(&client, seq));
            self.unwritten.remove(&(client, seq));
        }
        self.changed.insert(client);
    }
}

/// Requests are checked at the door; one that is not ours to remember is simply done.
fn client_id(request: &RequestId) -> Option<ClientId> {
    ClientId::try_from(request.client.as_ref()).ok()
}
