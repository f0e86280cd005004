//! The upstream `http` against a real server that misbehaves in every way: what it sends, what it
//! takes for a value, and by which class each failure is known.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use holdfast_node::secret::{Secret, Secrets};
use holdfast_node::template::{TextTemplate, UrlTemplate};
use holdfast_node::upstream::http::{Http, HttpSpec, Unframed};
use holdfast_node::upstream::{Content, FetchFailed, Said, Shared, Value};
use holdfast_proto::Key;
use holdfast_proto::peer::Validators;
use holdfast_proto::v1::FailureClass;
use holdfast_raft::Clock;
use holdfast_tests::origin::{Answer, Behaviour, Gate, Origin};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::net::TcpStream;
use url::Host;

const USER_AGENT: &str = concat!("holdfast/", env!("CARGO_PKG_VERSION"));
/// Long enough that no healthy fetch of these tests reaches it.
const PATIENT: Duration = Duration::from_secs(60);
const PLAIN: &[u8] = br#"{"a": 1}"#;
const GZIPPED: &[u8] = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\xab\x56\x4a\x54\xb2\x52\x30\xac\x05\x00\x97\x8e\xa1\xfb\x08\x00\x00\x00";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd\x20\x08\x41\x00\x00\x7b\x22\x61\x22\x3a\x20\x31\x7d";
const ZSTD_BOMB: &[u8] = b"\x28\xb5\x2f\xfd\x00\x50\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x02\x00\x10\x00\x03\x00\x10\x00";
const HASTY: Duration = Duration::from_millis(200);

fn spec(url: &str) -> HttpSpec {
    HttpSpec {
        fetch_timeout: PATIENT,
        max_body_bytes: 1 << 20,
        ..HttpSpec::new(UrlTemplate::parse(url).unwrap())
    }
}

fn build(spec: HttpSpec) -> Http {
    build_with(spec, &Shared::new(Clock::system()))
}

fn build_with(spec: HttpSpec, shared: &Shared) -> Http {
    let mut secrets = Secrets::default();
    secrets.insert("token", Secret::new("hunter2"));
    Http::new("profiles".to_owned(), spec, Arc::new(secrets), shared).unwrap()
}

fn headers(pairs: &[(&str, &str)]) -> Vec<(String, TextTemplate)> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), TextTemplate::parse(value).unwrap()))
        .collect()
}

async fn fetch(spec: HttpSpec) -> Result<Value, FetchFailed> {
    fetch_by(&build(spec)).await
}

async fn fetch_by(http: &Http) -> Result<Value, FetchFailed> {
    let key = Key::new("user/7").unwrap();
    let fetched = http.fetch(&key, &[b"7"], &HeaderMap::new(), None).await;
    fetched.map(|fetched| fetched.into_value().expect("a value"))
}

/// What becomes of a fetch when the origin behaves like that.
async fn outcome(behaviour: Behaviour) -> Result<Value, FetchFailed> {
    let origin = Origin::start().await.unwrap();
    origin.respond(behaviour);
    fetch(spec(&origin.url("/users/{1}"))).await
}

async fn class(behaviour: Behaviour) -> FailureClass {
    outcome(behaviour).await.unwrap_err().class
}

#[tokio::test]
async fn a_value_comes_byte_for_byte_with_its_content_type() {
    let origin = Origin::start().await.unwrap();
    origin.respond(Behaviour::Answer(Answer::new(
        200,
        "image/png; a=b",
        &b"\x89PNG\0\xff"[..],
    )));
    let fetched = fetch(spec(&origin.url("/users/{1}?key={key}")))
        .await
        .unwrap();
    assert_eq!(
        (fetched.body, fetched.content_type.as_str()),
        ((&b"\x89PNG\0\xff"[..]).into(), "image/png; a=b")
    );
    let request = origin.last_request().unwrap();
    assert_eq!(
        (request.method.as_str(), request.target.as_str()),
        ("GET", "/users/7?key=user%2F7")
    );
    assert_eq!(request.headers["user-agent"], USER_AGENT);
    assert_eq!(request.headers["accept-encoding"], "identity");
    assert_eq!((origin.calls(), origin.calls_of("/users/7")), (1, 1));
}

