//! Whether this node can do its work, and if not, why: for the probes and for gRPC's health
//! service.
//!
//! Reading needs neither leader nor quorum nor upstream, only that this node has what the cluster
//! had. Writing also needs a leader. Must never know who asks.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use holdfast_proto::v1::{cache_service_server, cluster_service_server};
use holdfast_raft::{Membership, Replica, Replicas};
use tonic_health::{ServingStatus, server::HealthReporter};

/// How often gRPC's health service looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What gRPC's health service speaks for: the node as a whole, and each service.
const SERVICES: [&str; 3] = [
    "",
    cache_service_server::SERVICE_NAME,
    cluster_service_server::SERVICE_NAME,
];

pub struct Readiness {
    replicas: Arc<Replicas>,
    is_stopping: AtomicBool,
}

/// One thing that has to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub name: &'static str,
    /// Why it does not hold; `None` if it does.
    pub problem: Option<String>,
}

/// What a probe answers: all checks, and whether all hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checks(pub Vec<Check>);

impl Readiness {
    pub(crate) fn new(replicas: Arc<Replicas>) -> Arc<Self> {
        Arc::new(Self {
            replicas,
            is_stopping: AtomicBool::new(false),
        })
    }

    /// From now on this node is not ready, whatever else holds.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
    }

    /// Whether it can answer reads.
    pub fn to_read(&self) -> Checks {
        let stopping = self
            .is_stopping
            .load(Ordering::Relaxed)
            .then(|| "the node is stopping".to_owned());
        let member = match &*self.replicas.membership().borrow() {
            Membership::Member => None,
            Membership::Forming(why) | Membership::Retired(why) | Membership::Failed(why) => {
                Some(why.clone())
            }
        };
        let behind = self.shards_where(Replica::must_catch_up);
        let caught_up = (!behind.is_empty())
            .then(|| format!("not level with the leader since it joined: {behind}"));
        let replaced = self.shards_where(Replica::is_installing);
        let installing =
            (!replaced.is_empty()).then(|| format!("a snapshot is being installed: {replaced}"));
        Checks(vec![
            Check::new("running", stopping),
            Check::new("member", member),
            Check::new("caught_up", caught_up),
            Check::new("installing", installing),
        ])
    }

    /// Whether it can also have writes done.
    pub fn to_write(&self) -> Checks {
        let mut checks = self.to_read();
        let without = self.shards_where(|replica| replica.leader().is_none());
        let no_leader = if self.replicas.replicas().next().is_none() {
            Some("no shard is open".to_owned())
        } else {
            (!without.is_empty()).then(|| format!("nobody leads: {without}"))
        };
        checks.0.push(Check::new("leader", no_leader));
        checks
    }

    /// Tells gRPC's health service, for ever.
    pub(crate) async fn report(self: Arc<Self>, health: HealthReporter) {
        let mut every = tokio::time::interval(LOOK_EVERY);
        let mut told = None;
        loop {
            every.tick().await;
            let is_ready = self.to_read().all_hold();
            if told.replace(is_ready) != Some(is_ready) {
                tracing::info!(ready = is_ready, "readiness changed");
                tell(&health, is_ready).await;
            }
        }
    }

    fn shards_where(&self, holds: impl Fn(&Replica) -> bool) -> String {
        let shards = self
            .replicas
            .replicas()
            .filter(|replica| holds(replica))
            .map(|replica| format!("shard {}", replica.shard()));
        shards.collect::<Vec<_>>().join(", ")
    }
}

/// Says it to everybody who asks or watches.
pub(crate) async fn tell(health: &HealthReporter, is_ready: bool) {
    let status = if is_ready {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    for service in SERVICES {
        health.set_service_status(service, status).await;
    }
}

impl Check {
    fn new(name: &'static str, problem: Option<String>) -> Self {
        Self { name, problem }
    }
}

impl Checks {
    pub fn all_hold(&self) -> bool {
        self.0.iter().all(|check| check.problem.is_none())
    }
}

/// A line per check, as etcd and Kubernetes write them.
impl fmt::Display for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Check { name, problem } in &self.0 {
            match problem {
                None => writeln!(f, "[+]{name} ok")?,
                Some(problem) => writeln!(f, "[-]{name} failed: {problem}")?,
            }
        }
        write!(
            f,
            "{}",
            if self.all_hold() {
                "ready"
            } else {
                "not ready"
            }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_says_which_check_failed_and_why() {
        let mut checks = Checks(vec![
            Check::new("running", None),
            Check::new("member", Some("it waits for 2 of 3 nodes".into())),
        ]);
        assert!(!checks.all_hold());
        assert_eq!(
            checks.to_string(),
            "[+]running ok\n[-]member failed: it waits for 2 of 3 nodes\nnot ready"
        );
        checks.0[1].problem = None;
        assert!(checks.all_hold());
        assert_eq!(checks.to_string(), "[+]running ok\n[+]member ok\nready");
    }
}
