//! The commands on the cluster and its members.

use std::{io, time::Duration};

use serde::Serialize;

use super::{
    Outcome,
    arguments::{ClusterCommand, MemberCommand},
    failure::{Failure, say},
    json::{NodeJson, StatusJson},
    output::{Output, OutputFormat, safe, time},
};
use crate::{Client, ClusterStatus, NodeStatus};

/// A person is told of a difference between log time and the clocks from here on.
const CLOCKS_DIFFER: Duration = Duration::from_secs(2);

#[derive(Serialize)]
struct HealthJson<'a> {
    healthy: bool,
    leader: Option<&'a str>,
    problems: &'a [String],
}

#[derive(Serialize)]
struct LeaderJson<'a> {
    leader: &'a str,
}

#[derive(Serialize)]
struct NodesJson<'a> {
    nodes: Vec<NodeJson<'a>>,
}

#[derive(Serialize)]
struct AddedJson {
    id: u64,
}

/// An answer that says nothing but that it was done.
#[derive(Serialize)]
struct DoneJson {}

pub(super) async fn cluster(
    client: &Client,
    command: ClusterCommand,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    match command {
        ClusterCommand::Status => {
            print_status(&client.cluster().status().await?, output)?;
            Ok(Outcome::Ok)
        }
        ClusterCommand::Health => {
            let status = client.cluster().status().await?;
            let problems = status.problems();
            print_health(&status, &problems, output)?;
            Ok(if problems.is_empty() {
                Outcome::Ok
            } else {
                Outcome::Degraded
            })
        }
        ClusterCommand::TransferLeader { to } => {
            let leader = client.cluster().transfer_leader(to.as_deref()).await?;
            match output.format {
                OutputFormat::Json | OutputFormat::Jsonl => {
                    output.object(&LeaderJson { leader: &leader })?
                }
                OutputFormat::Raw => output.line(&safe(&leader))?,
                OutputFormat::Table => output.fields(&[("leader", Some(safe(&leader)))])?,
            }
            Ok(Outcome::Ok)
        }
    }
}

pub(super) async fn member(
    client: &Client,
    command: MemberCommand,
    output: &mut Output,
) -> Result<Outcome, Failure> {
    match command {
        MemberCommand::List => print_members(&client.cluster().status().await?.nodes, output)?,
        MemberCommand::Add { name, address } => {
            let id = client.cluster().add_member(&name, &address).await?;
            match output.format {
                OutputFormat::Json | OutputFormat::Jsonl => output.object(&AddedJson { id })?,
                OutputFormat::Raw => output.line(&id.to_string())?,
                OutputFormat::Table => output.fields(&[("id", Some(id.to_string()))])?,
            }
        }
        MemberCommand::Promote { name } => {
            client.cluster().promote(&name).await?;
            print_done("promoted", &name, output)?;
        }
        MemberCommand::Remove { name } => {
            client.cluster().remove(&name).await?;
            print_done("removed", &name, output)?;
        }
    }
    Ok(Outcome::Ok)
}