#[tokio::test]
async fn the_configured_headers_and_the_callers_are_sent() {
    let origin = Origin::start().await.unwrap();
    let mut spec = spec(&origin.url("/"));
    spec.headers = headers(&[
        ("Authorization", "Bearer ${secret:token}"),
        ("x-user", "{1} of {key}"),
        ("user-agent", "mine"),
    ]);
    let extra = HeaderMap::from_iter([(
        "traceparent".parse().unwrap(),
        HeaderValue::from_static("00-1-2-01"),
    )]);
    build(spec)
        .fetch(&Key::new("k").unwrap(), &["é".as_bytes()], &extra, None)
        .await
        .unwrap();
    let sent = origin.last_request().unwrap().headers;
    assert_eq!(sent["authorization"], "Bearer hunter2");
    assert_eq!(sent["x-user"].as_bytes(), "é of k".as_bytes());
    assert_eq!(sent["user-agent"], "mine");
    assert_eq!(sent.get_all("user-agent").iter().count(), 1);
    assert_eq!(sent["traceparent"], "00-1-2-01");
}

#[tokio::test]
async fn cookies_are_not_kept() {
    let origin = Origin::start().await.unwrap();
    origin.respond(Behaviour::Answer(
        Answer::text("").header("set-cookie", "session=1"),
    ));
    let http = build(spec(&origin.url("/")));
    for _ in 0..2 {
        http.fetch(&Key::new("k").unwrap(), &[], &HeaderMap::new(), None)
            .await
            .unwrap();
    }
    assert!(
        origin
            .requests()
            .iter()
            .all(|request| !request.headers.contains_key("cookie"))
    );
}

/// Runs itself again as a child, because a process's environment cannot be changed safely.
#[tokio::test]
async fn no_proxy_and_no_netrc_is_taken_from_the_environment() {
    const URL: &str = "HOLDFAST_TEST_UPSTREAM_URL";
    if let Ok(url) = std::env::var(URL) {
        assert_eq!(fetch(spec(&url)).await.unwrap().body, "direct");
        return;
    }
    let (origin, proxy) = (
        Origin::start().await.unwrap(),
        Origin::start().await.unwrap(),
    );
    origin.respond(Behaviour::text("direct"));
    proxy.respond(Behaviour::text("by proxy"));
    let home = tempfile::tempdir().unwrap();
    let netrc = home.path().join(".netrc");
    std::fs::write(&netrc, "machine 127.0.0.1 login me password hunter2\n").unwrap();
    let mut child = tokio::process::Command::new(std::env::current_exe().unwrap());
    child.args([
        "--exact",
        "upstream_http::no_proxy_and_no_netrc_is_taken_from_the_environment",
    ]);
    child
        .env(URL, origin.url("/"))
        .env("HOME", home.path())
        .env("NETRC", &netrc)
        .env_remove("NO_PROXY")
        .env_remove("no_proxy");
    for name in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
        child.env(name, proxy.url(""));
    }
    let ended = child.output().await.unwrap();
    assert!(
        ended.status.success(),
        "{}",
        String::from_utf8_lossy(&ended.stdout)
    );
    assert_eq!((origin.calls(), proxy.calls()), (1, 0));
    assert!(
        !origin
            .last_request()
            .unwrap()
            .headers
            .contains_key("authorization")
    );
}

#[tokio::test]
async fn only_a_status_that_is_wanted_brings_a_value() {
    for status in [
        201, 202, 204, 205, 206, 226, 300, 304, 400, 401, 404, 410, 429, 500, 503,
    ] {
        let failed = outcome(Behaviour::status(status)).await.unwrap_err();
        assert_eq!(
            (failed.class, failed.status),
            (FailureClass::Status, u32::from(status))
        );
        assert_eq!(failed.retry_after, None);
    }
    for status in [200, 203] {
        assert!(outcome(Behaviour::status(status)).await.is_ok(), "{status}");
    }
    let origin = Origin::start().await.unwrap();
    for (status, is_wanted) in [(202, true), (204, true), (200, false)] {
        origin.respond(Behaviour::Answer(Answer::new(status, "text/plain", "")));
        let mut spec = spec(&origin.url("/"));
        spec.accept_status = [202, 204].map(|s| StatusCode::from_u16(s).unwrap()).into();
        assert_eq!(fetch(spec).await.is_ok(), is_wanted, "{status}");
    }
}

