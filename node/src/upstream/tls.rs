//! How upstreams are trusted and how they know us: the system's roots or a CA of their own, and a
//! certificate for those that ask for one.
//!
//! Promises that no certificate goes unverified and that nothing process-global is set. Must never
//! know an upstream.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

const PEM_BYTES_MAX: u64 = 1 << 20;

/// What the system trusts, read when it is first asked for: once for all upstreams.
#[derive(Debug, Clone, Default)]
pub(super) struct SystemRoots(Arc<OnceLock<Arc<RootCertStore>>>);

/// What the configuration says of one upstream's TLS.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// Instead of the system's.
    pub roots: Option<Arc<RootCertStore>>,
    pub identity: Option<Arc<Identity>>,
}

/// A certificate, those that vouch for it, and its key.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl SystemRoots {
    /// `SSL_CERT_FILE` and `SSL_CERT_DIR` count as the system's. Without any root every https fetch
    /// fails; that is no reason for the node not to start, for what it has stored is still to be
    /// served.
    pub(super) fn get(&self) -> Arc<RootCertStore> {
        let read = || {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                tracing::warn!("the system has no root certificates: every https fetch will fail");
            }
            Arc::new(roots)
        };
        self.0.get_or_init(read).clone()
    }
}

impl Tls {
    pub(super) fn client(&self, system: &SystemRoots) -> Result<ClientConfig, rustls::Error> {
        let roots = self.roots.clone().unwrap_or_else(|| system.get());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut config = match self.identity.as_deref() {
            Some(Identity { chain, key }) => {
                builder.with_client_auth_cert(chain.clone(), key.clone_key())?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// The certificates of a PEM file, each of which is trusted.
pub fn read_roots(path: &Path) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| format!("`{}`: {error}", path.display()))?;
    }
    Ok(Arc::new(roots))
}

/// A certificate with its chain, and its key, of two PEM files. The error never shows any of them.
pub fn read_identity(certificate: &Path, key: &Path) -> Result<Arc<Identity>, String> {
    let chain = certificates(certificate)?;
    let key_der = PrivateKeyDer::from_pem_slice(&read(key)?)
        .map_err(|_| format!("`{}` has no private key in PEM", key.display()))?;
    let provider = rustls::crypto::ring::default_provider();
    rustls::sign::CertifiedKey::from_der(chain.clone(), key_der.clone_key(), &provider)
        .map_err(|error| format!("`{}`: {error}", key.display()))?;
    let key = key_der;
    Ok(Arc::new(Identity { chain, key }))
}

/// At least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    read.ok()
        .filter(|certificates| !certificates.is_empty())
        .ok_or_else(|| format!("`{}` has no certificate in PEM", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let in_file = |reason: &dyn std::fmt::Display| format!("`{}`: {reason}", path.display());
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| in_file(&error))?;
    file.take(PEM_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| in_file(&error))?;
    if bytes.len() as u64 > PEM_BYTES_MAX {
        return Err(in_file(&"it is over 1 MiB"));
    }
    Ok(bytes)
}
