//! A node as a child process.

use std::process::{Child, ExitStatus};

use anyhow::Context;
use rustix::process::Signal;

use super::until;

/// Killed with the test, whatever became of it.
pub(super) struct Process(pub(super) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal to it.
pub(super) fn signal(child: &Child, what: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .context("a pid")?;
    Ok(rustix::process::kill_process(pid, what)?)
}

/// Until it has ended.
pub(super) async fn wait(child: &mut Child) -> anyhow::Result<ExitStatus> {
    let mut status = None;
    until("the process ends", async || {
        status = child.try_wait().ok().flatten();
        status.is_some()
    })
    .await?;
    status.context("an exit status")
}
