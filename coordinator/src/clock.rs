//! Time, read at the edge only: decisions take `now` as an argument.

use std::{sync::Arc, time::Duration};

pub(crate) use fairlead_common::clock::unix_ms;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::store::{Store, StoreError};

/// An answer that takes longer says too little about the time.
const SLOW: Duration = Duration::from_millis(100);

/// Nothing is meant to end later than this from now, milliseconds: no lease, no membership, no delay. Something
/// that does was noted while a clock was ahead, and would stand in the way until then.
pub(crate) const FARTHEST_MS: i64 = 24 * 3_600_000;

/// Whether a time is one that nobody can have meant.
pub(crate) fn is_beyond(time: i64, now: i64) -> bool {
    time.saturating_sub(now) > FARTHEST_MS
}

/// The time that all coordinators of a store agree on: the store's, read now and then, and between two
/// looks carried on by this machine's steady clock. Leases and memberships end by it, so that it matters
/// neither how far the clocks of two machines are apart nor whether one of them is set.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    store: Arc<dyn Store>,
    /// The store's time at a moment.
    looked: Arc<Mutex<(i64, Instant)>>,
}

impl Clock {
    /// The clock of `store`.
    pub(crate) async fn of(store: Arc<dyn Store>) -> Result<Self, StoreError> {
        let looked = look(store.as_ref()).await?;
        Ok(Self { store, looked: Arc::new(Mutex::new(looked)) })
    }

    /// Looks again and says by how many milliseconds it was wrong, which is much only if the store's own
    /// clock was set or another server is the store now. A slow answer tells too little and counts for
    /// nothing.
    pub(crate) async fn set(&self) -> Result<u64, StoreError> {
        let asked = Instant::now();
        let looked = look(self.store.as_ref()).await?;
        if asked.elapsed() > SLOW {
            return Ok(0);
        }
        let before = self.now();
        *self.looked.lock() = looked;
        Ok(self.now().abs_diff(before))
    }

    /// The time, Unix milliseconds.
    pub(crate) fn now(&self) -> i64 {
        let (time, at) = *self.looked.lock();
        time.saturating_add(millis(at.elapsed()))
    }
}

async fn look(store: &dyn Store) -> Result<(i64, Instant), StoreError> {
    let asked = Instant::now();
    let time = store.clock().await?;
    // The store looked at its clock about half-way.
    Ok((time, asked + asked.elapsed() / 2))
}

/// A duration as whole milliseconds, saturating.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
