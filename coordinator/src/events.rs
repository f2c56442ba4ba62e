//! Watching a job: durable events come from the store, in order and without gaps; progress of
//! single steps is live only. A slow watcher loses progress, never an event.

use std::{collections::HashMap, sync::Arc, time::Duration};

use fairlead_common::ids::JobId;
use fairlead_proto::v1::{self, JobState, WatchJobResponse, watch_job_response::Event};
use parking_lot::Mutex;
use tokio::sync::{broadcast, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use crate::{error::Error, state::JobRecord, store::Store};

/// Live messages kept for a watcher that is behind.
const LIVE: usize = 256;
/// Messages between a watcher's task and its connection.
const OUTBOX: usize = 16;
/// Events read from the store at once.
const PAGE: usize = 64;
/// Longest time that a watcher relies on being told.
const QUIET: Duration = Duration::from_secs(15);

/// What running jobs tell their watchers.
#[derive(Debug, Clone)]
enum Live {
    /// The store has new events.
    Changed,
    /// The store may have new events, or none any longer of those that were sent.
    Unsure,
    /// One step of one image; not kept.
    Progress(Arc<v1::StepProgress>),
}

/// The events of all jobs; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    store: Arc<dyn Store>,
    live: Arc<Mutex<HashMap<JobId, broadcast::Sender<Live>>>>,
    watchers: TaskTracker,
    closing: CancellationToken,
}

impl Events {
    pub(crate) fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            live: Arc::default(),
            watchers: TaskTracker::new(),
            closing: CancellationToken::new(),
        }
    }

    /// Tells watchers that the store has new events of `job`.
    pub(crate) fn changed(&self, job: JobId) {
        self.publish(job, Live::Changed);
    }

    /// Tells all watchers that the store may have new events.
    pub(crate) fn all_changed(&self) {
        let jobs: Vec<JobId> = self.live.lock().keys().copied().collect();
        jobs.into_iter().for_each(|job| self.publish(job, Live::Unsure));
    }

    /// Passes progress on to whoever watches now, here or at another coordinator.
    pub(crate) fn progress(&self, job: JobId, step: v1::StepProgress) {
        self.store.tell(job, &step);
        self.heard(job, step);
    }

    /// Passes progress that another coordinator told of on to whoever watches here.
    pub(crate) fn heard(&self, job: JobId, step: v1::StepProgress) {
        self.publish(job, Live::Progress(Arc::new(step)));
    }

    fn publish(&self, job: JobId, message: Live) {
        let mut live = self.live.lock();
        // A send fails only without receivers: then nobody watches this job any longer.
        if live.get(&job).is_some_and(|sender| sender.send(message).is_err()) {
            live.remove(&job);
            self.store.listen(job, false);
        }
    }

    /// Events of `job` after the sequence number `after`; ends after the terminal one.
    pub(crate) fn watch(
        &self,
        job: JobId,
        after: u64,
    ) -> mpsc::Receiver<Result<WatchJobResponse, Status>> {
        let (outbox, stream) = mpsc::channel(OUTBOX);
        // Subscribed before the store is read, so that nothing falls in between.
        let live = self.subscribe(job);
        let events = self.clone();
        self.watchers.spawn(async move {
            let store = events.store.as_ref();
            let watcher = Watcher { store, job, cursor: after, outbox: outbox.clone() };
            tokio::select! {
                _ = watcher.run(live) => {}
                () = outbox.closed() => {}
                () = events.closing.cancelled() => {
                    // A watcher that reads nothing just sees its stream end.
                    let _ = outbox.try_send(Err(Error::Stopping.into()));
                }
            }
            events.forget(job);
        });
        stream
    }

    /// Ends all watch streams and waits for their tasks.
    pub(crate) async fn stop(&self) {
        self.closing.cancel();
        self.watchers.close();
        self.watchers.wait().await;
    }

    fn subscribe(&self, job: JobId) -> broadcast::Receiver<Live> {
        let mut live = self.live.lock();
        let sender = live.entry(job).or_insert_with(|| {
            self.store.listen(job, true);
            broadcast::Sender::new(LIVE)
        });
        sender.subscribe()
    }

    fn forget(&self, job: JobId) {
        let mut live = self.live.lock();
        if live.get(&job).is_some_and(|sender| sender.receiver_count() == 0) {
            live.remove(&job);
            self.store.listen(job, false);
        }
    }
}

