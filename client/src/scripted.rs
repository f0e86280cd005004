//! Real servers that answer by script, and the rules of routing and retrying held against them.
//! Only for what no cluster can be made to say on demand; how a cluster behaves is tested with
//! clusters.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::stream::BoxStream;
use holdfast_proto::{
    Token, reason,
    v1::{self, cache_service_server::CacheServiceServer},
};
use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tonic::{Code, Request, Response, Status, transport::server::TcpIncoming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{Applied, Client, Consistency, Error, builder::Builder};

/// What a node does with the next call; with none left it answers well.
pub(crate) enum Step {
    Fail(Status),
    /// Answers well, and names the leader.
    Hint(String),
    Hang,
}

pub(crate) struct Node {
    address: String,
    script: Arc<Script>,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Script {
    steps: Mutex<VecDeque<Step>>,
    seen: Mutex<Vec<Seen>>,
    /// What every Get answers; a miss if not said.
    answer: Mutex<Option<v1::Answer>>,
    /// The messages of each page to come.
    pages: Mutex<VecDeque<Vec<v1::ScanResponse>>>,
}

/// A call as it arrived.
#[derive(Debug, Clone)]
struct Seen {
    request_id: Option<v1::RequestId>,
    token: Bytes,
    timeout: Option<String>,
}

#[derive(Clone)]
struct Service(Arc<Script>);

impl Node {
    pub(crate) async fn start(steps: impl IntoIterator<Item = Step>) -> Self {
        let script = Arc::new(Script {
            steps: Mutex::new(steps.into_iter().collect()),
            ..Script::default()
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = CacheServiceServer::new(Service(script.clone()));
        let server = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
                .unwrap();
        });
        Self {
            address,
            script,
            server,
        }
    }

    pub(crate) fn answer(&self, answer: v1::Answer) {
        *self.script.answer.lock() = Some(answer);
    }

    /// The messages of a further page.
    pub(crate) fn page(&self, messages: Vec<v1::ScanResponse>) {
        self.script.pages.lock().push_back(messages);
    }

    fn calls(&self) -> usize {
        self.script.seen.lock().len()
    }

    fn seen(&self) -> Vec<Seen> {
        self.script.seen.lock().clone()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Service {
    async fn step<M, R>(
        &self,
        request: &Request<M>,
        seen: Seen,
        answer: R,
    ) -> Result<Response<R>, Status> {
        let timeout = request
            .metadata()
            .get("grpc-timeout")
            .map(|value| value.to_str().unwrap().to_owned());
        self.0.seen.lock().push(Seen { timeout, ..seen });
        let step = self.0.steps.lock().pop_front();
        match step {
            None => Ok(Response::new(answer)),
            Some(Step::Fail(status)) => Err(status),
            Some(Step::Hint(leader)) => {
                let mut response = Response::new(answer);
                response
                    .metadata_mut()
                    .insert(reason::LEADER_HEADER, leader.parse().unwrap());
                Ok(response)
            }
            Some(Step::Hang) => std::future::pending().await,
        }
    }
}

fn seen(request_id: Option<v1::RequestId>, token: Bytes) -> Seen {
    Seen {
        request_id,
        token,
        timeout: None,
    }
}

pub(crate) fn token(revision: u64) -> Token {
    let mut token = Token::new(1);
    token.see(0, revision);
    token
}

fn not_scripted<R>() -> Result<Response<R>, Status> {
    Err(Status::unimplemented("not scripted"))
}

#[tonic::async_trait]
impl v1::cache_service_server::CacheService for Service {
    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        let seen = seen(None, request.get_ref().token.clone());
        let miss = || v1::Answer {
            state: v1::State::Miss as i32,
            ..Default::default()
        };
        let answer = self.0.answer.lock().clone().unwrap_or_else(miss);
        let response = v1::GetResponse {
            answer: Some(answer),
            replica: Some(v1::Replica::default()),
            token: token(1).encode(),
        };
        self.step(&request, seen, response).await
    }

    async fn set(
        &self,
        request: Request<v1::SetRequest>,
    ) -> Result<Response<v1::SetResponse>, Status> {
        let seen = seen(request.get_ref().request_id.clone(), Bytes::new());
        let response = v1::SetResponse {
            version: 7,
            replica: Some(v1::Replica::default()),
            token: token(7).encode(),
        };
        self.step(&request, seen, response).await
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let seen = seen(request.get_ref().request_id.clone(), Bytes::new());
        let response = v1::DeleteResponse {
            existed: true,
            replica: Some(v1::Replica::default()),
            token: token(8).encode(),
        };
        self.step(&request, seen, response).await
    }

    async fn batch_get(
        &self,
        _: Request<v1::BatchGetRequest>,
    ) -> Result<Response<v1::BatchGetResponse>, Status> {
        not_scripted()
    }

    async fn invalidate(
        &self,
        _: Request<v1::InvalidateRequest>,
    ) -> Result<Response<v1::InvalidateResponse>, Status> {
        not_scripted()
    }

    async fn inspect(
        &self,
        _: Request<v1::InspectRequest>,
    ) -> Result<Response<v1::InspectResponse>, Status> {
        not_scripted()
    }

    type ScanStream = BoxStream<'static, Result<v1::ScanResponse, Status>>;

    async fn scan(
        &self,
        _: Request<v1::ScanRequest>,
    ) -> Result<Response<Self::ScanStream>, Status> {
        let messages = self.0.pages.lock().pop_front().unwrap_or_default();
        Ok(Response::new(Box::pin(futures::stream::iter(
            messages.into_iter().map(Ok),
        ))))
    }
}

fn unavailable(why: &str, metadata: &[(&str, &str)]) -> Step {
    let metadata: HashMap<String, String> = metadata
        .iter()
        .map(|&(k, v)| (k.into(), v.into()))
        .collect();
    Step::Fail(Status::with_error_details(
        Code::Unavailable,
        "words",
        ErrorDetails::with_error_info(why, reason::DOMAIN, metadata),
    ))
}

fn no() -> Step {
    unavailable(reason::NO_LEADER, &[(reason::APPLIED, reason::APPLIED_NO)])
}

fn unknown() -> Step {
    unavailable(
        reason::NO_QUORUM,
        &[(reason::APPLIED, reason::APPLIED_UNKNOWN)],
    )
}

fn builder(nodes: &[&Node]) -> Builder {
    Client::builder().endpoints(nodes.iter().map(|node| node.address.clone()))
}

pub(crate) fn client(nodes: &[&Node]) -> Client {
    builder(nodes).build().unwrap()
}

/// An address where nobody listens.
async fn nobody() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().to_string()
}

/// A node that dies with its first request unanswered.
async fn breaks_off() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.unwrap();
        let mut start_of_the_request = [0; 128];
        connection
            .read_exact(&mut start_of_the_request)
            .await
            .unwrap();
    });
    address
}