#[tokio::test]
async fn a_body_that_ends_with_its_connection_is_taken_only_where_that_is_allowed() {
    let origin = Origin::start().await.unwrap();
    for (head, is_framed) in [
        ("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n", false),
        ("HTTP/1.1 200 OK\r\n\r\n", false),
        ("HTTP/1.0 200 OK\r\n\r\n", false),
        ("HTTP/1.0 200 OK\r\ncontent-length: 4\r\n\r\n", true),
    ] {
        origin.respond(Behaviour::Raw(format!("{head}half").into()));
        for unframed in [Unframed::Refuse, Unframed::Allow] {
            let fetched = fetch(HttpSpec {
                unframed,
                ..spec(&origin.url("/"))
            });
            let outcome = fetched.await.map(|fetched| fetched.body);
            if is_framed || unframed == Unframed::Allow {
                assert_eq!(outcome.unwrap(), "half", "{head}");
            } else {
                let class = outcome.unwrap_err().class;
                assert_eq!(class, FailureClass::Incomplete, "{head}");
            }
        }
    }
}

#[tokio::test]
async fn a_used_connection_that_ends_without_an_answer_costs_one_more_try_and_no_failure() {
    let (mut origin, number) = (Origin::start().await.unwrap(), Arc::new(AtomicU64::new(0)));
    let http = build(spec(&origin.url("/")));
    let value = async || fetch_by(&http).await.map(|fetched| fetched.body);
    let counted = number.clone();
    origin.respond(Behaviour::per_connection(move |nth| {
        counted.fetch_add(1, Ordering::SeqCst);
        if nth == 1 {
            Behaviour::text("new")
        } else {
            Behaviour::Close
        }
    }));
    // Each first request of a connection is answered, each further one ends it.
    for calls in [1, 3, 5] {
        assert_eq!(value().await.unwrap(), "new");
        assert_eq!(
            (origin.calls(), number.load(Ordering::SeqCst)),
            (calls, calls)
        );
    }
    // Closed while it was idle: seen without a call.
    origin.stop().await.unwrap();
    origin.restart().unwrap();
    origin.respond(Behaviour::text("again"));
    assert_eq!(value().await.unwrap(), "again");
    assert_eq!(origin.calls(), 6);
    // A new connection is no stale one, and an answer begun is an answer.
    origin.respond(Behaviour::Close);
    assert_eq!(value().await.unwrap_err().class, FailureClass::Incomplete);
    assert_eq!(origin.calls(), 8);
    origin.respond(Behaviour::text("used"));
    value().await.unwrap();
    origin.respond(Behaviour::CutShort {
        content_length: 9,
        answer: Answer::text("half"),
    });
    assert_eq!(value().await.unwrap_err().class, FailureClass::Incomplete);
    assert_eq!(origin.calls(), 10);
}

#[tokio::test]
async fn a_connection_is_used_again_for_a_minute_and_no_longer() {
    let (origin, clock) = (Origin::start().await.unwrap(), Clock::system());
    origin.respond(Behaviour::text("value"));
    let http = build_with(spec(&origin.url("/")), &Shared::new(clock.clone()));
    let fetch = async || {
        fetch_by(&http).await.unwrap();
        origin.connections()
    };
    assert_eq!((fetch().await, fetch().await), (1, 1));
    clock.advance(Duration::from_secs(30));
    assert_eq!(fetch().await, 1);
    clock.advance(Duration::from_secs(30));
    assert_eq!((fetch().await, fetch().await), (2, 2));
    // Also after answers that nobody wanted.
    origin.respond(Behaviour::status(500));
    for _ in 0..3 {
        assert!(fetch_by(&http).await.is_err());
    }
    assert_eq!(origin.connections(), 2);
}

