//! The contract itself, calls to one node: what a test sends is what the node gets, and what the
//! node answers is what the test sees. No session, no other node, no request ids but those given. A
//! mutation is sent again in one case: the node says UNAVAILABLE and `applied: no`, as it does
//! while leadership moves. Must never know how a client behaves.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use bytes::Bytes;
use holdfast_proto::{
    limits::CLIENT_MESSAGE_BYTES_MAX,
    reason,
    v1::{
        self, Consistency, cache_service_client::CacheServiceClient, delete_request,
        invalidate_request,
    },
};
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

/// Together a few elections, on a busy machine.
const TRIES: usize = 100;
const PAUSE: Duration = Duration::from_millis(50);

/// One node's door. Clones share its connection.
#[derive(Debug, Clone)]
pub struct Wire {
    stub: CacheServiceClient<Channel>,
    timeout: Duration,
    is_patient: bool,
}

/// An error as the contract has it.
#[derive(Debug, Clone)]
pub struct Told {
    pub code: Code,
    pub reason: String,
    pub message: String,
    pub metadata: HashMap<String, String>,
}

impl Wire {
    /// Connects with the first call. Calls have 5 s.
    pub fn to(address: SocketAddr) -> anyhow::Result<Self> {
        let channel = Endpoint::new(format!("http://{address}"))?.connect_lazy();
        let stub =
            CacheServiceClient::new(channel).max_decoding_message_size(CLIENT_MESSAGE_BYTES_MAX);
        Ok(Self {
            stub,
            timeout: Duration::from_secs(5),
            is_patient: true,
        })
    }

    /// The deadline that is sent with every call.
    pub fn within(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Each call is sent once, whatever comes of it.
    pub fn once(mut self) -> Self {
        self.is_patient = false;
        self
    }

    pub async fn get(
        &self,
        key: &str,
        consistency: Consistency,
        token: &Bytes,
    ) -> Result<v1::GetResponse, Status> {
        let request = v1::GetRequest {
            key: key.to_owned().into(),
            consistency: consistency.into(),
            token: token.clone(),
            ..Default::default()
        };
        self.stub
            .clone()
            .get(self.timed(request))
            .await
            .map(Response::into_inner)
    }

    /// What a SESSION read shows: its state, and its value as text.
    pub async fn read(&self, key: &str) -> Result<(v1::State, String), Status> {
        let read = self.get(key, Consistency::Session, &Bytes::new()).await?;
        Ok((state(&read), text(&read)))
    }

    pub async fn inspect(&self, key: &str) -> Result<v1::InspectResponse, Status> {
        let request = v1::InspectRequest {
            key: key.to_owned().into(),
            ..Default::default()
        };
        self.stub
            .clone()
            .inspect(self.timed(request))
            .await
            .map(Response::into_inner)
    }

    pub async fn set(
        &self,
        key: &str,
        value: &str,
        id: Option<v1::RequestId>,
    ) -> Result<v1::SetResponse, Status> {
        let request = v1::SetRequest {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            request_id: id,
            ..Default::default()
        };
        self.send_set(request).await
    }

    pub async fn send_set(&self, request: v1::SetRequest) -> Result<v1::SetResponse, Status> {
        self.taken(|| {
            let (mut stub, request) = (self.stub.clone(), self.timed(request.clone()));
            async move { stub.set(request).await }
        })
        .await
    }

    pub async fn delete(
        &self,
        key: &str,
        id: Option<v1::RequestId>,
    ) -> Result<v1::DeleteResponse, Status> {
        let target = Some(delete_request::Target::Key(key.to_owned().into()));
        let request = v1::DeleteRequest {
            target,
            request_id: id,
        };
        self.taken(|| {
            let (mut stub, request) = (self.stub.clone(), self.timed(request.clone()));
            async move { stub.delete(request).await }
        })
        .await
    }

    pub async fn invalidate(
        &self,
        key: &str,
        id: Option<v1::RequestId>,
    ) -> Result<v1::InvalidateResponse, Status> {
        let target = Some(invalidate_request::Target::Key(key.to_owned().into()));
        let request = v1::InvalidateRequest {
            target,
            request_id: id,
        };
        self.taken(|| {
            let (mut stub, request) = (self.stub.clone(), self.timed(request.clone()));
            async move { stub.invalidate(request).await }
        })
        .await
    }

    /// A mutation that certainly did not happen and may happen later, again.
    async fn taken<T, F>(&self, call: impl Fn() -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        for _ in 0..TRIES {
            match call().await {
                Err(status) if self.is_patient && did_not_happen(&status) => {
                    tokio::time::sleep(PAUSE).await
                }
                outcome => return outcome.map(Response::into_inner),
            }
        }
        call().await.map(Response::into_inner)
    }

    fn timed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }
}

impl Told {
    pub fn of(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info();
        Self {
            code: status.code(),
            reason: info.map(|info| info.reason.clone()).unwrap_or_default(),
            message: status.message().to_owned(),
            metadata: info.map(|info| info.metadata.clone()).unwrap_or_default(),
        }
    }

    /// Empty if it is not said.
    pub fn metadata(&self, name: &str) -> &str {
        self.metadata
            .get(name)
            .map(String::as_str)
            .unwrap_or_default()
    }
}

fn did_not_happen(status: &Status) -> bool {
    status.code() == Code::Unavailable
        && Told::of(status).metadata(reason::APPLIED) == reason::APPLIED_NO
}

/// The answer's value as text; empty for a miss.
pub fn text(response: &v1::GetResponse) -> String {
    let value = response
        .answer
        .as_ref()
        .and_then(|answer| answer.value.clone());
    String::from_utf8_lossy(&value.unwrap_or_default()).into_owned()
}

pub fn state(response: &v1::GetResponse) -> v1::State {
    response
        .answer
        .as_ref()
        .map(v1::Answer::state)
        .unwrap_or_default()
}
