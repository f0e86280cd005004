//! The admin listener: probes, metrics and the version, over plain HTTP.
//!
//! Promises that `/livez` says only that the process turns: a node without leader or quorum must
//! not be restarted for it. Must never know a key, a value or a credential.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use holdfast_raft::Replicas;

use crate::{
    metrics::{self, Metrics, Seen},
    operation::Operations,
    ready::{Checks, Readiness},
    refresh::Refresher,
    serve::Listeners,
};

/// What the admin listener shows.
pub(crate) struct Shown {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) replicas: Arc<Replicas>,
    pub(crate) readiness: Arc<Readiness>,
    pub(crate) listeners: Arc<Listeners>,
    pub(crate) operations: Arc<Operations>,
    pub(crate) refresher: Arc<Refresher>,
    pub(crate) is_insecure: bool,
}

pub(crate) fn router(shown: Shown) -> Router {
    Router::new()
        .route("/livez", get(|| async { "alive" }))
        .route(
            "/readyz",
            get(|State(shown): State<Arc<Shown>>| async move { probe(&shown.readiness.to_read()) }),
        )
        .route(
            "/readyz/write",
            get(
                |State(shown): State<Arc<Shown>>| async move { probe(&shown.readiness.to_write()) },
            ),
        )
        .route("/metrics", get(scrape))
        .route("/version", get(version))
        .with_state(Arc::new(shown))
}

fn probe(checks: &Checks) -> Response {
    let status = if checks.all_hold() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, format!("{checks}\n")).into_response()
}

async fn scrape(State(shown): State<Arc<Shown>>) -> Response {
    // Sizes are read from the disk.
    let scraped = holdfast_raft::task::blocking(move || {
        let is_ready = shown.readiness.to_read().all_hold();
        shown.metrics.scrape(Seen {
            replicas: &shown.replicas,
            listeners: &shown.listeners,
            load: shown.operations.load(),
            refresher: &shown.refresher,
            is_insecure: shown.is_insecure,
            is_ready,
        })
    });
    match scraped.await {
        Ok(Ok(text)) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Ok(Err(_)) | Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn version() -> Response {
    let version = serde_json::json!({ "version": env!("CARGO_PKG_VERSION") });
    ([(CONTENT_TYPE, "application/json")], version.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ready::Check;

    #[test]
    fn a_probe_fails_with_503() {
        let bad = Checks(vec![Check {
            name: "leader",
            problem: Some("nobody leads: shard 0".into()),
        }]);
        assert_eq!(probe(&bad).status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(probe(&Checks(Vec::new())).status(), StatusCode::OK);
    }
}
