//! The upstream `http` against a real server that misbehaves in every way: what it sends, what it
//! takes for a value, and by which class each failure is known.

use std::sync::Arc;
use std::time::Duration;

use holdfast_node::secret::{Secret, Secrets};
use holdfast_node::template::{TextTemplate, UrlTemplate};
use holdfast_node::upstream::http::{Http, HttpSpec};
use holdfast_node::upstream::{FetchFailed, Fetched};
use holdfast_proto::Key;
use holdfast_proto::v1::FailureClass;
use holdfast_tests::origin::{Answer, Behaviour, Gate, Origin};
use http::{HeaderMap, HeaderValue};

const USER_AGENT: &str = concat!("holdfast/", env!("CARGO_PKG_VERSION"));
/// Long enough that no healthy fetch of these tests reaches it.
const PATIENT: Duration = Duration::from_secs(60);
const HASTY: Duration = Duration::from_millis(200);

fn spec(url: &str) -> HttpSpec {
    HttpSpec {
        url: UrlTemplate::parse(url).unwrap(),
        headers: Vec::new(),
        select: Vec::new(),
        fetch_timeout: PATIENT,
        max_body_bytes: 1 << 20,
    }
}

fn build(spec: HttpSpec) -> Http {
    let mut secrets = Secrets::default();
    secrets.insert("token", Secret::new("hunter2"));
    Http::new("profiles".to_owned(), spec, Arc::new(secrets)).unwrap()
}

fn headers(pairs: &[(&str, &str)]) -> Vec<(String, TextTemplate)> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), TextTemplate::parse(value).unwrap()))
        .collect()
}

async fn fetch(spec: HttpSpec) -> Result<Fetched, FetchFailed> {
    build(spec)
        .fetch(&Key::new("user/7").unwrap(), &[b"7"], &HeaderMap::new())
        .await
}

/// What becomes of a fetch when the origin behaves like that.
async fn outcome(behaviour: Behaviour) -> Result<Fetched, FetchFailed> {
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
        .fetch(&Key::new("k").unwrap(), &["é".as_bytes()], &extra)
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
        http.fetch(&Key::new("k").unwrap(), &[], &HeaderMap::new())
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
async fn any_status_but_a_whole_success_fails() {
    for status in [206, 300, 304, 400, 401, 404, 410, 429, 500, 503] {
        let failed = outcome(Behaviour::status(status)).await.unwrap_err();
        assert_eq!(
            (failed.class, failed.status),
            (FailureClass::Status, u32::from(status))
        );
        assert_eq!(failed.retry_after, None);
    }
    for status in [200, 201, 203] {
        assert!(outcome(Behaviour::status(status)).await.is_ok(), "{status}");
    }
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
    assert_eq!(
        class(Behaviour::Answer(Answer::new(204, "application/json", ""))).await,
        FailureClass::Malformed
    );
    assert_eq!(
        outcome(Behaviour::Answer(Answer::new(204, "text/plain", "")))
            .await
            .unwrap()
            .body,
        ""
    );
    assert_eq!(
        outcome(Behaviour::text("{\"a\":")).await.unwrap().body,
        "{\"a\":"
    );
}

#[tokio::test]
async fn a_body_in_a_coding_nobody_asked_for_is_malformed() {
    assert_eq!(
        class(Behaviour::Answer(
            Answer::text("x").header("content-encoding", "gzip")
        ))
        .await,
        FailureClass::Malformed
    );
    assert!(
        outcome(Behaviour::Answer(
            Answer::text("x").header("content-encoding", "identity")
        ))
        .await
        .is_ok()
    );
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
            )
            .await
            .unwrap_err();
        assert_eq!(failed.class, FailureClass::Refused, "{key:?} {capture:?}");
    }
    assert_eq!(origin.calls(), 0);
    http.fetch(&Key::new("k").unwrap(), &[b"a/b"], &HeaderMap::new())
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
        .fetch(&Key::new("user/7").unwrap(), &[b"7"], &HeaderMap::new())
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
                http.fetch(&Key::new(key).unwrap(), &[], &HeaderMap::new())
                    .await
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