#[tokio::test]
async fn a_write_without_request_id_is_not_sent_again_when_its_outcome_is_unknown() {
    let (a, b) = (Node::start([unknown()]).await, Node::start([]).await);
    let error = builder(&[&a, &b])
        .request_ids(false)
        .build()
        .unwrap()
        .set("k", "v")
        .await
        .unwrap_err();
    assert_eq!(
        (error.applied(), error.reason()),
        (Applied::Unknown, reason::NO_QUORUM)
    );
    assert_eq!((a.calls(), b.calls()), (1, 0));
    assert_eq!(a.seen()[0].request_id, None);
}

#[tokio::test]
async fn a_write_without_request_id_is_sent_again_when_it_did_not_happen() {
    let (a, b) = (Node::start([no()]).await, Node::start([]).await);
    let stored = builder(&[&a, &b])
        .request_ids(false)
        .build()
        .unwrap()
        .set("k", "v")
        .await
        .unwrap();
    assert_eq!((stored.version, a.calls(), b.calls()), (7, 1, 1));
}

#[tokio::test]
async fn every_try_of_a_mutation_carries_the_same_request_id() {
    let a = Node::start([unknown(), no(), unknown()]).await;
    let client = client(&[&a]);
    client.delete("k").await.unwrap();
    let ids: Vec<_> = a
        .seen()
        .into_iter()
        .map(|seen| seen.request_id.unwrap())
        .collect();
    assert_eq!(ids.len(), 4);
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");

    client.set("k", "v").await.unwrap();
    let next = a.seen()[4].request_id.clone().unwrap();
    assert_eq!((next.seq, next.done_below), (2, 2));
    assert_eq!(next.client, ids[0].client);
}

#[tokio::test]
async fn once_unknown_a_mutation_is_never_reported_as_not_applied() {
    let a = Node::start([unknown(), no(), no()]).await;
    let error = builder(&[&a])
        .retries(2)
        .build()
        .unwrap()
        .set("k", "v")
        .await
        .unwrap_err();
    assert_eq!(
        (error.reason(), error.applied()),
        (reason::NO_LEADER, Applied::Unknown)
    );
    assert_eq!(a.calls(), 3);
}

