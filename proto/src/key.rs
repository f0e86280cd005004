//! A key: checked once at the door, trusted afterwards.

use std::fmt;

use bytes::Bytes;

use crate::limits::KEY_BYTES_MAX;

/// 1 to 1,024 bytes of any kind. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Bytes);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    #[error("the key is empty")]
    Empty,
    #[error("the key has {0} bytes, more than {KEY_BYTES_MAX}")]
    TooLong(usize),
}

impl Key {
    pub fn new(bytes: impl Into<Bytes>) -> Result<Self, InvalidKey> {
        let bytes = bytes.into();
        match bytes.len() {
            0 => Err(InvalidKey::Empty),
            n if n > KEY_BYTES_MAX => Err(InvalidKey::TooLong(n)),
            _ => Ok(Self(bytes)),
        }
    }

    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }
}

impl std::ops::Deref for Key {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::borrow::Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl From<Key> for Bytes {
    fn from(key: Key) -> Self {
        key.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// For people: printable ASCII as it is, anything else escaped.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_of_a_key_are_1_and_1024_bytes() {
        assert_eq!(Key::new(""), Err(InvalidKey::Empty));
        assert!(Key::new(vec![0; 1]).is_ok());
        assert!(Key::new(vec![0; 1024]).is_ok());
        assert_eq!(Key::new(vec![0; 1025]), Err(InvalidKey::TooLong(1025)));
    }
}
