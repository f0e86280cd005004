//! What every command of `holdfastd` shares: its configuration with the process's variables, its
//! signals, and why it ends before its time. Must never know which command runs.

use std::path::Path;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    config::{Config, ConfigError, Overrides},
    node::StartError,
    telemetry::TelemetryError,
};

const FAILED: u8 = 1;
const MISCONFIGURED: u8 = 2;

/// Why the process ends before its time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("signals cannot be received: {0}")]
    Signals(std::io::Error),
    #[error("the runtime does not start: {0}")]
    Runtime(std::io::Error),
    #[error("{0}")]
    Ended(String),
}

/// SIGTERM and SIGINT.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// With the process's variables.
pub(crate) fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Config, ConfigError> {
    Config::load(file, std::env::vars_os(), overrides)
}

impl Failure {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Start(StartError::Config(_))
            | Self::Telemetry(TelemetryError::Filter(_) | TelemetryError::Exporter(_)) => {
                MISCONFIGURED
            }
            _ => FAILED,
        }
    }
}

impl Signals {
    pub(crate) fn new() -> Result<Self, Failure> {
        let one = |kind| signal(kind).map_err(Failure::Signals);
        Ok(Self {
            terminate: one(SignalKind::terminate())?,
            interrupt: one(SignalKind::interrupt())?,
        })
    }

    pub(crate) async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
