//! How those who wait for a fetch learn how it goes, wherever it runs.

use tokio::sync::watch;

use super::outcome::FetchOutcome;

/// Tells all who wait for one fetch.
pub(crate) struct Reporter(watch::Sender<Progress>);

/// One who waits for a fetch.
pub(crate) struct Waiter {
    /// `None` only while it is dropped.
    progress: Option<watch::Receiver<Progress>>,
    /// Runs when this one has left.
    then: Option<Box<dyn FnOnce() + Send + Sync>>,
}

#[derive(Debug, Clone, Default)]
struct Progress {
    is_called: bool,
    outcome: Option<FetchOutcome>,
}

impl Default for Reporter {
    fn default() -> Self {
        Self(watch::Sender::new(Progress::default()))
    }
}

impl Reporter {
    /// The upstream is being called.
    pub(crate) fn called(&self) {
        self.0.send_modify(|progress| progress.is_called = true);
    }

    /// More than once perhaps, each later outcome better.
    pub(crate) fn report(&self, outcome: FetchOutcome) {
        self.0
            .send_modify(|progress| progress.outcome = Some(outcome));
    }

    /// `then` runs when this waiter has left.
    pub(crate) fn waiter(&self, then: impl FnOnce() + Send + Sync + 'static) -> Waiter {
        Waiter {
            progress: Some(self.0.subscribe()),
            then: Some(Box::new(then)),
        }
    }

    pub(crate) fn has_waiters(&self) -> bool {
        self.0.receiver_count() > 0
    }
}

impl Waiter {
    /// The best outcome reported so far, each once.
    pub(crate) fn reported(&mut self) -> Option<FetchOutcome> {
        self.progress.as_mut()?.borrow_and_update().outcome.clone()
    }

    /// Resolves when there is something new; false if there will be nothing.
    pub(crate) async fn another(&mut self) -> bool {
        match &mut self.progress {
            Some(progress) => progress.changed().await.is_ok(),
            None => false,
        }
    }

    /// Whether the upstream has been called.
    pub(crate) fn is_called(&self) -> bool {
        self.progress
            .as_ref()
            .is_some_and(|progress| progress.borrow().is_called)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.progress = None;
        if let Some(then) = self.then.take() {
            then();
        }
    }
}
