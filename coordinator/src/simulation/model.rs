//! What must be true, checked against everything that happens: a small model of jobs and leases that hears of
//! each transition as the database makes it, and of everything that clients, workers and nodes see. It
//! decides nothing and knows nothing of the coordinator's own rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use fairlead_common::{
    record,
    signature::{self, PublicKey},
};
use fairlead_proto::v1::{
    self, CommitStatus, ImageInfo, ImageStatus, JobState, WatchJobResponse,
    watch_job_response::Event,
};
use futures::FutureExt;
use object_store::{ObjectStoreExt, memory::InMemory};

use super::{truth, world::Time};
use crate::{
    lease::{Commit, LeaseKey},
    outputs::sha256_hex,
    state::JobRecord,
    store::Applied,
    transition::{Effect, Transition},
};

/// After this long every coordinator knows what the cluster serves.
const NEWS_TRAVEL: Duration = Duration::from_secs(20);

/// A shard that fails this often is given up.
const MOST_DELIVERIES: u32 = 5;

/// What happened, and whether it was right.
#[derive(Debug)]
pub(super) struct Model {
    time: Time,
    objects: Arc<InMemory>,
    signer: PublicKey,
    history: Vec<String>,
    problems: Vec<String>,
    jobs: BTreeMap<String, Job>,
    shards: BTreeMap<String, Shard>,
    /// Concepts that nodes serve, and since when.
    served: BTreeMap<String, Duration>,
    /// Concepts that a node, asked by a coordinator, did not see in the bytes with this hash.
    cleared: BTreeSet<(String, String)>,
    /// The job of each idempotency key.
    keys: BTreeMap<String, String>,
    /// Events by job and number: all watchers see the same.
    events: BTreeMap<(String, u64), WatchJobResponse>,
    /// Commits that took place, but whose coordinator did not hear it.
    unsure: BTreeSet<LeaseKey>,
}

#[derive(Debug)]
struct Job {
    /// As it was stored last.
    last: v1::Job,
    shards: Vec<String>,
}

#[derive(Debug, Default)]
struct Shard {
    newest: u64,
    /// The token of the delivery that may commit.
    current: Option<u64>,
    accepted: Option<u64>,
    /// Deliveries that count.
    deliveries: u32,
}

fn is_over(job: &v1::Job) -> bool {
    matches!(job.state(), JobState::Completed | JobState::Failed | JobState::Cancelled)
}

fn has_ended(image: &ImageInfo) -> bool {
    !matches!(image.status(), ImageStatus::Unspecified | ImageStatus::Pending)
}

/// The first characters of an id: enough to tell ids of one run apart.
pub(super) fn short(id: &str) -> &str {
    &id[id.len().saturating_sub(6)..]
}

impl Model {
    pub(super) fn new(time: Time, objects: Arc<InMemory>, signer: PublicKey) -> Self {
        Self {
            time,
            objects,
            signer,
            history: Vec::new(),
            problems: Vec::new(),
            jobs: BTreeMap::new(),
            shards: BTreeMap::new(),
            served: BTreeMap::new(),
            cleared: BTreeSet::new(),
            keys: BTreeMap::new(),
            events: BTreeMap::new(),
            unsure: BTreeSet::new(),
        }
    }

    /// Something happened.
    pub(super) fn note(&mut self, what: impl AsRef<str>) {
        let now = self.time.elapsed().as_secs_f64();
        self.history.push(format!("{now:9.3}  {}", what.as_ref()));
    }

    /// Something happened that must not.
    pub(super) fn broken(&mut self, what: impl AsRef<str>) {
        self.note(format!("BROKEN: {}", what.as_ref()));
        self.problems.push(what.as_ref().to_owned());
    }

    fn check(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.broken(otherwise());
        }
    }

    pub(super) fn history(&self) -> &[String] {
        &self.history
    }

    pub(super) fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Shards that have not ended.
    pub(super) fn open_shards(&self) -> Vec<String> {
        let open = self.jobs.values().filter(|job| !is_over(&job.last));
        open.flat_map(|job| job.shards.clone()).collect()
    }

    /// Accepted jobs that have not ended.
    pub(super) fn open_jobs(&self) -> Vec<String> {
        let open = self.jobs.iter().filter(|(_, job)| !is_over(&job.last));
        open.map(|(id, job)| format!("{id} ({})", job.last.state().as_str_name())).collect()
    }

    /// How many images have ended in each way.
    pub(super) fn tally(&self) -> BTreeMap<&'static str, usize> {
        let mut tally = BTreeMap::new();
        for image in self.jobs.values().flat_map(|job| &job.last.images) {
            *tally.entry(image.status().as_str_name()).or_default() += 1;
        }
        tally
    }
}

