//! What everybody else tells: workers and nodes, and clients.

use fairlead_common::picture::sha256;
use fairlead_proto::v1::{
    self, CommitStatus, ImageStatus, WatchJobResponse, watch_job_response::Event,
};

use super::{Job, Model, is_over, label, short};
use crate::{lease::LeaseKey, simulation::truth};

/// What workers and nodes tell.
impl Model {
    /// A node is registered.
    pub(in crate::simulation) fn registered(&mut self, node: &v1::NodeInfo) {
        let now = self.time.elapsed();
        for concept in node.concepts.iter().filter_map(|info| info.concept.as_ref()) {
            self.served.entry(concept.name.clone()).or_insert(now);
        }
    }

    /// A node answers a coordinator.
    pub(in crate::simulation) fn judged(
        &mut self,
        node: &str,
        png: &[u8],
        concept: &str,
        flagged: bool,
    ) {
        let hash = sha256(png);
        let verdict = if flagged { "sees" } else { "does not see" };
        self.note(format!("{node}: {verdict} `{concept}` in {}", short(&hash)));
        if !flagged {
            self.cleared.insert((hash, concept.to_owned()), self.time.elapsed());
        }
    }

    /// A worker was answered about its commit.
    pub(in crate::simulation) fn commit_reply(
        &mut self,
        worker: &str,
        lease: LeaseKey,
        reply: &v1::CommitReply,
    ) {
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
    pub(in crate::simulation) fn accepted(&mut self, key: &str, job: &v1::Job) {
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
    pub(in crate::simulation) fn seen(&mut self, job: &v1::Job) {
        let Some(Job { last, .. }) = self.jobs.get(&job.job_id) else {
            return self.broken(format!("job {} was seen and never created", job.job_id));
        };
        let holds = !is_over(job) || last == job;
        self.check(holds, || format!("job {} was seen to end otherwise than it did", job.job_id));
    }

    /// A watcher at `cursor` got `message`; returns where it is now.
    pub(in crate::simulation) fn watched(
        &mut self,
        job: &str,
        cursor: u64,
        message: &WatchJobResponse,
    ) -> u64 {
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
        let pixels = truth::decode(&step.preview_png);
        let mut concepts = last.policy.iter().flat_map(|policy| &policy.concepts);
        let closed = !concepts.any(|concept| truth::shows(&concept.name, &pixels));
        let wanted = last.spec.as_ref().is_some_and(|spec| spec.previews);
        self.check(closed && wanted, || format!("job {job} showed a preview that it must not"));
    }

    /// A client was given an image.
    pub(in crate::simulation) fn fetched(
        &mut self,
        job_id: &str,
        index: u32,
        answer: &v1::GetImageResponse,
    ) {
        let Some(Job { last: job, .. }) = self.jobs.get(job_id) else { return };
        let job = job.clone();
        let Some(image) = job.images.get(index as usize) else { return };
        let name = format!("fetched image {index} of job {job_id}");
        let released = image.status() == ImageStatus::Released;
        self.check(released, || format!("{name} is {}", image.status().as_str_name()));
        self.check_bytes(&name, &job, image, &answer.png);
    }

    /// A client was given a record.
    pub(in crate::simulation) fn record(
        &mut self,
        job_id: &str,
        index: u32,
        record: &v1::SafetyRecord,
    ) {
        let Some(Job { last: job, .. }) = self.jobs.get(job_id) else { return };
        let job = job.clone();
        let Some(image) = job.images.get(index as usize) else { return };
        self.check_record(&format!("fetched image {index} of job {job_id}"), image, record);
    }

    /// A cancel was acknowledged with this state.
    pub(in crate::simulation) fn cancelled(&mut self, job: &v1::Job) {
        self.note(format!("client: cancel of {} acknowledged", short(&job.job_id)));
        let over = is_over(job);
        self.check(over, || format!("cancelled job {} goes on", job.job_id));
        self.seen(job);
    }
}
