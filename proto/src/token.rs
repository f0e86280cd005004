//! What a session has seen: `{epoch, shard → revision}`, opaque to clients, merged by maximum.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::{Revision, ShardId, shard::SLOTS};

/// First byte of an encoded token, so that it can change.
const FORMAT: u8 = 1;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Token {
    epoch: u64,
    seen: BTreeMap<ShardId, Revision>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the token is not one of ours")]
pub struct InvalidToken;

impl Token {
    pub fn new(epoch: u64) -> Self {
        Self {
            epoch,
            seen: BTreeMap::new(),
        }
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }

    /// 0 if the session has seen nothing of the shard.
    pub fn revision(&self, shard: ShardId) -> Revision {
        self.seen.get(&shard).copied().unwrap_or(0)
    }

    pub fn see(&mut self, shard: ShardId, revision: Revision) {
        let seen = self.seen.entry(shard).or_default();
        *seen = revision.max(*seen);
    }

    /// Takes in what another token has seen. A later epoch replaces an earlier one: revisions of
    /// different epochs do not compare.
    pub fn merge(&mut self, other: &Token) {
        if other.epoch > self.epoch {
            *self = other.clone();
        } else if other.epoch == self.epoch {
            for (&shard, &revision) in &other.seen {
                self.see(shard, revision);
            }
        }
    }

    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(16 + 8 * self.seen.len());
        out.put_u8(FORMAT);
        prost::encoding::encode_varint(self.epoch, &mut out);
        for (&shard, &revision) in &self.seen {
            prost::encoding::encode_varint(u64::from(shard), &mut out);
            prost::encoding::encode_varint(revision, &mut out);
        }
        out.freeze()
    }

    /// No bytes are a token that has seen nothing.
    pub fn decode(mut bytes: &[u8]) -> Result<Option<Self>, InvalidToken> {
        if bytes.is_empty() {
            return Ok(None);
        }
        if bytes.get_u8() != FORMAT {
            return Err(InvalidToken);
        }
        let varint =
            |bytes: &mut &[u8]| prost::encoding::decode_varint(bytes).map_err(|_| InvalidToken);
        let mut token = Self::new(varint(&mut bytes)?);
        while !bytes.is_empty() {
            let shard = u32::try_from(varint(&mut bytes)?).map_err(|_| InvalidToken)?;
            let revision = varint(&mut bytes)?;
            if shard >= u32::from(SLOTS) || token.seen.insert(shard, revision).is_some() {
                return Err(InvalidToken);
            }
        }
        Ok(Some(token))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> impl Strategy<Value = Token> {
        (
            0..3u64,
            proptest::collection::btree_map(0..4096u32, any::<u64>(), 0..8),
        )
            .prop_map(|(epoch, seen)| Token { epoch, seen })
    }

    proptest! {
        #[test]
        fn a_token_round_trips(token in token()) {
            prop_assert_eq!(Token::decode(&token.encode()), Ok(Some(token)));
        }

        #[test]
        fn decoding_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Token::decode(&bytes);
        }

        #[test]
        fn merging_never_forgets(a in token(), b in token()) {
            let mut merged = a.clone();
            merged.merge(&b);
            for from in [&a, &b] {
                if from.epoch == merged.epoch {
                    for (&shard, &revision) in &from.seen {
                        prop_assert!(merged.revision(shard) >= revision);
                    }
                }
            }
            let mut again = merged.clone();
            again.merge(&a);
            again.merge(&b);
            prop_assert_eq!(again, merged);
        }
    }
}
