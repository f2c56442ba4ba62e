//! What other coordinators of the store did, and what it means here.

use std::sync::Arc;

use fairlead_common::ids::ShardId;
use tokio::sync::mpsc;

use super::Shared;
use crate::{
    lease::{LeaseKey, Phase},
    store::{Change, StoreError},
};

/// Runs until the hub closes.
pub(super) async fn follow(shared: Arc<Shared>, mut changes: mpsc::Receiver<Change>) {
    loop {
        let change = tokio::select! {
            change = changes.recv() => change,
            () = shared.closing.cancelled() => return,
        };
        let Some(change) = change else { return };
        if let Err(error) = handle(&shared, change).await {
            tracing::error!(%error, "cannot follow another coordinator");
        }
    }
}

async fn handle(shared: &Shared, change: Change) -> Result<(), StoreError> {
    match change {
        Change::Job(job) => shared.events.changed(job),
        Change::Progress(job, step) => shared.events.heard(job, *step),
        Change::Queue => shared.wake.notify_one(),
        Change::Lease(shard) => {
            shared.wake.notify_one();
            shared.check(Some(shard)).await?;
        }
        Change::Members => shared.registry.refresh().await?,
        Change::Everything => {
            shared.events.all_changed();
            shared.registry.refresh().await?;
            shared.check(None).await?;
            shared.wake.notify_one();
        }
    }
    Ok(())
}

impl Shared {
    /// Deliveries that workers of this coordinator work on, of one shard or of all.
    fn held(&self, shard: Option<ShardId>) -> Vec<LeaseKey> {
        let state = self.state.lock();
        match shard {
            None => state.sessions.keys().copied().collect(),
            Some(shard) => {
                let (first, last) =
                    (LeaseKey { shard, token: 0 }, LeaseKey { shard, token: u64::MAX });
                state.sessions.range(first..=last).map(|(lease, _)| *lease).collect()
            }
        }
    }

    /// Stops the deliveries, of one shard or of all, whose lease another coordinator has ended.
    async fn check(&self, shard: Option<ShardId>) -> Result<(), StoreError> {
        // A lease that is being handed out here has its session after this.
        drop(self.handover.write().await);
        for lease in self.held(shard) {
            let Some(job) = self.running(lease) else { continue };
            let record = self.store.get(job).await?;
            let stands =
                record.as_ref().and_then(|record| record.shard(lease.shard)).is_some_and(|shard| {
                    shard.lease.phase() == Phase::Leased && shard.lease.token() == lease.token
                });
            // Looked at again: it may have ended here meanwhile.
            if !stands && self.running(lease).is_some() {
                tracing::info!(%job, %lease, "ended by another coordinator");
                self.stop_session(lease, "the job was cancelled or the lease has ended");
            }
        }
        Ok(())
    }
}
