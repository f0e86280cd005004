//! The one stack that every client's request goes through, as a list with a reason per layer.
//!
//! Promises that a request is traced and counted whatever becomes of it, that no more are taken in
//! than this node can hold, and that each has a deadline. Must never know what a request asks for:
//! only its path, its headers and its size.

mod deadline;
mod load;
mod metrics;
mod trace;

use std::{pin::Pin, sync::Arc};

use holdfast_raft::Clock;
use tower::layer::util::{Identity, Stack};

use crate::metrics::Metrics;

pub use self::{
    deadline::deadline_of,
    load::{Limits, Load},
    trace::TraceLayer,
};

type Request = http::Request<tonic::body::Body>;
type Response = http::Response<tonic::body::Body>;
type Answer<E> = Pin<Box<dyn Future<Output = Result<Response, E>> + Send>>;

/// All layers, outermost first.
pub type Layers = Stack<
    deadline::DeadlineLayer,
    Stack<load::LoadLayer, Stack<metrics::MetricsLayer, Stack<TraceLayer, Identity>>>,
>;

pub fn stack(metrics: Arc<Metrics>, load: Arc<Load>, clock: Clock) -> Layers {
    tower::ServiceBuilder::new()
        // First, so that everything below happens inside the caller's trace, refusals too.
        .layer(TraceLayer::All)
        // Around what refuses and what gives up, so that what never reaches a handler is counted.
        .layer(metrics::MetricsLayer::new(metrics, clock.clone()))
        // Before anything is read or waits: a refusal must cost next to nothing, or it does not
        // help.
        .layer(load::LoadLayer::new(load))
        // Last, so that the handler's time starts when it does, and finds its deadline in the
        // request.
        .layer(deadline::DeadlineLayer::new(clock))
        .into_inner()
}

/// `Get` of `/holdfast.v1.CacheService/Get`.
fn method(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

/// A call that may change something: only there does it matter whether it was applied.
fn is_mutation(path: &str) -> bool {
    path.starts_with("/holdfast.v1.")
        && !["Get", "BatchGet", "Inspect", "Scan", "Status"].contains(&method(path))
}
