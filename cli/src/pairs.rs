//! The same request unsteered and steered, for comparisons.

use anyhow::Result;
use fairlead_proto::v1::JobSpec;
use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use crate::client::{Client, FinishedImage};

/// Policy that records scores and never corrects; it ships in
/// `assets/policies-measuring.toml`.
pub(crate) const UNSTEERED: &str = "unsteered";

/// Jobs under way at once: enough that every worker of a small cluster always has the next one.
pub(crate) const JOBS_IN_FLIGHT: usize = 8;

/// One image made twice from the same noise.
pub(crate) struct Pair {
    pub(crate) unsteered: FinishedImage,
    pub(crate) steered: FinishedImage,
}

impl Pair {
    /// Steering left the picture as it was, to the byte.
    pub(crate) fn identical(&self) -> bool {
        let (a, b) = (&self.unsteered.record.pixels_sha256, &self.steered.record.pixels_sha256);
        !a.is_empty() && a == b
    }
}

/// Runs every spec (of one image) under the unsteered policy and as it is; results come in the
/// order of `specs`, `on_pair` as they end.
pub(crate) async fn run(
    client: &Client,
    specs: Vec<JobSpec>,
    stop: &CancellationToken,
    on_pair: impl Fn(),
) -> Result<Vec<Pair>> {
    let pairs = specs.into_iter().map(|spec| {
        let on_pair = &on_pair;
        async move {
            let plain = JobSpec { policy: UNSTEERED.to_owned(), steering: None, ..spec.clone() };
            let unsteered = single(client, plain, stop).await?;
            let steered = single(client, spec, stop).await?;
            on_pair();
            Ok(Pair { unsteered, steered })
        }
    });
    stream::iter(pairs).buffered(JOBS_IN_FLIGHT).try_collect().await
}

async fn single(client: &Client, spec: JobSpec, stop: &CancellationToken) -> Result<FinishedImage> {
    let mut finished = client.complete(spec, stop, |_| {}).await?;
    Ok(finished.images.remove(0))
}
