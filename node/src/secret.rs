//! Credentials of upstreams: read once at start, kept in this node's memory, never printed.
//!
//! Promises that no formatting shows one: only `expose` does, and only what builds a request calls
//! it. Must never know the log, a reply, an error, a trace or a metric (P8).

use std::collections::BTreeMap;
use std::fmt;

/// One credential.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the request that carries it and nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// The declared credentials by name. Names are not secret.
#[derive(Debug, Clone, Default)]
pub struct Secrets(BTreeMap<String, Secret>);

impl Secrets {
    /// The one that had the name before, if any.
    pub fn insert(&mut self, name: impl Into<String>, secret: Secret) -> Option<Secret> {
        self.0.insert(name.into(), secret)
    }

    pub fn get(&self, name: &str) -> Option<&Secret> {
        self.0.get(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_formatting_shows_a_secret() {
        let mut secrets = Secrets::default();
        secrets.insert("token", Secret::new("hunter2"));
        let secret = secrets.get("token").unwrap();
        assert_eq!(secret.expose(), "hunter2");
        for shown in [
            format!("{secret}"),
            format!("{secret:?}"),
            format!("{secret:#?}"),
            format!("{secrets:?}"),
            format!("{secrets:#?}"),
        ] {
            assert!(!shown.contains("hunter2"), "{shown}");
            assert!(shown.contains("[redacted]"), "{shown}");
        }
    }
}