#[tokio::test]
async fn an_address_that_takes_no_connection_ends_at_the_connect_timeout() {
    // A listener whose backlog is full does not answer.
    let silent = tokio::net::TcpSocket::new_v4().unwrap();
    silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let silent = silent.listen(0).unwrap();
    let address = silent.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(Ok(stream)) = tokio::time::timeout(HASTY, TcpStream::connect(address)).await {
        waiting.push(stream);
    }
    let mut spec = spec(&format!("http://{address}/"));
    spec.connect_timeout = HASTY;
    let failed = tokio::time::timeout(PATIENT / 2, fetch(spec)).await;
    assert_eq!(failed.unwrap().unwrap_err().class, FailureClass::Connect);
}

#[tokio::test]
async fn retry_after_is_heard_with_429_and_503() {
    let asked = async |status, value: &str| {
        outcome(Behaviour::Answer(
            Answer::status(status).header("retry-after", value),
        ))
        .await
        .unwrap_err()
        .retry_after
    };
    assert_eq!(asked(429, "7").await, Some(Duration::from_secs(7)));
    assert_eq!(asked(503, "0").await, Some(Duration::ZERO));
    assert_eq!(asked(500, "7").await, None);
    assert_eq!(asked(503, "Fri, 31 Dec 1999 23:59:59 GMT").await, None);
    let dated = Answer::status(429)
        .header("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT")
        .header("date", "Fri, 31 Dec 1999 23:59:49 GMT");
    let failed = outcome(Behaviour::Answer(dated)).await.unwrap_err();
    assert_eq!(failed.retry_after, Some(Duration::from_secs(10)));
    assert_eq!(asked(503, "-1").await, None);
}

#[tokio::test]
async fn no_connection_is_connect() {
    let mut origin = Origin::start().await.unwrap();
    let url = origin.url("/");
    // No TLS is spoken there.
    assert_eq!(
        fetch(spec(&url.replace("http:", "https:")))
            .await
            .unwrap_err()
            .class,
        FailureClass::Connect
    );
    assert!(fetch(spec(&url)).await.is_ok());
    origin.stop().await.unwrap();
    assert_eq!(
        fetch(spec(&url)).await.unwrap_err().class,
        FailureClass::Connect
    );
    assert_eq!(
        fetch(spec("http://nowhere.invalid/"))
            .await
            .unwrap_err()
            .class,
        FailureClass::Connect
    );
    origin.restart().unwrap();
    assert!(fetch(spec(&url)).await.is_ok());
}

#[tokio::test]
async fn the_timeout_counts_everything() {
    let origin = Origin::start().await.unwrap();
    let forever = Gate::closed();
    let ways = [
        Behaviour::Hang,
        Behaviour::text("late").after(&forever),
        Behaviour::Trickle {
            interval: Duration::from_millis(10),
        },
        Behaviour::redirect(302, "/next").delayed(Duration::from_millis(150)),
    ];
    for behaviour in ways {
        origin.respond(behaviour.clone());
        let mut spec = spec(&origin.url("/"));
        spec.fetch_timeout = HASTY;
        assert_eq!(
            fetch(spec).await.unwrap_err().class,
            FailureClass::Timeout,
            "{behaviour:?}"
        );
    }
}

#[tokio::test]
async fn a_fetch_that_is_dropped_ends_the_call() {
    let origin = Origin::start().await.unwrap();
    origin.respond(Behaviour::Hang);
    let flight = tokio::spawn(fetch(spec(&origin.url("/"))));
    origin.reached(1).await;
    assert_eq!(origin.calls_open(), 1);
    flight.abort();
    tokio::time::timeout(PATIENT, origin.idle()).await.unwrap();
}

