//! What is handed out is verified first, every time: the signature over the record, that the record is of
//! this very image, and the bytes against the record. What lies in the data folder is not believed.

use std::sync::Arc;

use bytes::Bytes;
use fairlead_common::{
    picture::sha256,
    signature::{self, PublicKey},
};
use fairlead_proto::v1::{ImageInfo, ImageStatus, SafetyRecord};

use crate::{
    error::{Error, Result},
    metrics,
    outputs::Outputs,
};

/// Reads stored outputs and believes none of them; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Handout {
    outputs: Outputs,
    /// Whose signatures count.
    trusted: Arc<[PublicKey]>,
}

impl Handout {
    pub(crate) fn new(outputs: Outputs, trusted: Vec<PublicKey>) -> Self {
        Self { outputs, trusted: trusted.into() }
    }

    /// The record of `image`, as it was signed. `token` is that of the delivery that was accepted.
    pub(crate) async fn record(
        &self,
        job_id: &str,
        image: &ImageInfo,
        token: u64,
    ) -> Result<SafetyRecord> {
        let object = || format!("the record of image {} of job {job_id}", image.index);
        let stored = self.outputs.record(job_id, image.index, token).await?;
        let record = stored.ok_or_else(|| damaged(object(), "is missing".to_owned()))?;
        if let Err(error) = signature::verify(&record, &self.trusted) {
            return Err(damaged(object(), format!("is not believed: {error}")));
        }
        let is_its = record.job_id == job_id
            && record.index == image.index
            && record.record_id == image.record_id
            && record.status == image.status
            && record.image_sha256 == image.image_sha256;
        match is_its {
            true => Ok(record),
            false => Err(damaged(object(), "is another image's".to_owned())),
        }
    }

    /// The bytes of a released image: those that its signed record says were checked.
    pub(crate) async fn image(&self, job_id: &str, image: &ImageInfo, token: u64) -> Result<Bytes> {
        let record = self.record(job_id, image, token).await?;
        let object = || format!("image {} of job {job_id}", image.index);
        if record.status() != ImageStatus::Released {
            return Err(damaged(object(), "was not released, by its record".to_owned()));
        }
        let png = self.outputs.image(job_id, image.index, token).await?;
        let png = png.ok_or_else(|| damaged(object(), "is missing".to_owned()))?;
        match sha256(&png) == record.image_sha256 {
            true => Ok(png),
            false => Err(damaged(object(), "has other bytes than its record says".to_owned())),
        }
    }
}

fn damaged(object: String, problem: String) -> Error {
    metrics::damaged();
    let error = Error::Damaged { object, problem };
    tracing::error!(%error, "not handed out");
    error
}

#[cfg(test)]
mod tests {
    use fairlead_common::signature::Signer;

    use super::*;

    const PNG: &[u8] = b"the picture";

    struct Stored {
        signer: Signer,
        outputs: Outputs,
        image: ImageInfo,
        record: SafetyRecord,
    }

    async fn stored() -> Stored {
        let signer = Signer::generate();
        let image = ImageInfo {
            index: 1,
            record_id: "r".into(),
            status: ImageStatus::Released.into(),
            image_sha256: sha256(PNG),
            ..Default::default()
        };
        let mut record = SafetyRecord {
            job_id: "j".into(),
            index: 1,
            record_id: "r".into(),
            status: image.status,
            image_sha256: image.image_sha256.clone(),
            ..Default::default()
        };
        signer.sign(&mut record);
        let outputs = Outputs::in_memory();
        outputs.put_record(&record, 3).await.expect("it writes");
        outputs.put_image("j", 1, 3, Bytes::from_static(PNG)).await.expect("it writes");
        Stored { signer, outputs, image, record }
    }

    impl Stored {
        fn handout(&self) -> Handout {
            Handout::new(self.outputs.clone(), vec![self.signer.public()])
        }

        async fn refused(&self) -> String {
            let refused = self.handout().image("j", &self.image, 3).await;
            refused.expect_err("it is not handed out").to_string()
        }
    }

    #[tokio::test]
    async fn a_released_image_is_handed_out_with_its_record() {
        let stored = stored().await;
        let png = stored.handout().image("j", &stored.image, 3).await.expect("all is well");
        assert_eq!(&*png, PNG);
        let record = stored.handout().record("j", &stored.image, 3).await.expect("all is well");
        assert_eq!(record, stored.record);
    }

    #[tokio::test]
    async fn an_edited_record_is_not_handed_out_nor_its_image() {
        let stored = stored().await;
        type Edit = fn(&mut SafetyRecord, &Signer);
        let edits: [(Edit, &str); 5] = [
            (|record, _| record.prompt = "a cat".into(), "not believed"),
            (|record, _| record.signature = None, "not believed"),
            (|record, _| Signer::generate().sign(record), "not believed"),
            // Signed, and of something else: it was moved here.
            (
                |record, signer| {
                    record.record_id = "s".into();
                    signer.sign(record);
                },
                "another image's",
            ),
            (
                |record, signer| {
                    record.set_status(ImageStatus::Withheld);
                    signer.sign(record);
                },
                "another image's",
            ),
        ];
        for (edit, expected) in edits {
            let mut record = stored.record.clone();
            edit(&mut record, &stored.signer);
            record.index = 1;
            stored.outputs.put_record(&record, 3).await.expect("it writes");
            let refused = stored.refused().await;
            assert!(refused.contains(expected), "{refused}");
        }
    }

    #[tokio::test]
    async fn no_image_is_handed_out_without_its_record_or_with_other_bytes() {
        let altered = stored().await;
        altered
            .outputs
            .put_image("j", 1, 3, Bytes::from_static(b"other"))
            .await
            .expect("it writes");
        assert!(altered.refused().await.contains("other bytes"));
        let bare = stored().await;
        bare.outputs.discard("j", 1, 3).await.expect("it deletes");
        let png = Bytes::from_static(PNG);
        bare.outputs.put_image("j", 1, 3, png).await.expect("it writes");
        let refused = bare.refused().await;
        assert!(refused.contains("record of image 1") && refused.contains("missing"), "{refused}");
    }
}