#[tokio::test]
async fn a_lost_connection_leaves_a_write_unknown_and_a_named_one_is_taken_elsewhere() {
    let b = Node::start([]).await;
    let to = |address: String| Client::builder().endpoints([address, b.address.clone()]);
    let error = to(breaks_off().await)
        .request_ids(false)
        .build()
        .unwrap()
        .set("k", "v")
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert_eq!(
        (error.applied(), error.reason(), b.calls()),
        (Applied::Unknown, "CONNECTION", 0)
    );

    assert_eq!(
        to(breaks_off().await)
            .build()
            .unwrap()
            .set("k", "v")
            .await
            .unwrap()
            .version,
        7
    );
    assert_eq!(b.calls(), 1);
}

#[tokio::test]
async fn writes_follow_the_leader_named_by_an_answer_and_reads_stay() {
    let leader = Node::start([]).await;
    let a = Node::start([Step::Hint(leader.address.clone())]).await;
    let client = client(&[&a]);
    // Until the connection to an address that was only heard of stands, writes go on as before.
    let mut writes = 0;
    while leader.calls() == 0 {
        client.set("k", "v").await.unwrap();
        writes += 1;
        assert!(writes < 10_000, "no write ever went to the leader");
    }
    client.get("k").await.unwrap();
    assert_eq!((a.calls(), leader.calls()), (writes, 1));
}

#[tokio::test]
async fn a_client_that_does_not_follow_the_leader_stays_with_its_endpoints() {
    let leader = Node::start([]).await;
    let a = Node::start([Step::Hint(leader.address.clone())]).await;
    let client = builder(&[&a]).follow_leader(false).build().unwrap();
    for _ in 0..100 {
        client.set("k", "v").await.unwrap();
    }
    assert_eq!((a.calls(), leader.calls()), (100, 0));
}

/// An address whose packets vanish: a listener that accepts nobody and whose queue is full.
async fn black_hole() -> (String, Vec<tokio::net::TcpStream>) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    let patience = Duration::from_millis(200);
    while let Ok(connected) =
        tokio::time::timeout(patience, tokio::net::TcpStream::connect(address)).await
    {
        queued.push(connected.unwrap());
        assert!(queued.len() < 100, "the queue never fills");
    }
    // The listener stays open for as long as the test runs.
    std::mem::forget(listener);
    (address.to_string(), queued)
}

#[tokio::test]
async fn a_leader_at_an_address_that_swallows_packets_stalls_no_write() {
    const CONNECT: Duration = Duration::from_secs(30);
    let (address, _queued) = black_hole().await;
    let a = Node::start([Step::Hint(address.clone()), Step::Hint(address)]).await;
    let client = builder(&[&a])
        .connect_timeout(CONNECT)
        .timeout(CONNECT)
        .build()
        .unwrap();
    let writes = async {
        for _ in 0..20 {
            client.set("k", "v").await.unwrap();
        }
    };
    tokio::time::timeout(CONNECT / 3, writes)
        .await
        .expect("a write waited for the connection to the leader");
    assert_eq!(a.calls(), 20);
}

#[tokio::test]
async fn the_next_call_waits_for_no_node_that_failed_before() {
    let (address, _queued) = black_hole().await;
    let a = Node::start([]).await;
    let endpoints = [address, a.address.clone()];
    let client = Client::builder()
        .endpoints(endpoints)
        .connect_timeout(Duration::from_millis(100))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    // Its first rest is over, and it is as dead as before.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let read = tokio::time::timeout(Duration::from_millis(90), client.get("k").into_future());
    read.await.expect("the read waited").unwrap();
}

#[tokio::test]
async fn sessions_share_connections_and_request_ids_but_not_what_they_have_seen() {
    let a = Node::start([]).await;
    let client = client(&[&a]);
    let (ada, bob) = (client.session(), client.session());
    ada.set("k", "v").await.unwrap();
    bob.get("k").await.unwrap();
    ada.get("k").await.unwrap();
    bob.set("k", "v").await.unwrap();
    let seen = a.seen();
    assert!(!ada.token().is_empty() && client.token().is_empty());
    assert_eq!(seen[1].token, Bytes::new(), "Bob has seen nothing");
    assert_ne!(seen[2].token, Bytes::new());
    let ids = [0, 3].map(|call| seen[call].request_id.clone().unwrap());
    assert_eq!(ids[0].client, ids[1].client);
    assert_eq!((ids[0].seq, ids[1].seq), (1, 2));

    bob.see(&ada.token());
    bob.get("k").await.unwrap();
    assert_eq!(a.seen()[4].token, seen[2].token, "one that goes on");
}

