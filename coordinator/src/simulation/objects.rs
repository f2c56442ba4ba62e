//! The object store that the simulated coordinators share: what is written stays, but calls take their time,
//! and may fail before or after they did what they were asked for.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};
use parking_lot::Mutex;
use rand::{Rng, rngs::StdRng};

/// Objects in memory behind a way that may fail.
#[derive(Debug)]
pub(super) struct Objects {
    inner: Arc<InMemory>,
    rng: Mutex<StdRng>,
    /// The longest that the way there or back takes, in milliseconds.
    most_ms: u64,
    failing: AtomicBool,
}

impl Objects {
    pub(super) fn new(inner: Arc<InMemory>, mut rng: StdRng) -> Self {
        let most_ms = rng.random_range(0..60);
        Self { inner, rng: Mutex::new(rng), most_ms, failing: AtomicBool::new(false) }
    }

    /// Whether calls may fail from now on.
    pub(super) fn fail(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    /// The way there, or back.
    async fn way(&self) -> Result<()> {
        let (pause, fails) = {
            let mut rng = self.rng.lock();
            (rng.random_range(0..=self.most_ms), rng.random_bool(0.2))
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        match fails && self.failing.load(Ordering::Relaxed) {
            true => {
                Err(Error::Generic { store: "simulated", source: "it fails for a while".into() })
            }
            false => Ok(()),
        }
    }
}

impl fmt::Display for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated objects")
    }
}

#[async_trait]
impl ObjectStore for Objects {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.way().await?;
        let result = self.inner.put_opts(location, payload, options).await?;
        self.way().await.map(|()| result)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.way().await?;
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.way().await?;
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.way().await?;
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.way().await?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.way().await?;
        self.inner.copy_opts(from, to, options).await
    }
}