/// What the database tells.
impl Model {
    pub(super) fn created(&mut self, record: &JobRecord) {
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
    pub(super) fn unsure(&mut self, lease: LeaseKey) {
        self.unsure.insert(lease);
    }

    pub(super) fn applied(
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
            (Transition::Expire { lease }, _) => self.ended(*lease, "it expired"),
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

    fn shard(&mut self, id: &str) -> &mut Shard {
        self.shards.entry(id.to_owned()).or_default()
    }

    fn granted(&mut self, lease: LeaseKey, worker: &str, attempt: u32) {
        let id = lease.shard.to_string();
        self.note(format!("store: {} to {worker}, attempt {attempt}", label(lease)));
        let shard = self.shard(&id);
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
        self.check(current == Some(lease.token), || {
            format!("{lease} was accepted, but the current lease is {current:?}")
        });
        self.check(earlier.is_none(), || {
            format!("{lease} was accepted after token {earlier:?} of the same shard")
        });
        for image in images {
            if image.status() == ImageStatus::Released {
                self.released(job, lease.token, image);
            } else {
                let record = self.stored_record(&job.job_id, image.index, lease.token);
                self.check(record.is_some(), || {
                    format!("image {} of {} is withheld and has no record", image.index, job.job_id)
                });
            }
        }
    }

    /// An image is about to be released: all that must be true before.
    fn released(&mut self, job: &v1::Job, token: u64, image: &ImageInfo) {
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
            let asked = (sha256_hex(&png), concept.name.clone());
            let cleared = self.cleared.contains(&asked);
            self.check(cleared, || {
                format!("{name} is released, but no node cleared it of `{}`", concept.name)
            });
        }
    }

    fn check_bytes(&mut self, name: &str, job: &v1::Job, image: &ImageInfo, png: &[u8]) {
        let spec = job.spec.clone().unwrap_or_default();
        let right = png == truth::png(&spec, image.seed);
        self.check(right, || format!("{name} has other bytes than its seed says"));
        let hash = sha256_hex(png);
        self.check(hash == image.image_sha256, || format!("{name} has other bytes than its hash"));
        for concept in job.policy.iter().flat_map(|policy| &policy.concepts) {
            let shown = truth::shows(&concept.name, png);
            self.check(!shown, || format!("{name} is released and shows `{}`", concept.name));
        }
    }

    fn check_record(&mut self, name: &str, image: &ImageInfo, record: &v1::SafetyRecord) {
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

/// What workers and nodes tell.
impl Model {
    /// A node is registered.
    pub(super) fn registered(&mut self, node: &v1::NodeInfo) {
        let now = self.time.elapsed();
        for concept in node.concepts.iter().filter_map(|info| info.concept.as_ref()) {
            self.served.entry(concept.name.clone()).or_insert(now);
        }
    }

    /// A node answers a coordinator.
    pub(super) fn judged(&mut self, node: &str, png: &[u8], concept: &str, flagged: bool) {
        let hash = sha256_hex(png);
        let verdict = if flagged { "sees" } else { "does not see" };
        self.note(format!("{node}: {verdict} `{concept}` in {}", short(&hash)));
        if !flagged {
            self.cleared.insert((hash, concept.to_owned()));
        }
    }

    /// A worker was answered about its commit.
    pub(super) fn commit_reply(&mut self, worker: &str, lease: LeaseKey, reply: &v1::CommitReply) {
        let status = reply.status();
        self.note(format!("{worker}: {} {} {}", label(lease), status.as_str_name(), reply.reason));
        let accepted = self.shard(&lease.shard.to_string()).accepted == Some(lease.token);
        match status {
            CommitStatus::Accepted => {
                self.check(accepted, || format!("{worker} was told that {lease} is accepted"));
            }
            _ => {
                let known = accepted && !self.unsure.contains(&lease);
                self.check(!known, || {
                    format!("{worker} was told that {lease} is aborted ({})", reply.reason)
                });
            }
        }
    }
}

/// What clients see.
impl Model {
    /// A submission was accepted.
    pub(super) fn accepted(&mut self, key: &str, job: &v1::Job) {
        self.note(format!("client: job {} under `{key}`", short(&job.job_id)));
        let known = self.jobs.contains_key(&job.job_id);
        self.check(known, || format!("job {} was accepted and not stored", job.job_id));
        let first = self.keys.entry(key.to_owned()).or_insert(job.job_id.clone()).clone();
        self.check(first == job.job_id, || {
            format!("key `{key}` led to job {first}, then to {}", job.job_id)
        });
        self.seen(job);
    }

    /// A client saw a state of a job.
    pub(super) fn seen(&mut self, job: &v1::Job) {
        let Some(Job { last, .. }) = self.jobs.get(&job.job_id) else {
            return self.broken(format!("job {} was seen and never created", job.job_id));
        };
        let holds = !is_over(job) || last == job;
        self.check(holds, || format!("job {} was seen to end otherwise than it did", job.job_id));
    }

    /// A watcher at `cursor` got `message`; returns where it is now.
    pub(super) fn watched(&mut self, job: &str, cursor: u64, message: &WatchJobResponse) -> u64 {
        let number = message.sequence;
        if let Some(Event::Progress(step)) = &message.event {
            self.check(number == cursor, || {
                format!("job {job}: progress numbered {number} came after event {cursor}")
            });
            self.check_preview(job, step);
            return cursor;
        }
        self.check(number == cursor + 1, || {
            format!("job {job}: event {number} came after event {cursor}")
        });
        let before = self.events.entry((job.to_owned(), number)).or_insert(message.clone());
        let same = before == message;
        self.check(same, || format!("job {job}: event {number} is not always the same"));
        if let Some(Event::Job(job)) = &message.event {
            self.seen(job);
        }
        number
    }

    /// A preview is output too.
    fn check_preview(&mut self, job: &str, step: &v1::StepProgress) {
        let Some(Job { last, .. }) = self.jobs.get(job).filter(|_| !step.preview_png.is_empty())
        else {
            return;
        };
        let mut concepts = last.policy.iter().flat_map(|policy| &policy.concepts);
        let closed = concepts.all(|concept| {
            let mut scores = step.scores.iter();
            scores.any(|score| score.concept == concept.name && !score.open)
        });
        let wanted = last.spec.as_ref().is_some_and(|spec| spec.previews);
        self.check(closed && wanted, || format!("job {job} showed a preview that it must not"));
    }

    /// A client was given an image.
    pub(super) fn fetched(&mut self, job_id: &str, index: u32, answer: &v1::GetImageResponse) {
        let Some(Job { last: job, .. }) = self.jobs.get(job_id) else { return };
        let job = job.clone();
        let Some(image) = job.images.get(index as usize) else { return };
        let name = format!("fetched image {index} of job {job_id}");
        let released = image.status() == ImageStatus::Released;
        self.check(released, || format!("{name} is {}", image.status().as_str_name()));
        self.check_bytes(&name, &job, image, &answer.png);
    }

    /// A client was given a record.
    pub(super) fn record(&mut self, job_id: &str, index: u32, record: &v1::SafetyRecord) {
        let Some(Job { last: job, .. }) = self.jobs.get(job_id) else { return };
        let job = job.clone();
        let Some(image) = job.images.get(index as usize) else { return };
        self.check_record(&format!("fetched image {index} of job {job_id}"), image, record);
    }

    /// A cancel was acknowledged with this state.
    pub(super) fn cancelled(&mut self, job: &v1::Job) {
        self.note(format!("client: cancel of {} acknowledged", short(&job.job_id)));
        let over = is_over(job);
        self.check(over, || format!("cancelled job {} goes on", job.job_id));
        self.seen(job);
    }

    /// Everything was healed `patience` ago, and something goes on.
    pub(super) fn late(&mut self, patience: Duration) {
        let open = self.open_jobs();
        self.broken(format!(
            "{patience:?} after everything was healed, clients wait; open: {open:?}"
        ));
    }
}

fn label(lease: LeaseKey) -> String {
    format!("shard {} token {}", short(&lease.shard.to_string()), lease.token)
}