#[tokio::test]
async fn a_body_cut_short_is_incomplete() {
    for answer in [Answer::text("half"), Answer::json("{}"), Answer::text("")] {
        let behaviour = Behaviour::CutShort {
            content_length: 1000,
            answer,
        };
        assert_eq!(class(behaviour).await, FailureClass::Incomplete);
    }
    for raw in [
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\nnonsense\r\n",
        "HTTP/1.1 200 OK\r\ncontent-le",
        "SSH-2.0-OpenSSH_9.2\r\n",
    ] {
        assert_eq!(
            class(Behaviour::Raw(raw.into())).await,
            FailureClass::Incomplete,
            "{raw}"
        );
    }
    assert_eq!(class(Behaviour::Close).await, FailureClass::Incomplete);
}

#[tokio::test]
async fn a_body_over_the_bound_is_refused_while_it_streams() {
    let hundred_mb = Behaviour::Stream {
        content_type: "text/plain".to_owned(),
        bytes: 100 << 20,
    };
    assert_eq!(class(hundred_mb).await, FailureClass::TooLarge);
    // Nothing of this body ever comes: what it declares is enough.
    let declared = Behaviour::CutShort {
        content_length: 100 << 20,
        answer: Answer::text(""),
    };
    assert_eq!(class(declared).await, FailureClass::TooLarge);
    for (bytes, fits) in [(1 << 20, true), ((1 << 20) + 1, false)] {
        assert_eq!(
            outcome(Behaviour::text(vec![b'x'; bytes])).await.is_ok(),
            fits,
            "{bytes}"
        );
        let stream = Behaviour::Stream {
            content_type: "text/plain".to_owned(),
            bytes: bytes as u64,
        };
        assert_eq!(
            outcome(stream).await.map(|fetched| fetched.body.len()).ok(),
            fits.then_some(bytes)
        );
    }
}

#[tokio::test]
async fn a_body_that_says_it_is_json_must_parse() {
    assert_eq!(
        outcome(Behaviour::json(" [1.0, {}] ")).await.unwrap().body,
        " [1.0, {}] "
    );
    assert_eq!(
        class(Behaviour::json("{\"a\":")).await,
        FailureClass::Malformed
    );
    assert_eq!(
        class(Behaviour::Answer(Answer::new(
            200,
            "application/problem+json; x=y",
            "<html>"
        )))
        .await,
        FailureClass::Malformed
    );
    assert_eq!(class(Behaviour::json("")).await, FailureClass::Malformed);
    assert_eq!(outcome(Behaviour::text("")).await.unwrap().body, "");
    let marked = Behaviour::json("\u{feff}{}");
    assert_eq!(outcome(marked).await.unwrap().body, "{}");
    assert_eq!(
        outcome(Behaviour::text("{\"a\":")).await.unwrap().body,
        "{\"a\":"
    );
}

#[tokio::test]
async fn a_coded_body_is_decoded_whether_or_not_it_was_asked_for_and_bounded_as_any_other() {
    let coded = |coding: &str, body: &[u8]| {
        let answer = Answer::json(body.to_vec()).header("content-encoding", coding);
        outcome(Behaviour::Answer(answer))
    };
    for (coding, body) in [("gzip", GZIPPED), ("zstd", ZSTD), ("identity", PLAIN)] {
        assert_eq!(coded(coding, body).await.unwrap().body, PLAIN, "{coding}");
    }
    for (coding, body) in [("gzip", PLAIN), ("gzip, gzip", GZIPPED), ("br", PLAIN)] {
        let class = coded(coding, body).await.unwrap_err().class;
        assert_eq!(class, FailureClass::Malformed, "{coding}");
    }
    // 2 MiB of zeros where 1 MiB is the most.
    let bomb = coded("zstd", ZSTD_BOMB).await.unwrap_err();
    assert_eq!(bomb.class, FailureClass::TooLarge);

    let origin = Origin::start().await.unwrap();
    let mut spec = spec(&origin.url("/"));
    spec.headers = headers(&[("accept-encoding", "zstd, gzip")]);
    fetch(spec).await.unwrap();
    let asked = origin.last_request().unwrap();
    assert_eq!(asked.headers["accept-encoding"], "zstd, gzip");
    assert_eq!(asked.headers.get_all("accept-encoding").iter().count(), 1);
}

