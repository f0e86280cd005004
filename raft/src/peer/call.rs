//! Asking another node: one way for every question that has one answer.
//!
//! Promises that a question carries its sender's header and trace context, that what its answer
//! says of the peer is taken in, that nobody waits past the deadline, and that `NeverSent` is
//! certain: no byte of such a question has left or will leave this node. Certain, because its body
//! is handed over once, either to the transport or back to its caller:
//!
//! ```text
//!             ┌─ the transport takes the body ──► SENT: from here on nobody knows, only the peer
//! WAITING ────┤
//!             └─ the caller gives up ───────────► WITHDRAWN: the transport finds no body
//! ```
//! A dial that fails, a dial that is slow, a queue before the connection: all of them wait. Never
//! told by the words of an error.

use std::{
    error::Error,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::Stream;
use holdfast_proto::{
    limits::PEER_MESSAGE_BYTES_MAX,
    peer::{
        AcceptRequest, AcceptResponse, AppendRequest, AppendResponse, ChangeMemberRequest,
        ChangeMemberResponse, FetchRequest, FetchResponse, ForwardSetRequest, ForwardSetResponse,
        Header, HelloRequest, HelloResponse, JoinRequest, JoinResponse, PreVoteRequest,
        PreVoteResponse, ProposeRequest, ProposeResponse, ReadIndexRequest, ReadIndexResponse,
        ReadRequest, ReadResponse, ReplyHeader, ReportReadsRequest, ReportReadsResponse,
        ReportRequest, ReportResponse, TransferLeaderRequest, TransferLeaderResponse, VoteRequest,
        VoteResponse, membership_service_client::MembershipServiceClient,
        refresh_service_client::RefreshServiceClient, replica_service_client::ReplicaServiceClient,
    },
};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{Request, Response, Status, Streaming, TimeoutExpired, body::Body, transport::Channel};
use tower::Service;

use super::{
    Peers,
    channel::{Purpose, dial},
};
use crate::clock::Deadline;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The peer does not have the question and never will.
    #[error("the peer was not reached: {0}")]
    NeverSent(String),
    #[error("the peer did not answer in time")]
    Timeout,
    /// The caller did not wait any longer.
    #[error("the answer was not waited for")]
    GivenUp,
    /// The peer's own word.
    #[error("the peer refused: {}", .0.message())]
    Refused(Status),
    #[error("the connection was lost before an answer came: {0}")]
    Lost(String),
}

/// A message that one node asks another, and how it gets there.
pub trait Question: Sized + Send + 'static {
    type Reply: Send;
    const PURPOSE: Purpose;

    fn send(
        request: Request<Self>,
        connection: Connection,
    ) -> impl Future<Output = Result<Response<Self::Reply>, Status>> + Send;
}

/// A question between members of a cluster: it says who asks, its answer how the peer is.
pub trait MemberQuestion: Question {
    fn set_header(&mut self, header: Header);
    fn header_of(reply: &Self::Reply) -> Option<&ReplyHeader>;
}

macro_rules! questions {
    ($($question:ident => $reply:ident by $client:ident::$method:ident over $purpose:ident;)*) => {$(
        impl Question for $question {
            type Reply = $reply;
            const PURPOSE: Purpose = Purpose::$purpose;

            async fn send(
                request: Request<Self>,
                connection: Connection,
            ) -> Result<Response<$reply>, Status> {
                $client::new(connection)
                    .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
                    .$method(request)
                    .await
            }
        }
    )*};
}

macro_rules! between_members {
    ($($question:ident)*) => {$(
        impl MemberQuestion for $question {
            fn set_header(&mut self, header: Header) {
                self.header = Some(header);
            }

            fn header_of(reply: &Self::Reply) -> Option<&ReplyHeader> {
                reply.header.as_ref()
            }
        }
    )*};
}

questions! {
    HelloRequest => HelloResponse by MembershipServiceClient::hello over Control;
    AcceptRequest => AcceptResponse by MembershipServiceClient::accept over Control;
    JoinRequest => JoinResponse by MembershipServiceClient::join over Control;
    ChangeMemberRequest => ChangeMemberResponse by MembershipServiceClient::change_member over Control;
    ReportRequest => ReportResponse by MembershipServiceClient::report over Control;
    AppendRequest => AppendResponse by ReplicaServiceClient::append over Control;
    VoteRequest => VoteResponse by ReplicaServiceClient::vote over Control;
    PreVoteRequest => PreVoteResponse by ReplicaServiceClient::pre_vote over Control;
    TransferLeaderRequest => TransferLeaderResponse by ReplicaServiceClient::transfer_leader over Control;
    ProposeRequest => ProposeResponse by ReplicaServiceClient::propose over Control;
    ReadIndexRequest => ReadIndexResponse by ReplicaServiceClient::read_index over Control;
    ReportReadsRequest => ReportReadsResponse by RefreshServiceClient::report_reads over Fetch;
    ReadRequest => ReadResponse by RefreshServiceClient::read over Fetch;
    ForwardSetRequest => ForwardSetResponse by RefreshServiceClient::forward_set over Fetch;
}