#[tokio::test]
async fn a_write_goes_at_once_to_the_leader_that_its_refusal_names() {
    let leader = Node::start([]).await;
    let metadata = [
        (reason::APPLIED, reason::APPLIED_NO),
        (reason::LEADER, leader.address.as_str()),
    ];
    let a = Node::start([unavailable(reason::NO_LEADER, &metadata)]).await;
    let client = builder(&[&a]).retries(0).build().unwrap();
    client.set("k", "v").await.unwrap();
    assert_eq!((a.calls(), leader.calls()), (1, 1));
}

#[tokio::test]
async fn a_leader_that_cannot_be_reached_costs_no_write() {
    let a = Node::start([Step::Hint(nobody().await)]).await;
    let client = client(&[&a]);
    client.set("k", "v").await.unwrap();
    client.set("k", "v").await.unwrap();
    assert_eq!(a.calls(), 2);
}

#[tokio::test]
async fn a_dead_first_endpoint_fails_over() {
    let b = Node::start([]).await;
    let client = Client::builder()
        .endpoints([nobody().await, b.address.clone()])
        .retries(0)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    client.set("k", "v").await.unwrap();
    assert_eq!(b.calls(), 2);
}

#[tokio::test]
async fn a_node_that_dies_between_two_calls_costs_neither_reads_nor_writes() {
    let b = Node::start([]).await;
    let mortal = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let a = mortal.spawn(Node::start([])).await.unwrap();
    let client = builder(&[&a, &b]).retries(0).build().unwrap();
    client.get("k").await.unwrap();
    mortal.shutdown_background();
    client.set("k", "v").await.unwrap();
    client.get("k").await.unwrap();
    assert_eq!((a.calls(), b.calls()), (1, 2));
}

#[tokio::test]
async fn a_silent_node_takes_only_half_of_a_reads_time_and_comes_last_afterwards() {
    let (a, b) = (Node::start([Step::Hang]).await, Node::start([]).await);
    let client = builder(&[&a, &b])
        .timeout(Duration::from_millis(600))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    client.get("k").await.unwrap();
    assert_eq!((a.calls(), b.calls()), (1, 2));
}

#[tokio::test]
async fn a_read_goes_on_to_the_next_node_when_one_is_unavailable() {
    let (a, b) = (
        Node::start([unavailable(reason::NOT_READY, &[])]).await,
        Node::start([]).await,
    );
    let client = builder(&[&a, &b]).retries(0).build().unwrap();
    client.get("k").await.unwrap();
    client.get("k").await.unwrap();
    assert_eq!(
        (a.calls(), b.calls()),
        (1, 2),
        "the last good node is asked first"
    );
}

#[tokio::test]
async fn a_permanent_error_is_not_tried_again() {
    let details = ErrorDetails::with_error_info(
        reason::INVALID_FIELD,
        reason::DOMAIN,
        HashMap::from([("field".into(), "key".into())]),
    );
    let fail = Step::Fail(Status::with_error_details(
        Code::InvalidArgument,
        "the key is empty",
        details,
    ));
    let (a, b) = (Node::start([fail]).await, Node::start([]).await);
    let error = client(&[&a, &b]).get("").await.unwrap_err();
    assert_eq!(error.field(), Some("key"));
    assert_eq!((a.calls(), b.calls()), (1, 0));
}

#[tokio::test]
async fn rounds_are_bounded_and_the_nodes_word_is_what_is_reported() {
    let a = Node::start(std::iter::repeat_with(no).take(10)).await;
    let client = Client::builder()
        .endpoints([a.address.clone(), nobody().await])
        .retries(2)
        .build()
        .unwrap();
    let error = client.set("k", "v").await.unwrap_err();
    assert_eq!(
        (error.reason(), error.applied(), a.calls()),
        (reason::NO_LEADER, Applied::No, 3)
    );
}

#[tokio::test]
async fn each_try_carries_what_is_left_of_the_time() {
    let a = Node::start([no(), no()]).await;
    client(&[&a])
        .set("k", "v")
        .timeout(Duration::from_secs(3))
        .await
        .unwrap();
    let sent: Vec<u64> = a
        .seen()
        .iter()
        .map(|seen| {
            let timeout = seen.timeout.clone().unwrap();
            timeout
                .strip_suffix('u')
                .expect("between 0.1 s and 100 s it is in microseconds")
                .parse()
                .unwrap()
        })
        .collect();
    assert!(
        sent[0] <= 3_000_000 && sent[0] > sent[1] && sent[1] > sent[2],
        "{sent:?}"
    );
}

#[tokio::test]
async fn time_that_runs_out_after_a_write_was_sent_leaves_it_unknown() {
    let a = Node::start([Step::Hang]).await;
    let error = client(&[&a])
        .set("k", "v")
        .timeout(Duration::from_millis(100))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{error:?}");
    assert_eq!(error.applied(), Applied::Unknown);
}

