//! Scan: one page of keys in order over all shards, in messages of a bounded size. Counts as no
//! read, starts no fetch.

use std::{collections::VecDeque, sync::Arc};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::{
    StreamExt as _,
    future::try_join_all,
    stream::{self, BoxStream},
};
use holdfast_proto::{
    Key,
    limits::{KEY_BYTES_MAX, SCAN_LIMIT_DEFAULT, SCAN_LIMIT_MAX, SCAN_MESSAGE_BYTES},
    timeline::Millis,
    v1,
};
use holdfast_raft::{Deadline, Replica, Seen, Shown, Standing, View};

use super::{Cache, answer, controls::Controls};
use crate::{error::Error, operation::Call, rules::Rules};

/// The messages of one page; the last one carries the cursor of the next page.
pub type ScanStream = BoxStream<'static, Result<v1::ScanResponse, Error>>;

/// Entries read ahead of each shard: a few values of the largest size must not weigh, …
const READ_AHEAD: usize = 16;
/// … records without them do not.
const KEYS_AHEAD: usize = 256;
/// First byte of a cursor, so that it can change.
const CURSOR_FORMAT: u8 = 1;
/// What an entry's answer takes beside its key and value.
const ANSWER_BYTES: usize = 128;

/// A Scan that was checked.
#[derive(Debug)]
struct Checked {
    prefix: Bytes,
    from: Bytes,
    limit: u32,
    shown: Shown,
    controls: Controls,
}

/// A page on its way to the caller.
struct Page {
    cache: Arc<Cache>,
    rules: Arc<Rules>,
    prefix: Bytes,
    shown: Shown,
    controls: Controls,
    deadline: Deadline,
    /// Entries it may still carry.
    left: u32,
    shards: Vec<ShardRows>,
    ended: bool,
}

/// What comes next of one shard.
struct ShardRows {
    replica: Arc<Replica>,
    /// Before its first row was read.
    standing: Standing,
    ahead: VecDeque<(Key, View)>,
    /// Where reading goes on; `None` after the last row.
    from: Option<Bytes>,
    /// Rows that the next read asks for, where it reads values.
    rows: usize,
}

impl Cache {
    pub async fn scan(
        self: &Arc<Self>,
        request: v1::ScanRequest,
        call: &Call,
    ) -> Result<ScanStream, Error> {
        let Checked {
            prefix,
            from,
            limit,
            shown,
            controls,
        } = check(request)?;
        self.peers()?;
        let replicas = self.all_replicas()?;
        for replica in &replicas {
            self.seen_here(replica, &controls, &call.deadline).await?;
        }
        let rows = |replica: Arc<Replica>| ShardRows {
            standing: replica.standing(),
            ahead: VecDeque::new(),
            from: Some(from.clone()),
            rows: 1,
            replica,
        };
        let shards = replicas.into_iter().map(rows).collect();
        let page = Page {
            cache: self.clone(),
            rules: self.rules.load_full(),
            prefix,
            shown,
            controls,
            deadline: call.deadline.clone(),
            left: limit,
            shards,
            ended: false,
        };
        let messages = stream::unfold(page, |mut page| async {
            if page.ended {
                return None;
            }
            let message = page.next_message().await;
            page.ended |= message.is_err();
            Some((message, page))
        });
        Ok(messages.boxed())
    }

    /// Reads that are not forwarded: this replica has seen enough, or says where to go.
    pub(super) async fn seen_here(
        &self,
        replica: &Replica,
        controls: &Controls,
        deadline: &Deadline,
    ) -> Result<(), Error> {
        if replica.must_catch_up() {
            let error = Error::new(
                holdfast_proto::reason::NOT_READY,
                "this replica has not caught up since it joined",
            );
            return Err(self.sent_to_leader(replica, error));
        }
        // A session's revision may be waited for as long as the caller waits: nobody else is asked.
        let patience = if matches!(controls.seen, Seen::Token(_)) {
            deadline.left()
        } else {
            self.settings.session_wait
        };
        let seen = replica
            .wait_until_seen(&controls.seen, patience, deadline)
            .await;
        seen.map_err(|error| self.sent_to_leader(replica, error.into()))
    }
}

