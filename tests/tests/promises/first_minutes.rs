//! What a new user does first.

use crate::{in_process, processes};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_answer_the_command_line() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let set = cluster.holdfast(0, &["set", "greeting", "hello"])?;
    assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
    let get = cluster.holdfast(1, &["get", "greeting", "--raw", "--consistency", "linearizable"])?;
    assert_eq!(get.stdout, b"hello");

    let status = cluster.holdfast(2, &["cluster", "status", "-o", "json"])?;
    let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
    let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
    assert_eq!(nodes.len(), 3);
    assert_eq!(nodes.iter().filter(|node| node["role"] == "leader").count(), 1);
    assert!(nodes.iter().all(|node| node["lag"].is_u64() && node["healthy"] == true));
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_told_to_stop_exits_with_0() -> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    let leader = cluster.leader().await?;
    assert_eq!(cluster.stop_node(leader).await?, Some(0));
    cluster.leader().await?;
    Ok(())
}
