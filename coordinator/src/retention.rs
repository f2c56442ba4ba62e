//! Forgets jobs some time after their end. Time here is the store's own age, which grows while a
//! coordinator runs and by its steady clock. No clock that is set, wherever it is, makes a job older.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use tokio::time::Instant;

use crate::{
    clock::millis,
    error::Result,
    outputs::{OutputError, Outputs},
    state::JobRecord,
    store::Store,
};

/// Jobs to forget that are read at once, and how many are forgotten at the same time.
const AT_ONCE: usize = 256;
const TOGETHER: usize = 16;
/// Shortest and longest pause between two looks.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What forgets jobs.
#[derive(Debug)]
pub(crate) struct Retention {
    store: Arc<dyn Store>,
    outputs: Outputs,
    /// How long jobs are kept after their end.
    keep: Duration,
    /// The age of the store at the last look, and when that was.
    looked: Option<(u64, Instant)>,
}

impl Retention {
    pub(crate) fn new(store: Arc<dyn Store>, outputs: Outputs, keep: Duration) -> Self {
        Self { store, outputs, keep, looked: None }
    }

    /// The pause between two looks.
    pub(crate) fn pause(&self) -> Duration {
        (self.keep / 20).clamp(PAUSE.0, PAUSE.1)
    }

    /// Forgets jobs that were kept for long enough, with their images and records; says how many.
    pub(crate) async fn look(&mut self) -> Result<usize> {
        let Some(before) = self.age().await?.checked_sub(millis(self.keep).unsigned_abs()) else {
            return Ok(0);
        };
        let mut forgotten = 0;
        loop {
            let old = self.store.ended(before, AT_ONCE).await?;
            let whole = old.len() == AT_ONCE;
            // The job last: what a crash leaves is found again by it.
            let deleting = old.into_iter().map(|record| {
                let outputs = self.outputs.clone();
                async move { outputs.forget(&record.job.job_id).await.map(|()| record) }
            });
            let deleted: Vec<Result<JobRecord, OutputError>> =
                stream::iter(deleting).buffer_unordered(TOGETHER).collect().await;
            let (gone, kept): (Vec<_>, Vec<_>) = deleted.into_iter().partition(Result::is_ok);
            forgotten += gone.len();
            // One that stays must not keep the others: but it would be found again at once.
            self.store.forget(gone.into_iter().flatten().collect()).await?;
            if let Some(Err(error)) = kept.into_iter().next() {
                return Err(error.into());
            }
            if !whole {
                return Ok(forgotten);
            }
        }
    }

    /// The age of the store now. Two pauses are the most that one look adds: even a steady clock may
    /// jump, e.g. that of a machine which was moved.
    async fn age(&mut self) -> Result<u64> {
        let now = Instant::now();
        let most = 2 * self.pause();
        let since = self.looked.map(|(age, at)| (age, now.duration_since(at).min(most)));
        let age = self.store.age(since).await?;
        self.looked = Some((age, now));
        Ok(age)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{simulation::lone_store, store::contract::stored, transition::Transition};

    const KEEP: Duration = Duration::from_secs(600);
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_a_year_ahead_deletes_nothing_and_time_does() {
        let (store, trouble) = lone_store(0);
        let mut retention = Retention::new(Arc::clone(&store), Outputs::in_memory(), KEEP);
        let mut look = async |passed: Duration| {
            tokio::time::advance(passed).await;
            retention.look().await.expect("it looks")
        };
        let pause = PAUSE.0 * 30;
        assert_eq!(look(Duration::ZERO).await, 0);
        // One ends while the clock is right, one while it is ahead, one while it is behind.
        for offset in [0, millis(YEAR), -millis(50 * YEAR)] {
            trouble.set_clock(offset);
            let now = store.clock().await.expect("it tells the time");
            let (job, _) = stored(store.as_ref(), 1, 1).await;
            let cancel = Transition::Cancel { reason: String::new() };
            store.apply(job, cancel, now).await.expect("it cancels");
            assert_eq!(look(pause).await, 0, "the clock is off by {offset} ms");
        }
        trouble.set_clock(0);
        let mut passed = 3 * pause;
        while passed + 2 * pause <= KEEP {
            assert_eq!(look(pause).await, 0, "{passed:?}");
            passed += pause;
        }
        assert_eq!(look(pause / 2).await, 0, "the store itself takes no half pause");
        assert_eq!([look(pause).await, look(pause).await, look(pause).await], [1, 1, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_steady_clock_that_jumps_counts_for_two_looks() {
        let (store, _) = lone_store(0);
        let mut retention = Retention::new(Arc::clone(&store), Outputs::in_memory(), KEEP);
        retention.look().await.expect("it looks");
        tokio::time::advance(YEAR).await;
        retention.look().await.expect("it looks");
        let age = store.age(None).await.expect("it has one");
        assert_eq!(age, millis(2 * retention.pause()).unsigned_abs());
    }
}
