//! What the database tells: each transition, at the moment at which it takes place.

use std::{collections::BTreeSet, time::Duration};

use fairlead_common::{picture::sha256, record, signature};
use fairlead_proto::v1::{self, ImageInfo, ImageStatus};
use futures::FutureExt;
use object_store::ObjectStoreExt;

use super::{Job, MOST_DELIVERIES, Model, NEWS_TRAVEL, Shard, has_ended, is_over, label, short};
use crate::{
    lease::{Commit, LeaseKey},
    simulation::truth,
    state::JobRecord,
    store::Applied,
    transition::{Effect, LostBy, Transition},
};

impl Model {
    /// A job was stored.
    pub(in crate::simulation) fn created(&mut self, record: &JobRecord) {
        let job = &record.job;
        self.note(format!(
            "store: job {} of {} images in {} shards",
            short(&job.job_id),
            job.images.len(),
            record.shards.len()
        ));
        for shard in &record.shards {
            self.shards.insert(shard.id.clone(), Shard::default());
        }
        let shards = record.shards.iter().map(|shard| shard.id.clone()).collect();
        let new = Job { last: job.clone(), shards };
        self.check_pinned(job);
        let twice = self.jobs.insert(job.job_id.clone(), new).is_some();
        self.check(!twice, || format!("job {} was stored twice", job.job_id));
    }

    /// A policy over all concepts leaves out none that the cluster has known for a while.
    fn check_pinned(&mut self, job: &v1::Job) {
        let concepts = job.policy.iter().flat_map(|policy| &policy.concepts);
        let pinned: BTreeSet<&str> = concepts.map(|concept| concept.name.as_str()).collect();
        let known = |since: Duration| since + NEWS_TRAVEL <= self.time.elapsed();
        let missing = self
            .served
            .iter()
            .filter(|(concept, since)| known(**since) && !pinned.contains(concept.as_str()));
        let missing: Vec<&String> = missing.map(|(concept, _)| concept).collect();
        if !missing.is_empty() {
            let problem = format!("job {} was admitted without {missing:?}", job.job_id);
            self.broken(problem);
        }
    }

    /// A commit took place and its coordinator does not know.
    pub(in crate::simulation) fn unsure(&mut self, lease: LeaseKey) {
        self.unsure.insert(lease);
    }

    /// A transition took place.
    pub(in crate::simulation) fn applied(
        &mut self,
        before: &JobRecord,
        transition: &Transition,
        applied: &Applied,
    ) {
        match (transition, &applied.effect) {
            (Transition::Grant { worker, .. }, Effect::Granted { lease, attempt }) => {
                self.granted(*lease, worker, *attempt);
            }
            (Transition::Commit { lease, images, .. }, Effect::Committed(Commit::First)) => {
                self.committed(&before.job, *lease, images);
            }
            (Transition::Commit { lease, .. }, Effect::Committed(Commit::Again)) => {
                let id = lease.shard.to_string();
                let same = self.shards.get(&id).is_some_and(|s| s.accepted == Some(lease.token));
                self.check(same, || format!("{lease} was committed again, but never before"));
            }
            (Transition::Fail { lease, failure }, _) => self.ended(*lease, &failure.reason),
            (Transition::Expire { lease, by: LostBy::Worker }, _) => {
                self.ended(*lease, "it expired");
            }
            (Transition::Expire { lease, by: LostBy::Coordinator }, _) => {
                self.ended(*lease, "its coordinator was lost");
                self.shard(&lease.shard.to_string()).deliveries -= 1;
            }
            (Transition::GiveBack { lease }, _) => {
                self.ended(*lease, "it was given back");
                self.shard(&lease.shard.to_string()).deliveries -= 1;
            }
            (Transition::Cancel { .. }, _) if !is_over(&before.job) => {
                self.note(format!("store: job {} is cancelled", short(&before.job.job_id)));
                for shard in &before.shards {
                    self.shard(&shard.id).current = None;
                }
            }
            _ => {}
        }
        self.changed(&applied.record.job);
    }

    pub(super) fn shard(&mut self, id: &str) -> &mut Shard {
        self.shards.entry(id.to_owned()).or_default()
    }

    fn granted(&mut self, lease: LeaseKey, worker: &str, attempt: u32) {
        let id = lease.shard.to_string();
        self.note(format!("store: {} to {worker}, attempt {attempt}", label(lease)));
        let now = self.time.elapsed();
        let shard = self.shard(&id);
        shard.granted = now;
        let (grows, free) = (lease.token > shard.newest, shard.current.is_none());
        let open = shard.accepted.is_none();
        (shard.newest, shard.current) = (lease.token, Some(lease.token));
        shard.deliveries += 1;
        let few = shard.deliveries <= MOST_DELIVERIES;
        self.check(few, || format!("{lease} is delivered more than {MOST_DELIVERIES} times"));
        self.check(grows, || format!("{lease} was granted, and no larger than one before"));
        self.check(free, || format!("{lease} was granted while another delivery ran"));
        self.check(open, || format!("{lease} was granted of a shard that is done"));
    }

