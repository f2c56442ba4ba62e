//! Whether what a job ended with is what it must be.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use fairlead_common::{
    probe::Probe,
    signature::{self, PublicKey},
};
use fairlead_proto::v1::{
    GetImageRequest, GetRecordRequest, ImageInfo, ImageStatus, Job, JobState, SafetyRecord,
};
use sha2::{Digest, Sha256};
use tonic::Code;

use super::{
    client::Client,
    ledger::{Breach, Ledger},
};
use crate::pixels;

/// What one image of a request was in the calm run: the hash of its pixels, or nothing where it was withheld.
pub(super) type Outcome = Option<String>;

pub(super) struct Judge {
    client: Client,
    ledger: Arc<Ledger>,
    key: PublicKey,
    /// The calm run, by request and image.
    calm: Vec<Vec<Outcome>>,
}

impl Judge {
    /// Trusts the key of the coordinators whose data are in `data`.
    pub(super) fn new(client: Client, ledger: Arc<Ledger>, data: &Path) -> Result<Self> {
        let key = PublicKey::load(&data.join("signing-key.pub.pem"))?;
        Ok(Self { client, ledger, key, calm: Vec::new() })
    }

    /// Keeps what a job of the calm run made; requests come in their order.
    pub(super) async fn remember(&mut self, job: &Job) -> Result<()> {
        let mut outcomes = Vec::new();
        for image in &job.images {
            outcomes.push(self.outcome(job, image).await?.context("a calm job made nothing")?);
        }
        self.calm.push(outcomes);
        Ok(())
    }

    /// Looks at every image of a job that has ended, a repetition of the calm run's `request`.
    pub(super) async fn judge(&self, request: usize, job: &Job) {
        self.ledger.ended(job);
        for (image, calm) in job.images.iter().zip(&self.calm[request]) {
            let name = || format!("image {} of job {}", image.index, job.job_id);
            match self.outcome(job, image).await {
                Ok(Some(outcome)) if outcome != *calm => {
                    let told = |outcome: &Outcome| outcome.clone().unwrap_or("withheld".into());
                    let (now, then) = (told(&outcome), told(calm));
                    let message = format!("{}: {now}, in the calm run {then}", name());
                    self.ledger.breach(Breach::Different, message);
                }
                Ok(None) if job.state() == JobState::Completed => {
                    let status = image.status().as_str_name();
                    let message = format!("{} is {status} in a job that completed", name());
                    self.ledger.breach(Breach::Lost, message);
                }
                Ok(_) => {}
                Err(error) => self.ledger.breach(Breach::Lost, format!("{}: {error:#}", name())),
            }
        }
    }

    /// What an image was if it was made, having checked that it left properly or not at all. An error is
    /// an image that was released and is not there.
    async fn outcome(&self, job: &Job, image: &ImageInfo) -> Result<Option<Outcome>> {
        let request = GetImageRequest { job_id: job.job_id.clone(), index: image.index };
        let png = self.client.call(|mut rpc| {
            let request = request.clone();
            async move { rpc.get_image(request).await }
        });
        let png = png.await.map(|answer| answer.png);
        let unchecked = |problem: String| {
            let message = format!("image {} of job {}: {problem}", image.index, job.job_id);
            self.ledger.breach(Breach::Unchecked, message);
        };
        match (image.status(), png) {
            (ImageStatus::Released, Ok(png)) => {
                let record = self.record(image).await?;
                if let Err(problem) = vouches(&self.key, &record, job, image, &png) {
                    unchecked(format!("{problem:#}"));
                }
                Ok(Some(Some(hex::encode(Sha256::digest(pixels(&png)?)))))
            }
            (ImageStatus::Released, Err(status)) => Err(status.into()),
            (status, Ok(_)) => {
                unchecked(format!("it is {} and was sent", status.as_str_name()));
                Ok(None)
            }
            (status, Err(refused)) => {
                let expected = refused.code() == Code::FailedPrecondition;
                ensure!(expected, "it is {} and {refused}", status.as_str_name());
                Ok((status == ImageStatus::Withheld).then_some(None))
            }
        }
    }