impl Page {
    async fn next_message(&mut self) -> Result<v1::ScanResponse, Error> {
        let mut message = v1::ScanResponse::default();
        let mut bytes = 0;
        loop {
            let Some((shard, now)) = self.next_live().await? else {
                return self.end(message, Bytes::new());
            };
            let Some((key, view)) = self.shards[shard].ahead.front() else {
                continue;
            };
            if self.left == 0 {
                let cursor = encode_cursor(key);
                return self.end(message, cursor);
            }
            let size = key.len() + ANSWER_BYTES + view.value().map_or(0, Bytes::len);
            if bytes > 0 && bytes + size > SCAN_MESSAGE_BYTES {
                return Ok(message);
            }
            bytes += size;
            message.entries.push(self.row(key, view, now));
            self.left -= 1;
            self.shards[shard].ahead.pop_front();
        }
    }

    /// The shard whose first row is the least key over all shards, and the instant it is judged by.
    async fn next_live(&mut self) -> Result<Option<(usize, Millis)>, Error> {
        loop {
            if self.deadline.has_passed() {
                return Err(Error::deadline());
            }
            let (prefix, shown) = (&self.prefix, self.shown);
            let shards = self.shards.iter_mut();
            try_join_all(shards.map(|shard| shard.read_ahead(prefix, shown))).await?;
            let Some(first) = least(
                self.shards
                    .iter()
                    .map(|shard| shard.ahead.front().map(|(key, _)| &**key)),
            ) else {
                return Ok(None);
            };
            let rows = &mut self.shards[first];
            let now = self.controls.now(&rows.replica);
            if rows
                .ahead
                .front()
                .is_some_and(|(_, view)| view.is_live(now) && !view.is_negative())
            {
                return Ok(Some((first, now)));
            }
            rows.ahead.pop_front();
        }
    }

    fn row(&self, key: &Key, view: &View, now: Millis) -> v1::ScanEntry {
        let policy = self.rules.policy(key);
        let behind = self.cache.behind(key, view.is_due(now), policy);
        v1::ScanEntry {
            key: key.as_bytes().clone(),
            answer: Some(answer::stored(view, now, behind)),
        }
    }

    fn end(
        &mut self,
        mut message: v1::ScanResponse,
        next_cursor: Bytes,
    ) -> Result<v1::ScanResponse, Error> {
        self.ended = true;
        let shards = self.shards.iter();
        let replicas: Vec<_> = shards
            .map(|shard| (&*shard.replica, shard.standing))
            .collect();
        let (replica, token) = self.cache.position(&*self.cache.peers()?, &replicas);
        message.next_cursor = next_cursor;
        message.replica = Some(replica);
        message.token = token.encode();
        Ok(message)
    }
}

impl ShardRows {
    async fn read_ahead(&mut self, prefix: &Bytes, shown: Shown) -> Result<(), Error> {
        // Every entry of a batch may be gone again: only where the rows end does the shard.
        while self.ahead.is_empty()
            && let Some(from) = self.from.take()
        {
            let limit = match shown {
                Shown::Records => KEYS_AHEAD,
                Shown::Values => self.rows,
            };
            let read = self.replica.scan(prefix.clone(), from, limit, shown).await;
            let read = read.map_err(|error| Error::disk(&error))?;
            let bytes = read.entries.iter().filter_map(|(_, view)| view.value());
            self.rows = match bytes.map(Bytes::len).sum::<usize>() > SCAN_MESSAGE_BYTES {
                true => 1,
                false => (2 * self.rows).min(READ_AHEAD),
            };
            self.from = read.next;
            self.ahead = read.entries.into();
        }
        Ok(())
    }
}

fn check(request: v1::ScanRequest) -> Result<Checked, Error> {
    let v1::ScanRequest {
        prefix,
        limit,
        cursor,
        keys_only,
        consistency,
        token,
    } = request;
    if prefix.len() > KEY_BYTES_MAX {
        return Err(Error::field(
            "prefix",
            format_args!("it has {} bytes, more than any key", prefix.len()),
        ));
    }
    let limit = match limit {
        0 => SCAN_LIMIT_DEFAULT,
        limit if limit > SCAN_LIMIT_MAX => {
            return Err(Error::field(
                "limit",
                format_args!("{limit} is more than {SCAN_LIMIT_MAX}"),
            ));
        }
        limit => limit,
    };
    let from = match cursor.is_empty() {
        true => prefix.clone(),
        false => decode_cursor(cursor)
            .filter(|key| key.starts_with(&prefix))
            .ok_or_else(|| {
                Error::field(
                    "cursor",
                    "it is not one of ours, or of a scan with another prefix",
                )
            })?,
    };
    Ok(Checked {
        prefix,
        from,
        limit,
        shown: if keys_only {
            Shown::Records
        } else {
            Shown::Values
        },
        controls: Controls::parse(consistency, token)?,
    })
}

