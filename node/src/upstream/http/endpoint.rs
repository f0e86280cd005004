//! Where a URL leads: what a connection goes to, and what it is found again by.

use url::{Host, Url};

/// One origin: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) is_tls: bool,
    pub(super) host: Host,
    pub(super) port: u16,
}

impl Endpoint {
    /// `None` for what is neither http nor https.
    pub(super) fn of(url: &Url) -> Option<Self> {
        Some(Self {
            is_tls: match url.scheme() {
                "https" => true,
                "http" => false,
                _ => return None,
            },
            host: url.host()?.to_owned(),
            port: url.port_or_known_default()?,
        })
    }
}
