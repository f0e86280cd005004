//! What is refused before anything is sent, and TLS, both ways.

mod http2;
mod large;

use std::io::{Read, Write};

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;

use super::*;
use crate::secret::Secret;
use crate::upstream::{Value, tls};

/// Signed by itself for `localhost` and 127.0.0.1, 2020 to 2120. Of no use but here.
const CERTIFICATE: &[u8] = include_bytes!("../testdata/localhost.cert.der");
const CERTIFICATE_KEY: &[u8] = include_bytes!("../testdata/localhost.key.der");

fn shared() -> Shared {
    Shared::new(Clock::system())
}

fn spec(url: &str, headers: &[(&str, &str)]) -> HttpSpec {
    let headers = headers
        .iter()
        .map(|(name, text)| ((*name).to_owned(), TextTemplate::parse(text).unwrap()))
        .collect();
    HttpSpec {
        headers,
        max_body_bytes: 1024,
        ..HttpSpec::new(UrlTemplate::parse(url).unwrap())
    }
}

#[test]
fn what_could_never_be_sent_is_refused_when_built() {
    let mut secrets = Secrets::default();
    secrets.insert("good", Secret::new("hunter2"));
    secrets.insert("bad", Secret::new("hunter2\n"));
    let secrets = Arc::new(secrets);
    let built = |headers: &[(&str, &str)], select: &[&str]| {
        let mut spec = spec("http://h/", headers);
        spec.select = select.iter().map(|name| (*name).to_owned()).collect();
        Http::new("u".to_owned(), spec, secrets.clone(), &shared())
            .map(drop)
            .map_err(|error| error.to_string())
    };
    assert_eq!(
        built(&[("a", "${secret:good}"), ("b", "")], &["a", "b"]),
        Ok(())
    );
    let refused = |headers: &[(&str, &str)], select: &[&str], why: &str| {
        let error = built(headers, select).unwrap_err();
        assert!(error.contains(why) && !error.contains("hunter2"), "{error}");
    };
    refused(&[("a b", "x")], &[], "`a b` is no header name");
    refused(
        &[("Host", "{1}")],
        &[],
        "`Host` is not for the configuration",
    );
    refused(&[("X-A", "x"), ("x-a", "y")], &[], "`x-a` is set twice");
    refused(&[("a", "${secret:other}")], &[], "`other` is not declared");
    refused(&[("a", "${secret:bad}")], &[], "`bad` has a line break");
    refused(&[], &["a", "a"], "`a` is selected twice");
    for codings in ["br", "gzip, br", "*", "gzip,", "{key}"] {
        refused(&[("Accept-Encoding", codings)], &[], "may ask for `gzip`");
    }
    let codings = [("accept-encoding", "zstd, gzip;q=0.5, identity")];
    assert_eq!(built(&codings, &[]), Ok(()));
}

#[tokio::test]
async fn a_certificate_that_the_roots_do_not_vouch_for_is_connect() {
    let by_tls = async |host: &str, roots| fetch_by_tls(host, trusting(roots), false).await;
    for host in ["localhost", "127.0.0.1"] {
        assert_eq!(by_tls(host, Some(own_root())).await.unwrap().body, "by tls");
    }
    let refused = async |host: &str, roots| by_tls(host, roots).await.unwrap_err().class;
    // The certificate is good, but not for this name of the same host.
    let elsewhere = refused("127.0.0.2", Some(own_root())).await;
    assert_eq!(elsewhere, FailureClass::Connect);
    let nobody = refused("localhost", Some(RootCertStore::empty())).await;
    assert_eq!(nobody, FailureClass::Connect);
    assert_eq!(refused("localhost", None).await, FailureClass::Connect);
}

#[tokio::test]
async fn a_private_ca_and_a_client_certificate_are_read_from_pem_files() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, label: &str, der: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, pem(label, der)).unwrap();
        path
    };
    let certificate = write("cert.pem", "CERTIFICATE", CERTIFICATE);
    let key = write("key.pem", "PRIVATE KEY", CERTIFICATE_KEY);
    let mut tls = Tls {
        roots: Some(tls::read_roots(&certificate).unwrap()),
        identity: None,
    };
    let refused = fetch_by_tls("localhost", tls.clone(), true).await;
    assert!(
        refused.is_err(),
        "a certificate was asked for and not shown"
    );
    tls.identity = Some(tls::read_identity(&certificate, &key).unwrap());
    let fetched = fetch_by_tls("localhost", tls, true).await.unwrap();
    assert_eq!(fetched.body, "by tls");

    let other = write("other.pem", "OTHER", b"hunter2");
    let absent = directory.path().join("absent.pem");
    for (error, why) in [
        (
            tls::read_roots(&other).map(drop),
            "has no certificate in PEM",
        ),
        (tls::read_roots(&absent).map(drop), "No such file"),
        (
            tls::read_identity(&certificate, &other).map(drop),
            "has no private key in PEM",
        ),
        (
            tls::read_identity(&key, &key).map(drop),
            "has no certificate",
        ),
    ] {
        let error = error.unwrap_err();
        assert!(error.contains(why) && !error.contains("hunter2"), "{error}");
    }
}

fn trusting(roots: Option<RootCertStore>) -> Tls {
    Tls {
        roots: roots.map(Arc::new),
        identity: None,
    }
}

fn own_root() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_slice(CERTIFICATE)).unwrap();
    roots
}

/// Base64 between its two lines (RFC 7468).
fn pem(label: &str, der: &[u8]) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for (count, chunk) in der.chunks(3).enumerate() {
        if count % 16 == 0 {
            text.push('\n');
        }
        let bits = chunk
            .iter()
            .fold(0u32, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * place)) as usize & 63];
            text.push(if place <= chunk.len() {
                letter.into()
            } else {
                '='
            });
        }
    }
    format!("-----BEGIN {label}-----{text}\n-----END {label}-----\n")
}

async fn fetch_by_tls(host: &str, tls: Tls, is_mutual: bool) -> Result<Value, FetchFailed> {
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut spec = spec(&format!("https://{host}:{port}/"), &[]);
    spec.tls = tls;
    let server = std::thread::spawn(move || answer_by_tls(listener, is_mutual));
    let http = Http::new("u".to_owned(), spec, Arc::default(), &shared()).unwrap();
    let fetched = http
        .fetch(&Key::new("k").unwrap(), &[], &HeaderMap::new(), None)
        .await;
    let _ = server.join().unwrap();
    fetched.map(|fetched| fetched.into_value().unwrap())
}

fn server_config(is_mutual: bool) -> std::io::Result<rustls::ServerConfig> {
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(CERTIFICATE_KEY));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(own_root()), provider.clone())
            .build()
            .map_err(std::io::Error::other)?;
    let builder = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(std::io::Error::other)?;
    let builder = if is_mutual {
        builder.with_client_cert_verifier(clients)
    } else {
        builder.with_no_client_auth()
    };
    builder
        .with_single_cert(vec![CertificateDer::from_slice(CERTIFICATE)], key)
        .map_err(std::io::Error::other)
}

/// One connection, one answer; an error is the caller's refusal.
fn answer_by_tls(listener: std::net::TcpListener, is_mutual: bool) -> std::io::Result<()> {
    let config = server_config(is_mutual)?;
    let session = rustls::ServerConnection::new(Arc::new(config)).map_err(std::io::Error::other)?;
    let mut stream = rustls::StreamOwned::new(session, listener.accept()?.0);
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\nby tls")?;
    stream.flush()
}