#[tokio::test]
async fn selected_fields_are_all_that_leaves() {
    let origin = Origin::start().await.unwrap();
    origin.respond(Behaviour::json(
        r#"{"token": "s3cret", "plan": "gold", "id": 12345678901234567890.10, "name": {"a": [1]}}"#,
    ));
    let select = async |names: &[&str]| {
        let mut spec = spec(&origin.url("/"));
        spec.select = names.iter().map(|name| (*name).to_owned()).collect();
        fetch(spec).await
    };
    let fetched = select(&["name", "id"]).await.unwrap();
    assert_eq!(
        fetched.body,
        r#"{"name":{"a": [1]},"id":12345678901234567890.10}"#
    );
    assert_eq!(fetched.content_type, "application/json");
    assert_eq!(
        select(&["name", "gone"]).await.unwrap_err().class,
        FailureClass::MissingField
    );
    origin.respond(Behaviour::json("[1]"));
    assert_eq!(
        select(&["name"]).await.unwrap_err().class,
        FailureClass::Malformed
    );
}

#[tokio::test]
async fn five_redirects_are_followed_and_no_more() {
    for status in [301, 302, 303, 307, 308] {
        let origin = Origin::start().await.unwrap();
        for hop in 0..6 {
            origin.respond_at(
                &format!("/{hop}"),
                Behaviour::redirect(status, format!("{}?from={hop}", hop + 1)),
            );
        }
        origin.respond_at("/6", Behaviour::text("there"));
        assert_eq!(fetch(spec(&origin.url("/1"))).await.unwrap().body, "there");
        assert_eq!(origin.last_request().unwrap().target, "/6?from=5");
        assert_eq!(
            fetch(spec(&origin.url("/0"))).await.unwrap_err().class,
            FailureClass::Redirect
        );
        assert_eq!(origin.calls_of("/6"), 1);
    }
}

#[tokio::test]
async fn a_redirect_that_leads_nowhere_is_not_followed() {
    let origin = Origin::start().await.unwrap();
    let with_user = origin.url("/").replace("http://", "http://user:pass@");
    for location in [
        "ftp://h/",
        "file:///etc/passwd",
        "http://",
        "data:,x",
        &with_user,
        &format!("/{}", "x".repeat(9000)),
    ] {
        origin.respond_at("/start", Behaviour::redirect(302, location));
        assert_eq!(
            fetch(spec(&origin.url("/start"))).await.unwrap_err().class,
            FailureClass::Redirect,
            "{location}"
        );
    }
    assert_eq!(class(Behaviour::status(302)).await, FailureClass::Redirect);
    assert_eq!(origin.calls_of("/"), 0);
}

#[tokio::test]
async fn credentials_never_follow_to_another_origin_nor_come_back() {
    let (home, away) = (
        Origin::start().await.unwrap(),
        Origin::start().await.unwrap(),
    );
    home.respond_at("/start", Behaviour::redirect(307, "/same"));
    home.respond_at("/same", Behaviour::redirect(307, away.url("/away")));
    away.respond_at("/away", Behaviour::redirect(307, home.url("/back")));
    home.respond_at("/back", Behaviour::text("value"));
    let mut spec = spec(&home.url("/start"));
    let ours = [
        ("authorization", "Bearer ${secret:token}"),
        ("cookie", "a=${secret:token}"),
        ("x-api-key", "${secret:token}"),
    ];
    spec.headers = headers(&ours);
    assert_eq!(fetch(spec).await.unwrap().body, "value");

    let carries = |request: &holdfast_tests::origin::Request| {
        ours.iter()
            .filter(|(name, _)| request.headers.contains_key(*name))
            .count()
    };
    let at_home: Vec<_> = home
        .requests()
        .iter()
        .map(|request| (request.target.clone(), carries(request)))
        .collect();
    assert_eq!(
        at_home,
        [
            ("/start".to_owned(), 3),
            ("/same".to_owned(), 3),
            ("/back".to_owned(), 0)
        ]
    );
    let abroad = away.last_request().unwrap();
    assert_eq!((away.calls(), carries(&abroad)), (1, 0));
    assert!(!format!("{abroad:?}").contains("hunter2"));
    assert_eq!(abroad.headers["user-agent"], USER_AGENT);
}

