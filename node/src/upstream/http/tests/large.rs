//! Large bodies: read only where there is room, and worked on by threads of their own.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// How long something is watched not to happen.
const A_WHILE: Duration = Duration::from_millis(200);

/// Answers `/N` with N bytes of JSON.
async fn origin() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/{{key}}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                loop {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(stream.read_u8().await.ok()?);
                    }
                    let head = String::from_utf8(head).ok()?;
                    let path = head.split(' ').nth(1)?.trim_start_matches('/');
                    let body = format!("\"{}\"", "x".repeat(path.parse::<usize>().ok()? - 2));
                    let head = format!(
                        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                        body.len()
                    );
                    stream.write_all(head.as_bytes()).await.ok()?;
                    stream.write_all(body.as_bytes()).await.ok()?;
                }
                #[expect(unreachable_code, reason = "says what the task returns")]
                Some(())
            });
        }
    });
    url
}

async fn upstream() -> Http {
    let mut spec = spec(&origin().await, &[]);
    spec.max_body_bytes = 4 << 20;
    spec.fetch_timeout = Duration::from_secs(60);
    Http::new("u".to_owned(), spec, Arc::default(), &shared()).unwrap()
}

async fn fetch(http: &Http, bytes: u64) -> usize {
    let key = Key::new(bytes.to_string()).unwrap();
    let fetched = http.fetch(&key, &[], &HeaderMap::new(), None).await;
    fetched.unwrap().into_value().unwrap().body.len()
}

#[tokio::test]
async fn a_large_body_waits_for_room_and_a_small_one_does_not() {
    let http = upstream().await;
    let all = http.room.hold(u64::MAX).await;
    assert_eq!(fetch(&http, ROOM_FREE_BYTES).await as u64, ROOM_FREE_BYTES);
    let mut large = Box::pin(fetch(&http, ROOM_FREE_BYTES + 1));
    let waited = tokio::time::timeout(A_WHILE, &mut large).await;
    assert!(waited.is_err(), "it did not wait for room");
    drop(all);
    assert_eq!(large.await as u64, ROOM_FREE_BYTES + 1);
    // And gives it back.
    http.room.hold(u64::MAX).await.unwrap();
}

#[tokio::test]
async fn a_large_body_waits_for_a_worker_and_a_small_one_does_not() {
    let http = upstream().await;
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let ended = Arc::new(std::sync::Mutex::new(ended));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let busy: Vec<_> = (0..processors)
        .map(|_| {
            let (workers, ended) = (http.workers.clone(), ended.clone());
            let work = move || ended.lock().unwrap().recv().is_err();
            tokio::spawn(async move { workers.run(u64::MAX, work).await })
        })
        .collect();
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(fetch(&http, 100).await, 100);
    let mut large = Box::pin(fetch(&http, 1 << 20));
    let waited = tokio::time::timeout(A_WHILE, &mut large).await;
    assert!(
        waited.is_err(),
        "it was worked on by the runtime's own thread"
    );
    drop(end);
    assert_eq!(large.await, 1 << 20);
    futures::future::join_all(busy).await;
}