#[tokio::test]
async fn a_read_whose_time_runs_out_in_the_next_try_reports_what_the_node_said() {
    let a = Node::start([unavailable(reason::NO_LEADER, &[]), Step::Hang]).await;
    let error = client(&[&a])
        .get("k")
        .timeout(Duration::from_millis(500))
        .await
        .unwrap_err();
    assert_eq!((error.reason(), a.calls()), (reason::NO_LEADER, 2));
}

#[tokio::test]
async fn a_write_that_never_found_a_connection_did_not_happen() {
    let client = Client::builder()
        .endpoints([nobody().await])
        .timeout(Duration::from_millis(100))
        .build()
        .unwrap();
    let error = client.set("k", "v").await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    assert_eq!(error.applied(), Applied::No);
    assert!(error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn what_a_write_answered_is_sent_with_the_next_session_read() {
    let a = Node::start([]).await;
    let client = client(&[&a]);
    client.set("k", "v").await.unwrap();
    client.get("k").await.unwrap();
    client
        .get("k")
        .consistency(Consistency::Local)
        .await
        .unwrap();
    assert_eq!(Token::decode(&a.seen()[1].token), Ok(Some(token(7))));
    assert!(a.seen()[2].token.is_empty());
    assert_eq!(
        client.token(),
        token(7),
        "an answer that saw less takes nothing away"
    );
}

#[tokio::test]
async fn a_token_from_before_a_restore_fails_one_read_and_is_let_go() {
    let details =
        ErrorDetails::with_error_info(reason::TOKEN_EPOCH, reason::DOMAIN, HashMap::new());
    let a = Node::start([Step::Fail(Status::with_error_details(
        Code::FailedPrecondition,
        "",
        details,
    ))])
    .await;
    let client = client(&[&a]);
    client.see(&token(9));
    assert!(matches!(
        client.get("k").await,
        Err(Error::TokenEpoch { .. })
    ));
    client.get("k").await.unwrap();
    assert!(a.seen()[1].token.is_empty());
}

#[tokio::test]
async fn a_page_is_whole_or_an_error() {
    let entry = |key: &'static str| v1::ScanEntry {
        key: key.into(),
        answer: Some(v1::Answer::default()),
    };
    let first = v1::ScanResponse {
        entries: vec![entry("a"), entry("b")],
        ..Default::default()
    };
    let last = v1::ScanResponse {
        entries: vec![entry("c")],
        next_cursor: "next".into(),
        replica: Some(v1::Replica::default()),
        token: token(3).encode(),
    };
    let a = Node::start([]).await;
    let client = client(&[&a]);

    a.page(vec![first.clone(), last]);
    let page = client.scan().prefix("").await.unwrap();
    let keys: Vec<_> = page.entries.iter().map(|entry| entry.key.clone()).collect();
    assert_eq!(
        (keys, page.next_cursor),
        (
            vec!["a".into(), "b".into(), "c".into()],
            Some("next".into())
        )
    );
    assert_eq!(client.token(), token(3));

    a.page(vec![first]);
    assert!(matches!(client.scan().await, Err(Error::Internal { .. })));
}

#[tokio::test]
async fn a_stream_of_a_scan_goes_through_all_pages_and_knows_where_to_go_on() {
    use futures::{StreamExt as _, TryStreamExt as _};

    let page = |key: &'static str, next_cursor: &'static str| {
        vec![v1::ScanResponse {
            entries: vec![v1::ScanEntry {
                key: key.into(),
                answer: Some(v1::Answer::default()),
            }],
            next_cursor: next_cursor.into(),
            replica: Some(v1::Replica::default()),
            token: token(3).encode(),
        }]
    };
    let a = Node::start([]).await;
    let client = client(&[&a]);

    a.page(page("a", "2"));
    a.page(page("b", "3"));
    a.page(page("c", ""));
    let mut stream = client.scan().stream();
    let keys: Vec<_> = (&mut stream)
        .map_ok(|entry| entry.key)
        .try_collect()
        .await
        .unwrap();
    assert_eq!(
        (keys, stream.cursor()),
        (vec!["a".into(), "b".into(), "c".into()], None)
    );

    // The third page fails.
    a.page(page("a", "2"));
    a.page(page("b", "3"));
    let mut stream = client.scan().stream();
    let read: Vec<_> = (&mut stream).map(|entry| entry.is_ok()).collect().await;
    assert_eq!(read, [true, true, false]);
    assert_eq!(stream.cursor(), Some(&"3".into()));
}