between_members! {
    ChangeMemberRequest ReportRequest
    AppendRequest VoteRequest PreVoteRequest TransferLeaderRequest ProposeRequest ReadIndexRequest
    ReportReadsRequest ReadRequest ForwardSetRequest
}

impl Peers {
    /// Asks the member that the header is for.
    pub async fn call<Q: MemberQuestion>(
        &self,
        header: Header,
        deadline: &Deadline,
        question: Q,
    ) -> Result<Q::Reply, CallError> {
        self.call_until(header, deadline, question, std::future::pending())
            .await
    }

    /// The same, and does not wait on once `given_up` resolves.
    pub async fn call_until<Q: MemberQuestion>(
        &self,
        header: Header,
        deadline: &Deadline,
        question: Q,
        given_up: impl Future<Output = ()> + Send,
    ) -> Result<Q::Reply, CallError> {
        let Some(member) = self.member(header.to) else {
            let unknown = format!("node {} is no member that this node knows of", header.to);
            return Err(CallError::NeverSent(unknown));
        };
        self.exchange(&member.peer_address, header, deadline, question, given_up)
            .await
    }

    /// Opens a stream of questions to a member, the first of which carries the header, and of its
    /// answers, for as long as both last. Whoever reads them takes in what they say of the peer.
    pub async fn open_fetch(
        &self,
        to: u64,
        deadline: &Deadline,
        questions: impl Stream<Item = FetchRequest> + Send + 'static,
    ) -> Result<Streaming<FetchResponse>, CallError> {
        let Some(member) = self.member(to) else {
            let unknown = format!("node {to} is no member that this node knows of");
            return Err(CallError::NeverSent(unknown));
        };
        let channel = self.channels.to(&member.peer_address, Purpose::Fetch);
        let mut client = RefreshServiceClient::new(channel)
            .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX);
        match deadline.limit(client.fetch(questions)).await {
            Ok(Ok(answers)) => Ok(answers.into_inner()),
            Ok(Err(status)) => {
                self.note_refusal(to, &member.peer_address, &status);
                Err(CallError::Refused(status))
            }
            Err(_) => Err(CallError::Timeout),
        }
    }

    /// Asks a member of a Raft group, whose address the group knows: the roster forgets it sooner.
    pub(crate) async fn call_at<Q: MemberQuestion>(
        &self,
        address: &str,
        header: Header,
        deadline: &Deadline,
        question: Q,
    ) -> Result<Q::Reply, CallError> {
        let never = std::future::pending();
        self.exchange(address, header, deadline, question, never)
            .await
    }

    async fn exchange<Q: MemberQuestion>(
        &self,
        address: &str,
        header: Header,
        deadline: &Deadline,
        mut question: Q,
        given_up: impl Future<Output = ()> + Send,
    ) -> Result<Q::Reply, CallError> {
        let (to, shard) = (header.to, header.shard);
        question.set_header(header);
        let mut request = Request::new(question);
        self.events.outgoing(request.metadata_mut());
        let channel = self.channels.to(address, Q::PURPOSE);
        let answer = exchange(channel, deadline, request, given_up).await;
        match &answer {
            Ok(reply) => self.heard(shard, to, Q::header_of(reply)),
            Err(CallError::Refused(status)) => self.note_refusal(to, address, status),
            Err(_) => {}
        }
        answer
    }
}

/// Asks a node that need not be a member of anything, over a connection of its own.
pub(crate) async fn ask_stranger<Q: Question>(
    address: &str,
    deadline: &Deadline,
    question: Q,
) -> Result<Q::Reply, CallError> {
    let never = std::future::pending();
    exchange(dial(address), deadline, Request::new(question), never).await
}

async fn exchange<Q: Question>(
    channel: Channel,
    deadline: &Deadline,
    mut request: Request<Q>,
    given_up: impl Future<Output = ()> + Send,
) -> Result<Q::Reply, CallError> {
    request.set_timeout(deadline.left());
    let handover = Arc::new(Handover::default());
    let connection = Connection {
        channel,
        handover: handover.clone(),
    };
    // The transport's future is large, and callers carry it.
    let sent = Box::pin(Q::send(request, connection));
    let answer = tokio::select! {
        answer = deadline.limit(sent) => answer,
        () = given_up => return Err(without_answer(CallError::GivenUp, &handover)),
    };
    match answer {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(without_answer(status.into(), &handover)),
        Err(_) => Err(without_answer(CallError::Timeout, &handover)),
    }
}

fn without_answer(error: CallError, handover: &Handover) -> CallError {
    match error {
        CallError::Refused(_) => error,
        error if handover.withdraw() => CallError::NeverSent(error.to_string()),
        error => error,
    }
}