fn print_status(status: &ClusterStatus, output: &mut Output) -> io::Result<()> {
    match output.format {
        OutputFormat::Json | OutputFormat::Jsonl => {
            return output.object(&StatusJson::from(status));
        }
        OutputFormat::Raw => {
            return output.line(&safe(status.leader.as_deref().unwrap_or_default()));
        }
        OutputFormat::Table => {}
    }
    output.fields(&[
        ("cluster", Some(safe(&status.cluster_id))),
        ("epoch", Some(status.epoch.to_string())),
        ("shards", Some(status.shards.to_string())),
        ("leader", Some(leader_or_none(status.leader.as_deref()))),
    ])?;
    output.line("")?;
    let header = [
        "NAME", "ID", "ROLE", "REGION", "HEALTHY", "REVISION", "LAG", "VERSION", "CLIENT", "PEER",
    ];
    output.table(&header, status.nodes.iter().map(node_row))?;
    for node in status.nodes.iter().filter(|node| !node.problems.is_empty()) {
        output.line("")?;
        for problem in &node.problems {
            output.line(&format!("{}: {}", safe(&node.name), safe(problem)))?;
        }
    }
    for node in status.nodes.iter().filter(|node| node.policies_differ) {
        output.line("")?;
        let name = safe(&node.name);
        output.line(&format!("{name}: its policies are not the leader's"))?;
    }
    for shard in &status.per_shard {
        let ahead = Duration::from_millis(shard.log_time_ahead_ms.unsigned_abs());
        if ahead >= CLOCKS_DIFFER {
            let way = if shard.log_time_ahead_ms > 0 {
                "ahead of"
            } else {
                "behind"
            };
            output.line("")?;
            output.line(&format!(
                "shard {}: log time is {} {way} the clocks",
                shard.shard,
                time(ahead)
            ))?;
        }
    }
    if status.shards < 2 {
        return Ok(());
    }
    output.line("")?;
    let shard_row = |shard: &crate::ShardStatus| {
        vec![
            shard.shard.to_string(),
            leader_or_none(shard.leader.as_deref()),
            shard.term.to_string(),
            shard.revision.to_string(),
            safe(&shard.voters.join(", ")),
            safe(&shard.learners.join(", ")),
        ]
    };
    output.table(
        &["SHARD", "LEADER", "TERM", "REVISION", "VOTERS", "LEARNERS"],
        status.per_shard.iter().map(shard_row),
    )
}

fn print_health(
    status: &ClusterStatus,
    problems: &[String],
    output: &mut Output,
) -> io::Result<()> {
    let healthy = problems.is_empty();
    match output.format {
        OutputFormat::Json | OutputFormat::Jsonl => output.object(&HealthJson {
            healthy,
            leader: status.leader.as_deref(),
            problems,
        }),
        OutputFormat::Raw => output.line(if healthy { "healthy" } else { "degraded" }),
        OutputFormat::Table if healthy => output.line("healthy"),
        OutputFormat::Table => problems
            .iter()
            .try_for_each(|problem| output.line(&format!("degraded: {}", safe(problem)))),
    }
}

fn print_members(nodes: &[NodeStatus], output: &mut Output) -> io::Result<()> {
    match output.format {
        OutputFormat::Json => output.object(&NodesJson {
            nodes: nodes.iter().map(Into::into).collect(),
        }),
        OutputFormat::Jsonl => nodes
            .iter()
            .try_for_each(|node| output.object(&NodeJson::from(node))),
        OutputFormat::Raw => nodes
            .iter()
            .try_for_each(|node| output.line(&safe(&node.name))),
        OutputFormat::Table => {
            let row = |node: &NodeStatus| {
                let healthy = if node.healthy { "yes" } else { "no" };
                let addresses = [safe(&node.client_address), safe(&node.peer_address)];
                let [client, peer] = addresses;
                vec![
                    safe(&node.name),
                    node.id.to_string(),
                    node.role.as_str().to_owned(),
                    safe(&node.region),
                    healthy.to_owned(),
                    client,
                    peer,
                ]
            };
            output.table(
                &["NAME", "ID", "ROLE", "REGION", "HEALTHY", "CLIENT", "PEER"],
                nodes.iter().map(row),
            )
        }
    }
}

fn print_done(what: &str, name: &str, output: &mut Output) -> io::Result<()> {
    match output.format {
        OutputFormat::Json | OutputFormat::Jsonl => output.object(&DoneJson {}),
        OutputFormat::Raw => Ok(()),
        OutputFormat::Table => {
            say(&format!("{what} {}", safe(name)));
            Ok(())
        }
    }
}

fn node_row(node: &NodeStatus) -> Vec<String> {
    vec![
        safe(&node.name),
        node.id.to_string(),
        node.role.as_str().to_owned(),
        safe(&node.region),
        (if node.healthy { "yes" } else { "no" }).to_owned(),
        node.revision.to_string(),
        node.lag.to_string(),
        safe(&node.version),
        safe(&node.client_address),
        safe(&node.peer_address),
    ]
}

fn leader_or_none(leader: Option<&str>) -> String {
    leader.map_or_else(|| "none".to_owned(), safe)
}