    async fn record(&self, image: &ImageInfo) -> Result<SafetyRecord> {
        let request = GetRecordRequest { record_id: image.record_id.clone(), ..Default::default() };
        let answer = self.client.call(|mut rpc| {
            let request = request.clone();
            async move { rpc.get_record(request).await }
        });
        answer.await.context("its record")?.record.context("its record is empty")
    }
}

/// Whether a record says of these very bytes that every pinned concept was found absent.
fn vouches(
    key: &PublicKey,
    record: &SafetyRecord,
    job: &Job,
    image: &ImageInfo,
    png: &[u8],
) -> Result<()> {
    signature::verify(record, std::slice::from_ref(key))?;
    let hash = hex::encode(Sha256::digest(png));
    ensure!(record.image_sha256 == hash, "its record is of the bytes {}", record.image_sha256);
    ensure!(image.image_sha256 == hash, "its job says {}", image.image_sha256);
    let same = (&record.job_id, record.index) == (&job.job_id, image.index);
    ensure!(same, "its record is of image {} of {}", record.index, record.job_id);
    let status = record.status();
    ensure!(status == ImageStatus::Released, "its record says {}", status.as_str_name());
    ensure!(record.policy == job.policy, "its record has another policy");
    let policy = record.policy.clone().unwrap_or_default();
    ensure!(!policy.observe_only, "its policy only observes");
    let pinned: BTreeSet<Probe> = policy.concepts.iter().map(Probe::from).collect();
    let scored: BTreeSet<Probe> = record.final_scores.iter().map(Probe::from).collect();
    ensure!(!pinned.is_empty(), "no concept is pinned");
    let missing = pinned.difference(&scored).next();
    ensure!(missing.is_none(), "it was not checked for {missing:?}");
    let open = record.final_scores.iter().find(|score| score.open);
    ensure!(open.is_none(), "a gate is open: {open:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_common::signature::Signer;
    use fairlead_proto::v1::{ConceptRef, ConceptScore, PinnedPolicy};

    const PNG: &[u8] = b"the bytes that left";

    /// A concept in a policy, and its score.
    fn concept(name: &str) -> (ConceptRef, ConceptScore) {
        let (name, energy) = (name.to_owned(), "clip".to_owned());
        (
            ConceptRef { name: name.clone(), energy: energy.clone(), ..Default::default() },
            ConceptScore { concept: name, energy, ..Default::default() },
        )
    }

    /// A job with one image, and the record of its release.
    fn released() -> (Job, SafetyRecord) {
        let (concepts, final_scores) = ["axe", "bomb"].map(concept).into_iter().unzip();
        let policy = Some(PinnedPolicy { concepts, ..Default::default() });
        let image_sha256 = hex::encode(Sha256::digest(PNG));
        let mut image = ImageInfo { image_sha256: image_sha256.clone(), ..Default::default() };
        image.set_status(ImageStatus::Released);
        let job = Job { policy: policy.clone(), images: vec![image], ..Default::default() };
        let mut record = SafetyRecord { policy, final_scores, image_sha256, ..Default::default() };
        record.set_status(ImageStatus::Released);
        (job, record)
    }

    type Change = fn(&mut SafetyRecord);

    #[test]
    fn a_record_vouches_for_its_bytes_and_every_concept_or_not_at_all() {
        let signer = Signer::generate();
        let judged = |change: Change, png: &[u8]| {
            let (job, mut record) = released();
            change(&mut record);
            signer.sign(&mut record);
            vouches(&signer.public(), &record, &job, &job.images[0], png)
        };
        judged(|_| {}, PNG).expect("a release as it should be");
        let wrong: [(&str, Change); 6] = [
            ("bytes", |record| record.image_sha256 = "00".into()),
            ("of image 1", |record| record.index = 1),
            ("WITHHELD", |record| record.set_status(ImageStatus::Withheld)),
            ("policy", |record| record.policy = None),
            ("not checked for", |record| drop(record.final_scores.pop())),
            ("open", |record| record.final_scores[0].open = true),
        ];
        for (word, change) in wrong {
            let problem = judged(change, PNG).expect_err(word).to_string();
            assert!(problem.contains(word), "`{word}` is not in: {problem}");
        }
        assert!(judged(|_| {}, b"others").is_err());
        let (job, mut record) = released();
        Signer::generate().sign(&mut record);
        vouches(&signer.public(), &record, &job, &job.images[0], PNG).expect_err("a stranger");
    }
}
