//! Who is a member of what: the roster in shard 0 says who shall be, and each shard's leader brings
//! its Raft group to it, one change at a time. So an operator's command is one write to shard 0 and
//! a wait, can be repeated, and is resumed by whoever leads next.
//!
//! ```text
//! change     what operators ask for, on any node ─► a command in shard 0
//! reconcile  every leader ─► its Raft group follows the roster; learners that keep up are promoted
//! contact    who is who: hellos, addresses that change, verdicts
//! health     who keeps up, and who does not
//! status     what this node knows of the cluster, and what the others say of themselves
//! rules      what may be done and what is next, as pure functions
//! ```

mod change;
mod contact;
pub(crate) mod health;
mod reconcile;
mod rules;
mod status;

use std::time::Duration;

use holdfast_proto::peer::{Command, Member, Outcome, command::Op, outcome};

pub(crate) use self::{
    change::{Admission, Change, Changes},
    contact::Contact,
    reconcile::Reconciler,
    status::{report, status},
};
use crate::{error::ChangeError, local::Local, peer::Peers, replica::Replica};

const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// A learner that is at most so many entries behind is level with the leader.
const CAUGHT_UP_ENTRIES: u64 = 1000;
/// A member that was heard of within this is alive.
const ALIVE_WITHIN: Duration = Duration::from_secs(1);

/// The roster, or before the first applied membership whoever this node was told of.
fn members_of(local: &Local, first: &Replica) -> Vec<Member> {
    let roster = first.state().roster();
    if !roster.members.is_empty() {
        return roster.members.clone();
    }
    local
        .peers()
        .map(|peers| peers.members())
        .unwrap_or_default()
}

fn entries_behind(replica: &Replica, peers: &Peers, member: u64) -> Option<u64> {
    let view = peers.view(replica.shard(), member)?;
    let is_alive = replica.monotonic().saturating_sub(view.heard_at) < ALIVE_WITHIN;
    is_alive.then(|| replica.applied().index.saturating_sub(view.applied_index))
}

async fn propose(first: &Replica, op: Op) -> Result<Outcome, ChangeError> {
    let command = Command {
        request_id: None,
        caller: String::new(),
        op: Some(op),
    };
    let outcome = first.propose_here(command, CHANGE_TIMEOUT).await?;
    match outcome.result {
        Some(outcome::Result::Rejected(_)) | None => Err(unexpected(outcome)),
        Some(_) => Ok(outcome),
    }
}

fn unexpected(outcome: Outcome) -> ChangeError {
    match outcome.result {
        Some(outcome::Result::Rejected(rejected)) => ChangeError::Remote {
            reason: rejected.reason,
            message: rejected.message,
        },
        other => ChangeError::Refused(format!("the cluster answered {other:?}")),
    }
}
