//! Background work, for this crate and for the node's: spawning that keeps the tracing span, and an
//! owner of tasks that stops and awaits them and sees one that panics.

use std::{any::Any, future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Interval, MissedTickBehavior},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, Span};

use crate::events::Events;

/// Before a duty that panicked begins again.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// The tasks of one owner. None of them is ever silently gone: a panic is logged and counted, and
/// then a duty begins again, and without an essential task the owner has failed.
#[derive(Clone)]
pub struct Tasks {
    events: Arc<dyn Events>,
    stop: CancellationToken,
    tracker: TaskTracker,
    failed: watch::Sender<Option<String>>,
}

impl Tasks {
    pub fn new(events: Arc<dyn Events>) -> Self {
        Self {
            events,
            stop: CancellationToken::new(),
            tracker: TaskTracker::new(),
            failed: watch::Sender::new(None),
        }
    }

    /// Cancelled when the owner stops.
    pub fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// Work for as long as the owner runs, which can begin again at any time.
    pub fn duty<F>(&self, name: &'static str, span: Span, run: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let events = self.events.clone();
        let work = async move {
            while let Err(panic) = AssertUnwindSafe(run()).catch_unwind().await {
                report(events.as_ref(), name, panic.as_ref());
                tokio::time::sleep(RESTART_PAUSE).await;
            }
        };
        self.until_stopped(work.instrument(span));
    }

    /// Work that cannot begin again and without which the owner is worthless: `failed` says so.
    pub fn essential(&self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let (events, failed) = (self.events.clone(), self.failed.clone());
        let work = async move {
            if let Err(panic) = AssertUnwindSafe(work).catch_unwind().await {
                report(events.as_ref(), name, panic.as_ref());
                failed.send_replace(Some(format!("its task `{name}` panicked")));
            }
        };
        self.until_stopped(work.in_current_span());
    }

    /// Work that ends by itself, and sees to it when the owner stops.
    pub fn spawn(&self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let work = reporting(self.events.clone(), name, work);
        self.tracker.spawn(work.in_current_span());
    }

    /// Work that ends by itself, soon after whoever gave it: nobody waits for it.
    pub fn detach(&self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        drop(spawn(reporting(self.events.clone(), name, work)));
    }

    /// Resolves when an essential task is gone, and says which.
    pub async fn failed(&self) -> String {
        let mut failed = self.failed.subscribe();
        let why = failed.wait_for(Option::is_some).await.ok();
        why.and_then(|why| why.clone()).unwrap_or_default()
    }

    /// Stops all of them and waits until they are gone.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.ended().await;
    }

    /// Waits until all of them have ended by themselves.
    pub async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    fn until_stopped(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }
}

async fn reporting(events: Arc<dyn Events>, name: &'static str, work: impl Future<Output = ()>) {
    if let Err(panic) = AssertUnwindSafe(work).catch_unwind().await {
        report(events.as_ref(), name, panic.as_ref());
    }
}

fn report(events: &dyn Events, name: &'static str, panic: &(dyn Any + Send)) {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    tracing::error!(task = name, message, "a task panicked");
    events.task_panicked(name);
}

pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    tokio::spawn(future.in_current_span())
}

/// Runs blocking work off the async threads, inside the caller's span.
#[expect(clippy::disallowed_methods, reason = "the wrapper that keeps the span")]
pub fn blocking<F, T>(work: F) -> JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    let span = Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
}

/// After a pause of the whole process a duty goes on once, not as often as it was missed.
pub fn every(period: Duration) -> Interval {
    let mut every = tokio::time::interval(period);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    every
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use parking_lot::Mutex;

    use super::*;

    #[derive(Default)]
    struct Panics(Mutex<Vec<&'static str>>);

    impl Events for Panics {
        fn task_panicked(&self, task: &'static str) {
            self.0.lock().push(task);
        }
    }

    #[tokio::test]
    async fn a_duty_that_panics_is_counted_and_begins_again() {
        let panics = Arc::new(Panics::default());
        let tasks = Tasks::new(panics.clone());
        let (runs, mut begun) = (Arc::new(AtomicU32::new(0)), watch::channel(0));
        let counted = runs.clone();
        tasks.duty("the duty", Span::none(), move || {
            let (run, begun) = (counted.fetch_add(1, Ordering::Relaxed) + 1, begun.0.clone());
            async move {
                begun.send_replace(run);
                assert!(run > 2, "run {run}");
                std::future::pending().await
            }
        });
        begun.1.wait_for(|&run| run == 3).await.expect("it goes on");
        assert_eq!(*panics.0.lock(), ["the duty", "the duty"]);
        tasks.stop().await;
        assert_eq!(runs.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn without_an_essential_task_the_owner_has_failed() {
        let panics = Arc::new(Panics::default());
        let tasks = Tasks::new(panics.clone());
        tasks.essential("the heart", async { panic!("it stops") });
        assert!(tasks.failed().await.contains("the heart"));
        assert_eq!(*panics.0.lock(), ["the heart"]);
        tasks.stop().await;
    }

    #[tokio::test]
    async fn work_that_panics_keeps_nobody_from_stopping() {
        let panics = Arc::new(Panics::default());
        let tasks = Tasks::new(panics.clone());
        tasks.spawn("the work", async { panic!("it stops") });
        tasks.stop().await;
        assert_eq!(*panics.0.lock(), ["the work"]);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_gone_in_silence_either() {
        let panics = Arc::new(Panics::default());
        let tasks = Tasks::new(panics.clone());
        tasks.detach("the answer", async { panic!("it stops") });
        // The second begins when the first is done: one thread runs both.
        let (done, second) = tokio::sync::oneshot::channel::<()>();
        tasks.detach("the next", async move { drop(done) });
        assert!(second.await.is_err());
        assert_eq!(*panics.0.lock(), ["the answer"]);
    }
}