#[tokio::test]
async fn no_redirect_leads_to_another_host_nor_to_this_nodes_own_listeners() {
    let (home, own) = (
        Origin::start().await.unwrap(),
        Origin::start().await.unwrap(),
    );
    own.respond(Behaviour::text("internal"));
    let shared = Shared::new(Clock::system());
    shared.own_listeners().set([own.address()]);
    let by_name = own.url("/").replace("127.0.0.1", "localhost");
    let follow = async |to: String, hosts: &[&str]| {
        home.respond(Behaviour::redirect(302, to));
        let mut spec = spec(&home.url("/"));
        spec.redirects = hosts
            .iter()
            .map(|host| Host::parse(host).unwrap())
            .collect();
        let fetched = fetch_by(&build_with(spec, &shared)).await;
        fetched.map(|fetched| fetched.body)
    };
    for (to, hosts) in [
        (by_name.clone(), &[][..]),
        (by_name.clone(), &["localhost"]),
        (own.url("/"), &[]),
        ("http://[::ffff:127.0.0.1]:1/".to_owned(), &[]),
        ("http://169.254.169.254/latest/meta-data/".to_owned(), &[]),
        ("http://169.254.169.254/".to_owned(), &["169.254.169.254"]),
    ] {
        let failed = follow(to.clone(), hosts).await.unwrap_err();
        assert_eq!(failed.class, FailureClass::Redirect, "{to} {hosts:?}");
    }
    assert_eq!(own.calls(), 0);
    let other = Origin::start().await.unwrap();
    other.respond(Behaviour::text("other"));
    let by_name = other.url("/").replace("127.0.0.1", "localhost");
    assert_eq!(follow(by_name, &["localhost"]).await.unwrap(), "other");
}

#[tokio::test]
async fn a_key_that_makes_no_request_causes_no_call() {
    let origin = Origin::start().await.unwrap();
    let mut spec = spec(&origin.url("/users/{1:path}"));
    spec.headers = headers(&[("x-user", "{key}")]);
    let http = build(spec);
    for (key, capture) in [
        ("k", ".."),
        ("k", "a/../b"),
        ("k", "%2e%2e"),
        ("k", "a//b"),
        ("k", ""),
        ("k\r\nx: y", "a"),
        ("k\0", "a"),
        ("k\n", "a"),
    ] {
        let failed = http
            .fetch(
                &Key::new(key).unwrap(),
                &[capture.as_bytes()],
                &HeaderMap::new(),
                None,
            )
            .await
            .unwrap_err();
        assert_eq!(failed.class, FailureClass::Refused, "{key:?} {capture:?}");
    }
    assert_eq!(origin.calls(), 0);
    http.fetch(&Key::new("k").unwrap(), &[b"a/b"], &HeaderMap::new(), None)
        .await
        .unwrap();
    assert_eq!(origin.calls_of("/users/a/b"), 1);
}

#[tokio::test]
async fn a_failure_says_nothing_of_the_upstream() {
    let origin = Origin::start().await.unwrap();
    origin.respond(Behaviour::Answer(Answer::new(
        500,
        "text/plain",
        "password is hunter2",
    )));
    let mut spec = spec(&origin.url("/users/{1}"));
    spec.headers = headers(&[("authorization", "Bearer ${secret:token}")]);
    let http = build(spec);
    let failed = http
        .fetch(
            &Key::new("user/7").unwrap(),
            &[b"7"],
            &HeaderMap::new(),
            None,
        )
        .await
        .unwrap_err();
    assert_eq!(failed.to_string(), "status 500");
    assert!(!format!("{failed:?} {http:?}").contains("hunter2"));
}

