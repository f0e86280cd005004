//! The threads that Raft runs on, apart from those that answer clients: however much those have to
//! encode, decode and copy, heartbeats, votes and appends leave and are answered in time.
//!
//! Must never run what a client asked for: `Elsewhere` takes that, where it comes by the peer
//! listener, back to the threads that answer clients. Only its way stays here, since one listener
//! has all connections of peers: the sending of such an answer, and the bytes of a write that one
//! node forwards to another.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use holdfast_raft::task;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::AbortOnDropHandle;
use tonic::server::NamedService;
use tower::Service;
use tracing::Instrument as _;

/// One may be busy with an append of the largest size while the other sends a heartbeat.
const THREADS: usize = 2;

pub(super) struct RaftThreads {
    /// Taken when it ends.
    runtime: Option<Runtime>,
}

impl RaftThreads {
    pub(super) fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("raft")
            .enable_all()
            .build()?;
        Ok(Self {
            runtime: Some(runtime),
        })
    }

    /// Runs it, and all that it spawns, on these threads.
    pub(super) async fn run<F>(&self, work: F) -> F::Output
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let running = self.enter(|| AbortOnDropHandle::new(task::spawn(work)));
        match running.await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// What `start` spawns runs on these threads.
    pub(super) fn enter<T>(&self, start: impl FnOnce() -> T) -> T {
        let _entered = self.runtime.as_ref().map(Runtime::enter);
        start()
    }
}

impl Drop for RaftThreads {
    /// Waits for nobody: it may be called where waiting is not allowed, and what has to end in order
    /// has ended by then.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A service whose calls run on other threads than its connections do.
#[derive(Debug, Clone)]
pub(super) struct Elsewhere<S> {
    inner: S,
    runtime: Handle,
}

impl<S> Elsewhere<S> {
    /// Calls run on the threads that this is called on.
    pub(super) fn here(inner: S) -> Self {
        Self {
            inner,
            runtime: Handle::current(),
        }
    }
}

impl<S: NamedService> NamedService for Elsewhere<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, R> Service<R> for Elsewhere<S>
where
    S: Service<R, Response: Send + 'static, Error: Send + 'static, Future: Send + 'static>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let answer = self.inner.call(request).in_current_span();
        let running = AbortOnDropHandle::new(self.runtime.spawn(answer));
        Box::pin(async move {
            match running.await {
                Ok(answer) => answer,
                // Where the runtime ends nobody is left to be answered.
                Err(error) if error.is_cancelled() => std::future::pending().await,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        })
    }
}