struct Watcher<'a> {
    store: &'a dyn Store,
    job: JobId,
    cursor: u64,
    outbox: mpsc::Sender<Result<WatchJobResponse, Status>>,
}

/// Why a watcher looks into the store.
enum News {
    /// It has new events.
    Changed,
    /// It may have.
    Unsure,
}

/// The stream is over.
struct Over;

/// Where a watcher that was at `after` goes on: before the last event of a job that has ended, if the
/// store lacks some that were sent.
pub(crate) fn cursor(record: &JobRecord, after: u64) -> u64 {
    let last = record.last_sequence;
    match after > last {
        true => last.saturating_sub(u64::from(record.is_terminal())),
        false => after,
    }
}

impl Watcher<'_> {
    /// Sends until whoever reads has the terminal event, an error, or gone away.
    async fn run(mut self, mut live: broadcast::Receiver<Live>) -> Result<(), Over> {
        loop {
            self.replay().await?;
            if let News::Unsure = self.forward(&mut live).await? {
                self.compare().await?;
            }
        }
    }

    /// Ends with a job that the store has lost, and goes back to where the store is behind: a failover may
    /// lose the last writes.
    async fn compare(&mut self) -> Result<(), Over> {
        let record = match self.store.get(self.job).await {
            Ok(Some(record)) => record,
            Ok(None) => return self.fail(Error::NotFound(format!("job {}", self.job))).await,
            Err(error) => return self.fail(error.into()).await,
        };
        self.cursor = cursor(&record, self.cursor);
        Ok(())
    }

    async fn fail(&self, error: Error) -> Result<(), Over> {
        let _ = self.outbox.send(Err(error.into())).await;
        Err(Over)
    }

    /// Sends everything the store has after the cursor.
    async fn replay(&mut self) -> Result<(), Over> {
        loop {
            let page = match self.store.events(self.job, self.cursor, PAGE).await {
                Ok(page) => page,
                Err(error) => return self.fail(error.into()).await,
            };
            if page.is_empty() {
                return Ok(());
            }
            for event in page {
                self.cursor = event.sequence;
                let last = is_terminal(&event);
                self.outbox.send(Ok(event)).await.map_err(|_| Over)?;
                if last {
                    return Err(Over);
                }
            }
        }
    }

    /// Forwards progress until the store has something new or messages were missed.
    async fn forward(&self, live: &mut broadcast::Receiver<Live>) -> Result<News, Over> {
        loop {
            let Ok(heard) = tokio::time::timeout(QUIET, live.recv()).await else {
                return Ok(News::Unsure);
            };
            match heard {
                Ok(Live::Progress(step)) => {
                    // Progress is not an event: it carries the number of the one before it.
                    let event = Some(Event::Progress(v1::StepProgress::clone(&step)));
                    let message = WatchJobResponse { sequence: self.cursor, event };
                    self.outbox.send(Ok(message)).await.map_err(|_| Over)?;
                }
                Ok(Live::Changed) => return Ok(News::Changed),
                Ok(Live::Unsure) | Err(broadcast::error::RecvError::Lagged(_)) => {
                    return Ok(News::Unsure);
                }
                Err(broadcast::error::RecvError::Closed) => return Err(Over),
            }
        }
    }
}

fn is_terminal(event: &WatchJobResponse) -> bool {
    match &event.event {
        Some(Event::Job(job)) => {
            matches!(job.state(), JobState::Completed | JobState::Failed | JobState::Cancelled)
        }
        Some(Event::Progress(_) | Event::Image(_)) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watcher_ahead_of_the_store_goes_back_to_where_it_is() {
        let mut record = JobRecord { last_sequence: 3, ..JobRecord::default() };
        assert_eq!((cursor(&record, 1), cursor(&record, 3), cursor(&record, 9)), (1, 3, 3));
        record.job.set_state(JobState::Completed);
        assert_eq!(cursor(&record, 3), 3, "it has everything");
        assert_eq!(cursor(&record, 4), 2, "it has not heard this end");
    }
}