/// The next key, behind a format.
fn encode_cursor(next: &Key) -> Bytes {
    let mut cursor = BytesMut::with_capacity(1 + next.len());
    cursor.put_u8(CURSOR_FORMAT);
    cursor.put_slice(next);
    cursor.freeze()
}

fn decode_cursor(mut cursor: Bytes) -> Option<Bytes> {
    let known = cursor.get_u8() == CURSOR_FORMAT;
    known
        .then_some(cursor)
        .and_then(|key| Key::new(key).ok())
        .map(Bytes::from)
}

/// Which of them is least.
fn least<'a>(heads: impl Iterator<Item = Option<&'a [u8]>>) -> Option<usize> {
    heads
        .enumerate()
        .filter_map(|(shard, key)| Some((key?, shard)))
        .min()
        .map(|(_, shard)| shard)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Code;

    fn checked(change: impl FnOnce(&mut v1::ScanRequest)) -> Result<Checked, (Code, String)> {
        let mut request = v1::ScanRequest::default();
        change(&mut request);
        check(request).map_err(|error| (error.code(), error.metadata("field").unwrap().to_owned()))
    }

    fn mistake(field: &str) -> (Code, String) {
        (Code::InvalidArgument, field.into())
    }

    #[test]
    fn a_page_has_100_entries_unless_told_and_1000_at_most() {
        assert_eq!(checked(|_| ()).unwrap().limit, 100);
        assert_eq!(checked(|scan| scan.limit = 1000).unwrap().limit, 1000);
        assert_eq!(
            checked(|scan| scan.limit = 1001).unwrap_err(),
            mistake("limit")
        );
        assert_eq!(
            checked(|scan| scan.consistency = 99).unwrap_err(),
            mistake("consistency")
        );
        assert_eq!(
            checked(|scan| scan.prefix = vec![0; 1025].into()).unwrap_err(),
            mistake("prefix")
        );
    }

    #[test]
    fn a_cursor_that_is_none_of_ours_is_a_mistake() {
        let ours = encode_cursor(&Key::new("user/7").unwrap());
        let from = |prefix: &'static str, cursor: Bytes| {
            checked(|scan| (scan.prefix, scan.cursor) = (prefix.into(), cursor))
                .map(|checked| checked.from)
        };
        assert_eq!(from("user/", ours.clone()).unwrap(), "user/7");
        assert_eq!(from("", ours.clone()).unwrap(), "user/7");
        assert_eq!(from("user/", Bytes::new()).unwrap(), "user/");
        for cursor in [
            Bytes::from_static(b"\x02user/7"),
            Bytes::from_static(b"\x01"),
            vec![1; 1026].into(),
        ] {
            assert_eq!(from("", cursor).unwrap_err(), mistake("cursor"));
        }
        assert_eq!(from("group/", ours).unwrap_err(), mistake("cursor"));
    }

    proptest! {
        #[test]
        fn a_cursor_round_trips(key in proptest::collection::vec(any::<u8>(), 1..1024)) {
            let key = Key::new(key).unwrap();
            prop_assert_eq!(decode_cursor(encode_cursor(&key)).unwrap(), key.as_bytes());
        }

        #[test]
        fn pages_come_in_key_order_over_all_shards(mut shards in proptest::collection::vec(proptest::collection::btree_set(any::<u16>(), 0..20), 1..5)) {
            let mut all: Vec<u16> = shards.iter().flatten().copied().collect();
            all.sort_unstable();
            let mut merged = Vec::new();
            loop {
                let heads: Vec<Option<[u8; 2]>> = shards.iter().map(|shard| shard.first().map(|key| key.to_be_bytes())).collect();
                let Some(shard) = least(heads.iter().map(|head| head.as_ref().map(|key| key.as_slice()))) else { break };
                merged.extend(shards[shard].pop_first());
            }
            prop_assert_eq!(merged, all);
        }
    }
}