    fn ended(&mut self, lease: LeaseKey, reason: &str) {
        self.note(format!("store: {} ended: {reason}", label(lease)));
        let shard = self.shard(&lease.shard.to_string());
        let was_current = shard.current.take() == Some(lease.token);
        self.check(was_current, || format!("{lease} was ended and was not the current delivery"));
    }

    fn committed(&mut self, job: &v1::Job, lease: LeaseKey, images: &[ImageInfo]) {
        let statuses = images.iter().map(|image| {
            format!(
                "{} {}",
                image.index,
                image.status().as_str_name().trim_start_matches("IMAGE_STATUS_")
            )
        });
        let statuses: Vec<String> = statuses.collect();
        self.note(format!("store: {} committed: {}", label(lease), statuses.join(", ")));
        let shard = self.shard(&lease.shard.to_string());
        let current = shard.current.take();
        let earlier = shard.accepted.replace(lease.token);
        let granted = shard.granted;
        self.check(current == Some(lease.token), || {
            format!("{lease} was accepted, but the current lease is {current:?}")
        });
        self.check(earlier.is_none(), || {
            format!("{lease} was accepted after token {earlier:?} of the same shard")
        });
        for image in images {
            if image.status() == ImageStatus::Released {
                self.released(job, lease.token, granted, image);
            } else {
                let record = self.stored_record(&job.job_id, image.index, lease.token);
                self.check(record.is_some(), || {
                    format!("image {} of {} is withheld and has no record", image.index, job.job_id)
                });
            }
        }
    }

    /// An image of a delivery since `granted` is about to be released: all that must be true before.
    fn released(&mut self, job: &v1::Job, token: u64, granted: Duration, image: &ImageInfo) {
        let name = format!("image {} of job {}", image.index, job.job_id);
        let png = self.object(&format!("jobs/{}/{}-{token}.png", job.job_id, image.index));
        let Some(png) = png else {
            return self.broken(format!("{name} is released before it is stored"));
        };
        self.check_bytes(&name, job, image, &png);
        match self.stored_record(&job.job_id, image.index, token) {
            None => self.broken(format!("{name} is released before its safety record is stored")),
            Some(record) => self.check_record(&name, image, &record),
        }
        for concept in job.policy.iter().flat_map(|policy| &policy.concepts) {
            let asked = (sha256(&png), concept.name.clone());
            let cleared = self.cleared.get(&asked).is_some_and(|&when| when >= granted);
            self.check(cleared, || {
                format!(
                    "{name} is released, but no node cleared it of `{}` in this delivery",
                    concept.name
                )
            });
        }
    }

    pub(super) fn check_bytes(&mut self, name: &str, job: &v1::Job, image: &ImageInfo, png: &[u8]) {
        let spec = job.spec.clone().unwrap_or_default();
        let pixels = truth::decode(png);
        let right = pixels == truth::pixels(&spec, image.seed);
        self.check(right, || format!("{name} has other pixels than its seed says"));
        let hash = sha256(png);
        self.check(hash == image.image_sha256, || format!("{name} has other bytes than its hash"));
        for concept in job.policy.iter().flat_map(|policy| &policy.concepts) {
            let shown = truth::shows(&concept.name, &pixels);
            self.check(!shown, || format!("{name} is released and shows `{}`", concept.name));
        }
    }

    pub(super) fn check_record(
        &mut self,
        name: &str,
        image: &ImageInfo,
        record: &v1::SafetyRecord,
    ) {
        let bound = record.image_sha256 == image.image_sha256
            && record.record_id == image.record_id
            && record.status() == image.status();
        self.check(bound, || format!("the record of {name} is bound to something else"));
        let signed = signature::verify(record, std::slice::from_ref(&self.signer)).is_ok();
        self.check(signed, || format!("the record of {name} is not signed"));
    }

    fn stored_record(&self, job_id: &str, index: u32, token: u64) -> Option<v1::SafetyRecord> {
        let json = self.object(&format!("jobs/{job_id}/{index}-{token}.json"))?;
        record::from_json(&String::from_utf8_lossy(&json)).ok()
    }

    /// An object as it is stored now.
    fn object(&self, name: &str) -> Option<Vec<u8>> {
        let got = async { self.objects.get(&name.into()).await?.bytes().await };
        let got = got.now_or_never().expect("memory answers at once");
        got.ok().map(|bytes| bytes.to_vec())
    }

    /// What has ended stays as it ended.
    fn changed(&mut self, job: &v1::Job) {
        let Some(Job { last, .. }) = self.jobs.get_mut(&job.job_id) else {
            return self.broken(format!("job {} was never created", job.job_id));
        };
        let old = std::mem::replace(last, job.clone());
        if is_over(&old) {
            let same = old == *job;
            self.check(same, || {
                format!("job {} has ended and changed: {old:?}, {job:?}", job.job_id)
            });
        }
        for (old, new) in old.images.iter().zip(&job.images).filter(|(old, _)| has_ended(old)) {
            self.check(old == new, || {
                format!("image {} of {} has ended and changed", old.index, job.job_id)
            });
        }
        if is_over(job) && !is_over(&old) {
            self.note(format!("store: job {} {}", short(&job.job_id), job.state().as_str_name()));
        }
    }
}