#[tokio::test]
async fn an_origin_counts_what_it_is_asked() {
    let origin = Origin::start().await.unwrap();
    let gate = Gate::closed();
    origin.respond(
        Behaviour::compute(|target, number| Answer::text(format!("{target} {number}")))
            .after(&gate),
    );
    let http = Arc::new(build(spec(&origin.url("/{key}"))));
    let flights: Vec<_> = ["a", "a", "b"]
        .map(|key| {
            let http = http.clone();
            tokio::spawn(async move {
                http.fetch(&Key::new(key).unwrap(), &[], &HeaderMap::new(), None)
                    .await
                    .unwrap()
                    .into_value()
                    .unwrap()
                    .body
            })
        })
        .into();
    origin.reached(3).await;
    assert_eq!(
        (
            origin.calls_of("/a"),
            origin.calls_of("/b"),
            origin.calls_open()
        ),
        (2, 1, 3)
    );
    gate.open();
    let mut bodies = Vec::new();
    for flight in flights {
        bodies.push(flight.await.unwrap());
    }
    bodies.sort();
    assert_eq!(bodies, ["/a 1", "/a 2", "/b 1"]);
    origin.idle().await;
    assert_eq!(origin.calls_open_max(), 3);
}

/// Also by a url, a header or a selection of another configuration: then it is another question.
#[tokio::test]
async fn an_origin_is_asked_whether_its_value_is_still_the_same() {
    let origin = Origin::start().await.unwrap();
    let date = "Fri, 31 Dec 1999 23:59:59 GMT";
    let named = |answer: Answer| {
        answer
            .header("etag", "\"v1\"")
            .header("last-modified", date)
    };
    origin.respond(Behaviour::Answer(named(Answer::json("{\"a\":1}"))));
    let spec = spec(&origin.url("/users/{1}"));
    let (key, none) = (Key::new("user/7").unwrap(), HeaderMap::new());
    let ask = async |spec: &HttpSpec, known: Option<&Validators>| {
        let http = build(spec.clone());
        http.fetch(&key, &[b"7"], &none, known).await
    };
    let sent = || {
        let headers = origin.last_request().unwrap().headers;
        let text = |name: &str| Some(headers.get(name)?.to_str().unwrap().to_owned());
        (text("if-none-match"), text("if-modified-since"))
    };
    let first = ask(&spec, None).await.unwrap();
    assert_eq!(sent(), (None, None));
    let known = first.validators.clone().unwrap();

    origin.respond(Behaviour::Answer(named(Answer::new(304, "a/b", ""))));
    let same = ask(&spec, Some(&known)).await.unwrap();
    assert_eq!(sent(), (Some("\"v1\"".into()), Some(date.into())));
    assert_eq!(same.content, Content::Unchanged);
    assert_eq!(same.validators, Some(known.clone()));

    // Nobody asked: then it is no answer.
    let unasked = ask(&spec, None).await.unwrap_err();
    assert_eq!((unasked.class, unasked.status), (FailureClass::Status, 304));
    let mut others = [(); 3].map(|()| spec.clone());
    others[0].url = UrlTemplate::parse(&origin.url("/people/{1}")).unwrap();
    others[1].headers = headers(&[("accept", "text/html")]);
    others[2].select = vec!["a".into()];
    for other in others {
        assert!(ask(&other, Some(&known)).await.is_err());
        assert_eq!(sent(), (None, None));
    }
}

#[tokio::test]
async fn what_an_origin_says_of_its_value_comes_with_it() {
    let answer = Answer::text("v")
        .header("cache-control", "max-age=7, stale-if-error=9")
        .header("age", "3");
    let origin = Origin::start().await.unwrap();
    origin.respond(Behaviour::Answer(answer));
    let http = build(spec(&origin.url("/")));
    let key = Key::new("k").unwrap();
    let fetched = http.fetch(&key, &[], &HeaderMap::new(), None).await;
    let said = Said {
        lifetime: Some(Duration::from_secs(7)),
        age: Duration::from_secs(3),
        stale_if_error: Some(Duration::from_secs(9)),
        ..Default::default()
    };
    assert_eq!(fetched.unwrap().said, said);
}
