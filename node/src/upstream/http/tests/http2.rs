//! HTTP/2: one connection for many, what of its endings is tried again, and what its transport
//! writes to the log.

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tracing_subscriber::util::SubscriberInitExt;

use super::*;

/// What becomes of one stream.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Answer,
    /// Not looked at (RFC 9113 §8.7).
    Refuse,
    Fail,
    /// The connection ends.
    Close,
}

/// An origin that speaks nothing else.
struct Http2 {
    port: u16,
    connections: Arc<AtomicU64>,
    streams: Arc<AtomicU64>,
}

impl Http2 {
    /// `ways` are of the streams in turn, whatever their connection; then all are answered.
    async fn start(ways: &'static [Way]) -> Self {
        let mut config = server_config(false).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connections, streams) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let origin = Self {
            port,
            connections: connections.clone(),
            streams: streams.clone(),
        };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                let (acceptor, streams) = (acceptor.clone(), streams.clone());
                tokio::spawn(async move {
                    let stream = acceptor.accept(stream).await.ok()?;
                    let mut connection = h2::server::handshake(stream).await.ok()?;
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        let number = streams.fetch_add(1, Ordering::SeqCst) as usize;
                        match ways.get(number).unwrap_or(&Way::Answer) {
                            Way::Answer => {
                                let mut body =
                                    respond.send_response(Response::new(()), false).ok()?;
                                body.send_data("by http/2".into(), true).ok()?;
                            }
                            Way::Refuse => respond.send_reset(Reason::REFUSED_STREAM),
                            Way::Fail => respond.send_reset(Reason::INTERNAL_ERROR),
                            Way::Close => return None,
                        }
                    }
                    Some(())
                });
            }
        });
        origin
    }

    fn client(&self, headers: &[(&str, &str)], secrets: Secrets) -> Http {
        let mut spec = spec(&format!("https://localhost:{}/{{key}}", self.port), headers);
        spec.tls = trusting(Some(own_root()));
        Http::new("u".to_owned(), spec, Arc::new(secrets), &shared()).unwrap()
    }

    fn counts(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        (count(&self.connections), count(&self.streams))
    }
}

async fn fetch(http: &Http) -> Result<Bytes, FailureClass> {
    let key = Key::new("a-key-of-nobodys-business").unwrap();
    let fetched = http.fetch(&key, &[], &HeaderMap::new(), None).await;
    fetched
        .map(|fetched| fetched.into_value().unwrap().body)
        .map_err(|failed| failed.class)
}

#[tokio::test]
async fn many_fetches_share_one_connection() {
    let origin = Http2::start(&[]).await;
    let http = origin.client(&[], Secrets::default());
    assert_eq!(fetch(&http).await.unwrap(), "by http/2");
    let fetches = futures::future::join_all((0..20).map(|_| fetch(&http))).await;
    assert!(fetches.iter().all(Result::is_ok), "{fetches:?}");
    assert_eq!(origin.counts(), (1, 21));
}

#[tokio::test]
async fn a_stream_that_was_refused_is_asked_for_again_and_one_that_failed_is_not() {
    use Way::{Answer, Close, Fail, Refuse};
    let origin = Http2::start(&[Answer, Refuse, Answer, Close, Answer, Fail]).await;
    let http = origin.client(&[], Secrets::default());
    for streams in [1, 3, 5] {
        assert_eq!(fetch(&http).await.unwrap(), "by http/2");
        assert_eq!(origin.counts().1, streams);
    }
    assert_eq!(fetch(&http).await, Err(FailureClass::Incomplete));
    assert_eq!(origin.counts().1, 6);
    // Nor is one over a connection that was new.
    let origin = Http2::start(&[Close]).await;
    let http = origin.client(&[], Secrets::default());
    assert_eq!(fetch(&http).await, Err(FailureClass::Incomplete));
    assert_eq!(origin.counts().1, 1);
}

/// All that anybody logs in this thread, as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One thread runs both ends, so that all of it is seen.
#[tokio::test]
async fn no_log_of_the_transport_shows_a_credential_or_a_key() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    // What is logged by `log`, as rustls does, comes too.
    let guard = subscriber.set_default();
    let origin = Http2::start(&[Way::Answer, Way::Fail]).await;
    let mut secrets = Secrets::default();
    secrets.insert("token", Secret::new("hunter2-is-planted"));
    let headers = [
        ("authorization", "Bearer ${secret:token}"),
        ("x-key", "{key}"),
    ];
    let http = origin.client(&headers, secrets);
    fetch(&http).await.unwrap();
    fetch(&http).await.unwrap_err();
    drop(guard);
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for heard in ["h2::", "rustls::", "fetch failed"] {
        assert!(
            text.contains(heard),
            "nothing of {heard} was logged: it is not heard"
        );
    }
    let shows = |hidden: &str| {
        text.lines()
            .filter(|line| line.contains(hidden))
            .collect::<Vec<_>>()
    };
    // Not their bytes either, as arrays of numbers or escaped.
    for hidden in [
        "hunter2",
        "a-key-of-nobodys-business",
        "104, 117, 110, 116, 101, 114, 50",
    ] {
        assert_eq!(shows(hidden), Vec::<&str>::new(), "{hidden}");
    }
}
