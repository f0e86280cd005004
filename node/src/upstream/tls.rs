//! How upstreams are trusted: the system's roots, one crypto provider.
//!
//! Promises that no certificate goes unverified and that nothing process-global is set. Must never
//! know an upstream.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};

/// What the system trusts (`SSL_CERT_FILE` and `SSL_CERT_DIR` count as the system's). Without any
/// root every https fetch fails; that is no reason for the node not to start, for what it has
/// stored is still to be served.
pub(super) fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots
}

pub(super) fn client_config(roots: RootCertStore) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