/// What a peer says has come over the wire; what has a source was made here.
impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let Some(source) = status.source() else {
            return Self::Refused(status);
        };
        let (mut cause, mut timed_out) = (source, false);
        loop {
            timed_out |= cause.is::<TimeoutExpired>();
            match cause.source() {
                Some(deeper) => cause = deeper,
                None if timed_out => return Self::Timeout,
                None => return Self::Lost(cause.to_string()),
            }
        }
    }
}

/// Who has a question's body.
#[derive(Default)]
struct Handover(AtomicU8);

impl Handover {
    const WAITING: u8 = 0;
    const SENT: u8 = 1;
    const WITHDRAWN: u8 = 2;

    /// Whether the transport may have it.
    fn send(&self) -> bool {
        self.take(Self::SENT)
    }

    /// Whether the transport has not had it, and will not.
    fn withdraw(&self) -> bool {
        self.take(Self::WITHDRAWN)
    }

    fn take(&self, taken: u8) -> bool {
        let exchanged =
            self.0
                .compare_exchange(Self::WAITING, taken, Ordering::AcqRel, Ordering::Acquire);
        exchanged.map_or_else(|already| already == taken, |_| true)
    }
}

/// A channel for one question, which knows whether it was sent.
#[derive(Clone)]
pub struct Connection {
    channel: Channel,
    handover: Arc<Handover>,
}

impl Service<http::Request<Body>> for Connection {
    type Response = http::Response<Body>;
    type Error = tonic::transport::Error;
    type Future = <Channel as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let handover = self.handover.clone();
        let request = request.map(|inner| Body::new(Handed { inner, handover }));
        self.channel.call(request)
    }
}

/// The body of a question.
struct Handed {
    inner: Body,
    handover: Arc<Handover>,
}

impl HttpBody for Handed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.handover.send() {
            let withdrawn = Status::cancelled("the question was withdrawn");
            return Poll::Ready(Some(Err(withdrawn)));
        }
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::AsyncReadExt,
        net::{TcpListener, TcpSocket, TcpStream},
    };

    use super::*;
    use crate::clock::Clock;

    const SHORT: Duration = Duration::from_millis(150);
    const LONG: Duration = Duration::from_secs(20);

    async fn ask(address: &str, timeout: Duration) -> CallError {
        let deadline = Clock::system().deadline(timeout);
        let asked = ask_stranger(address, &deadline, HelloRequest::default()).await;
        asked.expect_err("nobody answers there")
    }

    async fn listen() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        (listener, address)
    }

    #[tokio::test]
    async fn a_question_to_a_closed_port_was_never_sent() {
        let (listener, address) = listen().await;
        drop(listener);
        let error = ask(&address, LONG).await;
        assert!(matches!(error, CallError::NeverSent(_)), "{error:?}");
    }

    #[tokio::test]
    async fn a_question_whose_time_ends_during_the_dial_was_never_sent() {
        // A listener whose queue is full lets a dial hang, as an address does that leads nowhere.
        let socket = TcpSocket::new_v4().expect("a socket");
        socket
            .bind("127.0.0.1:0".parse().expect("an address"))
            .expect("a port");
        let full = socket.listen(1).expect("listens");
        let address = full.local_addr().expect("bound");
        let mut queue = Vec::new();
        while let Ok(Ok(stream)) = tokio::time::timeout(SHORT, TcpStream::connect(address)).await {
            queue.push(stream);
        }
        let error = ask(&address.to_string(), SHORT).await;
        assert!(matches!(error, CallError::NeverSent(_)), "{error:?}");
    }

    #[tokio::test]
    async fn a_question_that_nobody_answers_may_have_been_heard() {
        let (_listener, address) = listen().await;
        let error = ask(&address, SHORT).await;
        assert!(matches!(error, CallError::Timeout), "{error:?}");
    }

    #[tokio::test]
    async fn a_question_whose_connection_is_cut_may_have_been_heard() {
        let (listener, address) = listen().await;
        let cut = async {
            let (mut stream, _) = listener.accept().await.expect("a caller");
            // The preface, settings, headers and the question.
            let mut heard = vec![0; 4096];
            for _ in 0..100 {
                let read = tokio::time::timeout(SHORT, stream.read(&mut heard)).await;
                if !matches!(read, Ok(Ok(1..))) {
                    break;
                }
            }
        };
        let (error, ()) = tokio::join!(ask(&address, LONG), cut);
        assert!(matches!(error, CallError::Lost(_)), "{error:?}");
    }

    #[test]
    fn a_body_is_handed_over_once() {
        let sent = Handover::default();
        assert!(sent.send() && !sent.withdraw() && sent.send());
        let withdrawn = Handover::default();
        assert!(withdrawn.withdraw() && !withdrawn.send() && withdrawn.withdraw());
    }
}
