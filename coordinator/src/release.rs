//! The release gate. The coordinator encodes the file that would leave, asks live nodes of every pinned
//! concept about those very bytes, then stores the safety record, then the image, and only then may the
//! store mark the image released. Whatever goes wrong on the way releases nothing.

mod check;
mod file;
mod record;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fairlead_common::{grpc::Channels, picture::sha256, signature::Signer, trace};
use fairlead_proto::v1::{self, ImageStatus};
use tokio::sync::Semaphore;
use tracing::Instrument;

use self::{check::Checker, file::FinishedFile, record::Decision};
use crate::{
    clock::unix_ms,
    metrics,
    outputs::{OutputError, Outputs},
    registry::Registry,
    state::JobRecord,
    verdict::{self, Outcome},
};

/// Images that are checked at once, over all shards.
const CONCURRENT_CHECKS: usize = 16;

/// Previews that are checked at once, over all shards: beside the images, and few enough that these
/// hardly wait for them.
const CONCURRENT_PREVIEWS: usize = 2;

/// Why an image cannot be released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rejection {
    /// For the job's reason.
    pub(crate) reason: String,
    /// Another delivery may succeed.
    pub(crate) retryable: bool,
}

impl Rejection {
    fn retryable(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), retryable: true }
    }
}

/// A worker's result for one image, as it arrived.
#[derive(Debug)]
pub(crate) struct Proposal {
    /// The job when the shard was handed out.
    pub(crate) job: Arc<JobRecord>,
    /// Token of the delivery.
    pub(crate) token: u64,
    /// The worker that made it.
    pub(crate) worker_id: String,
    /// What it sent.
    pub(crate) outcome: v1::ImageOutcome,
}

/// The release gate; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct ReleaseGate {
    outputs: Outputs,
    checker: Checker,
    images: Arc<Semaphore>,
    previews: Arc<Semaphore>,
    signer: Signer,
}

impl ReleaseGate {
    /// Each node has `timeout` to answer about one image; `signer` vouches for what was decided.
    pub(crate) fn new(
        registry: Registry,
        outputs: Outputs,
        channels: Channels,
        timeout: Duration,
        signer: Signer,
    ) -> Self {
        Self {
            outputs,
            checker: Checker::new(registry, channels, timeout, &signer),
            images: Arc::new(Semaphore::new(CONCURRENT_CHECKS)),
            previews: Arc::new(Semaphore::new(CONCURRENT_PREVIEWS)),
            signer,
        }
    }

    /// Decides about one image and stores its record and, if it may leave, the image. The returned
    /// info is what the store's commit then makes true.
    pub(crate) async fn decide(&self, proposal: Proposal) -> Result<v1::ImageInfo, Rejection> {
        let Proposal { job, token, worker_id, outcome } = proposal;
        let index = outcome.index;
        let image = job.job.images.get(index as usize).cloned().unwrap_or_default();
        let refused =
            |problem| Rejection::retryable(format!("worker {worker_id}, image {index}: {problem}"));
        let (outcome, report) =
            verdict::accept_outcome(&job.spec(), &job.policy(), outcome).map_err(refused)?;
        let (decision, png) = match outcome {
            Outcome::Withheld => (Decision::WithheldByWorker, None),
            Outcome::Proposed(picture) => {
                let file = FinishedFile::of(&job, &image, picture).await.map_err(refused)?;
                let span =
                    tracing::info_span!("release", job = job.job.job_id, image = i64::from(index));
                trace::follow(&span, &job.traceparent);
                let _permit = self.images.acquire().await.expect("the semaphore is never closed");
                let readings = self.checker.check(&job, index, &file).instrument(span).await?;
                let decision = Decision::Checked {
                    readings,
                    image_sha256: sha256(&file.png),
                    pixels_sha256: file.pixels_sha256,
                };
                (decision, Some(file.png))
            }
        };
        let mut record = record::assemble(&job, &image, worker_id, report, decision, unix_ms());
        self.signer.sign(&mut record);
        let info = record::info(image, &record);
        let stored = |error: OutputError| Rejection::retryable(error.to_string());
        self.outputs.put_record(&record, token).await.map_err(stored)?;
        if let Some(png) = png.filter(|_| record.status() == ImageStatus::Released) {
            self.outputs.put_image(&job.job.job_id, index, token, png).await.map_err(stored)?;
        }
        Ok(info)
    }

    /// The PNG of a preview that may be shown: a node of every concept has found nothing in it. `None`
    /// if one has, if nobody can say, or if too many are being checked already.
    pub(crate) async fn preview(&self, job: &JobRecord, preview: v1::Preview) -> Option<Bytes> {
        let index = preview.index;
        let checked = async {
            let picture =
                verdict::accept_preview(&job.spec(), preview).map_err(Rejection::retryable)?;
            let Ok(_permit) = self.previews.try_acquire() else { return Ok(None) };
            let file = FinishedFile::preview(picture).await.map_err(Rejection::retryable)?;
            let readings = self.checker.check(job, index, &file).await?;
            Ok::<_, Rejection>((!readings.is_flagged()).then_some(file.png))
        };
        let shown = checked.await.unwrap_or_else(|Rejection { reason, .. }| {
            tracing::warn!(job = job.job.job_id, image = index, reason, "no preview");
            None
        });
        metrics::preview(shown.is_some());
        shown
    }

    /// Deletes what a delivery stored for images that were not committed after all.
    pub(crate) async fn discard(&self, job_id: &str, token: u64, images: &[v1::ImageInfo]) {
        for image in images {
            let discarded = self.outputs.discard(job_id, image.index, token).await;
            if let Err(error) = discarded {
                tracing::warn!(%error, job = job_id, image = image.index, "left an object behind");
            }
        }
    }
}
