//! Images and safety records in an object store.
//!
//! Names carry the fencing token of the delivery that made the object
//! (`jobs/{job}/{index}-{token}.png`, its record beside it as `.json`), and the store's commit says
//! which token won. So an attempt that lost its lease while writing can never replace what a
//! later attempt released.

use std::sync::Arc;

use bytes::Bytes;
use fairlead_common::record::{self, RecordError};
use fairlead_proto::v1::SafetyRecord;
use futures::TryStreamExt;
use object_store::{
    ObjectStore, ObjectStoreExt, PutPayload, local::LocalFileSystem, memory::InMemory, path::Path,
};

use crate::place::Place;

/// The object store failed.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// An object cannot be written, read or deleted.
    #[error("outputs: {object}: {source}")]
    Object {
        /// Name of the object.
        object: String,
        /// The object store's error.
        source: object_store::Error,
    },
    /// The folder is gone.
    #[error("outputs: {0}")]
    Folder(String),
    /// A stored record cannot be read.
    #[error("outputs: {object}: {source}")]
    Record {
        /// Name of the object.
        object: String,
        /// What is wrong with it.
        source: RecordError,
    },
}

/// Where images and records go.
#[derive(Debug, Clone)]
pub(crate) struct Outputs {
    objects: Arc<dyn ObjectStore>,
    /// The folder of those that are files.
    folder: Option<Place>,
}

impl Outputs {
    /// Files under `dir`, which exists.
    pub(crate) fn local(dir: &std::path::Path) -> Result<Self, OutputError> {
        let objects = LocalFileSystem::new_with_prefix(dir)
            .map_err(|source| OutputError::Object { object: dir.display().to_string(), source })?
            .with_automatic_cleanup(true)
            .with_fsync(true);
        let folder = Place::new(dir).map_err(|error| OutputError::Folder(error.to_string()))?;
        Ok(Self { folder: Some(folder), ..Self::new(Arc::new(objects)) })
    }

    /// Objects in memory, gone with the process.
    pub(crate) fn in_memory() -> Self {
        Self::new(Arc::new(InMemory::new()))
    }

    /// Any object store.
    pub(crate) fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self { objects, folder: None }
    }

    /// Whether objects go where the earlier ones are. Written all the same, they would make a folder anew
    /// that was deleted, or one under a file system that is not mounted any longer.
    pub(crate) fn check(&self) -> Result<(), OutputError> {
        self.folder.as_ref().map_or(Ok(()), Place::check).map_err(OutputError::Folder)
    }

    pub(crate) async fn put_image(
        &self,
        job_id: &str,
        index: u32,
        token: u64,
        png: Bytes,
    ) -> Result<(), OutputError> {
        self.put(image_name(job_id, index, token), png.into()).await
    }

    /// The PNG of an image; `None` if there is none.
    pub(crate) async fn image(
        &self,
        job_id: &str,
        index: u32,
        token: u64,
    ) -> Result<Option<Bytes>, OutputError> {
        self.get(image_name(job_id, index, token)).await
    }

    pub(crate) async fn put_record(
        &self,
        record: &SafetyRecord,
        token: u64,
    ) -> Result<(), OutputError> {
        let name = record_name(&record.job_id, record.index, token);
        self.put(name, record::to_json(record).into()).await
    }

    /// A stored record; `None` if there is none.
    pub(crate) async fn record(
        &self,
        job_id: &str,
        index: u32,
        token: u64,
    ) -> Result<Option<SafetyRecord>, OutputError> {
        let name = record_name(job_id, index, token);
        let Some(json) = self.get(name.clone()).await? else { return Ok(None) };
        let record = record::from_json(&String::from_utf8_lossy(&json))
            .map_err(|source| OutputError::Record { object: name, source })?;
        Ok(Some(record))
    }

    /// Deletes everything that any delivery wrote for a job.
    pub(crate) async fn forget(&self, job_id: &str) -> Result<(), OutputError> {
        let folder = format!("jobs/{job_id}");
        let listed = self.objects.list(Some(&folder.as_str().into())).map_ok(|meta| meta.location);
        let listed: Vec<Path> = listed
            .try_collect()
            .await
            .map_err(|source| OutputError::Object { object: folder, source })?;
        for name in listed {
            self.delete(&name).await?;
        }
        Ok(())
    }

    /// Deletes what a delivery wrote for one image; absent objects are fine.
    pub(crate) async fn discard(
        &self,
        job_id: &str,
        index: u32,
        token: u64,
    ) -> Result<(), OutputError> {
        for name in [image_name(job_id, index, token), record_name(job_id, index, token)] {
            self.delete(&name.as_str().into()).await?;
        }
        Ok(())
    }

    async fn delete(&self, name: &Path) -> Result<(), OutputError> {
        match self.objects.delete(name).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(OutputError::Object { object: name.to_string(), source }),
        }
    }

    async fn put(&self, name: String, payload: PutPayload) -> Result<(), OutputError> {
        self.check()?;
        match self.objects.put(&name.as_str().into(), payload).await {
            Ok(_) => Ok(()),
            Err(source) => Err(OutputError::Object { object: name, source }),
        }
    }

    async fn get(&self, name: String) -> Result<Option<Bytes>, OutputError> {
        let object = self.objects.get(&name.as_str().into()).await;
        let bytes = match object {
            Ok(object) => object.bytes().await,
            Err(source) => Err(source),
        };
        match bytes {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(OutputError::Object { object: name, source }),
        }
    }
}

fn image_name(job_id: &str, index: u32, token: u64) -> String {
    format!("jobs/{job_id}/{index}-{token}.png")
}

fn record_name(job_id: &str, index: u32, token: u64) -> String {
    format!("jobs/{job_id}/{index}-{token}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn contract(outputs: Outputs) {
        let record = SafetyRecord { job_id: "j".into(), seed: 7, ..Default::default() };
        let png = Bytes::from_static(b"png");
        outputs.put_image("j", 0, 2, png.clone()).await.expect("it writes");
        outputs.put_image("j", 0, 3, "other".into()).await.expect("it writes");
        outputs.put_record(&record, 2).await.expect("it writes");
        assert_eq!(outputs.image("j", 0, 2).await.expect("it reads"), Some(png.clone()));
        assert_eq!(outputs.image("j", 1, 2).await.expect("it reads"), None);
        assert_eq!(outputs.record("j", 0, 2).await.expect("it reads"), Some(record));
        outputs.discard("j", 0, 3).await.expect("a missing record is fine");
        assert_eq!(outputs.image("j", 0, 3).await.expect("it reads"), None);
        assert_eq!(outputs.image("j", 0, 2).await.expect("it reads"), Some(png.clone()));
        outputs.put_image("j", 1, 9, png.clone()).await.expect("it writes");
        outputs.put_image("k", 0, 2, png.clone()).await.expect("it writes");
        outputs.forget("j").await.expect("it deletes");
        outputs.forget("j").await.expect("again is fine");
        assert_eq!(outputs.image("j", 1, 9).await.expect("it reads"), None);
        assert_eq!(outputs.record("j", 0, 2).await.expect("it reads"), None);
        assert_eq!(outputs.image("k", 0, 2).await.expect("it reads"), Some(png), "another job's");
    }

    #[tokio::test]
    async fn memory_keeps_tokens_apart() {
        contract(Outputs::in_memory()).await;
    }

    #[tokio::test]
    async fn files_keep_tokens_apart() {
        let dir = tempfile::tempdir().expect("a directory");
        contract(Outputs::local(dir.path()).expect("it exists")).await;
        assert!(dir.path().join("jobs/k/0-2.png").exists());
    }
}
