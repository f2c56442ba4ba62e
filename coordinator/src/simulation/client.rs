//! Simulated clients: each submits jobs, sometimes twice, watches them across broken streams, cancels some,
//! and fetches everything that came out.

use std::{sync::Arc, time::Duration};

use fairlead_proto::v1::{
    self, ImageStatus, JobSpec, JobState, generation_service_client::GenerationServiceClient,
    watch_job_response::Event,
};
use futures::future::join_all;
use rand::{Rng, rngs::StdRng};
use tonic::{Code, Status, transport::Channel};

use super::{model::short, world::World};

/// Jobs of one client.
const JOBS: u64 = 8;

/// The life of one client; it ends when all its jobs have.
pub(super) async fn run(world: Arc<World>, host: &'static str) -> turmoil::Result {
    let jobs = (0..JOBS).map(|number| {
        let rng = world.rng(host);
        Client { world: Arc::clone(&world), host, rng }.job(number)
    });
    join_all(jobs).await;
    Ok(())
}

/// What became of a call.
enum Outcome<T> {
    Done(T),
    /// It may be tried again.
    Again,
    Refused(Status),
}

struct Client {
    world: Arc<World>,
    host: &'static str,
    rng: StdRng,
}

impl Client {
    fn coordinator(&mut self) -> GenerationServiceClient<Channel> {
        GenerationServiceClient::new(self.world.any_coordinator(&mut self.rng))
    }

    async fn pause(&mut self, ms: std::ops::Range<u64>) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(ms))).await;
    }

    fn sort<T>(&self, call: &str, answer: Result<T, Status>) -> Outcome<T> {
        match answer {
            Ok(answer) => Outcome::Done(answer),
            Err(status) => match status.code() {
                Code::Unavailable
                | Code::DeadlineExceeded
                | Code::Cancelled
                | Code::ResourceExhausted
                | Code::Unknown => Outcome::Again,
                Code::Internal if status.message().contains("h2 protocol error") => Outcome::Again,
                Code::Internal | Code::DataLoss => {
                    self.world.model.lock().broken(format!("{}: {call}: {status}", self.host));
                    Outcome::Refused(status)
                }
                _ => Outcome::Refused(status),
            },
        }
    }

    /// One job from its submission to its last image.
    async fn job(mut self, number: u64) {
        self.pause(0..40_000).await;
        let spec = self.spec(number);
        let key = format!("{}-{number}", self.host);
        let job = self.submit(&spec, &key).await;
        if self.rng.random_bool(0.2) {
            self.reuse_key(&spec, &key, &job).await;
        }
        match self.rng.random_bool(0.2) {
            true => {
                let mut canceller = Client {
                    world: Arc::clone(&self.world),
                    host: self.host,
                    rng: self.rng.clone(),
                };
                let id = job.job_id.clone();
                tokio::join!(self.watch(&job.job_id), canceller.cancel(&id));
            }
            false => self.watch(&job.job_id).await,
        }
        self.collect(&job.job_id).await;
    }

    fn spec(&mut self, number: u64) -> JobSpec {
        JobSpec {
            prompt: format!("picture {number} of {}", self.host),
            n: self.rng.random_range(1..=6),
            max_shard_size: self.rng.random_range(1..=3),
            seed: Some(self.rng.random()),
            priority: self.rng.random_range(0..=3),
            previews: self.rng.random_bool(0.5),
            ..Default::default()
        }
    }

    async fn submit(&mut self, spec: &JobSpec, key: &str) -> v1::Job {
        // An answer that was lost is asked for again, and now and then one that was not.
        let mut again = self.rng.random_range(1..=2);
        loop {
            let request =
                v1::SubmitJobRequest { spec: Some(spec.clone()), idempotency_key: key.to_owned() };
            let answer = self.coordinator().submit_job(request).await;
            match self.sort("submit", answer) {
                Outcome::Done(answer) => {
                    let job = answer.into_inner().job.expect("an answer has a job");
                    self.world.model.lock().accepted(key, &job);
                    again -= 1;
                    if again == 0 {
                        return job;
                    }
                }
                Outcome::Again => {}
                // Nobody has registered yet.
                Outcome::Refused(status) => self.world.note(format!("{}: {status}", self.host)),
            }
            self.pause(100..1_500).await;
        }
    }

    /// The same key for another request.
    async fn reuse_key(&mut self, spec: &JobSpec, key: &str, job: &v1::Job) {
        let other = JobSpec { prompt: "something else".into(), ..spec.clone() };
        let request = v1::SubmitJobRequest { spec: Some(other), idempotency_key: key.to_owned() };
        let answer = self.coordinator().submit_job(request).await;
        match self.sort("submit", answer) {
            Outcome::Done(_) => {
                let problem = format!("key `{key}` of job {} made another job", job.job_id);
                self.world.model.lock().broken(problem);
            }
            Outcome::Again => {}
            Outcome::Refused(status) if status.code() == Code::AlreadyExists => {}
            Outcome::Refused(status) => {
                self.world.model.lock().broken(format!("key `{key}` used twice: {status}"));
            }
        }
    }

    async fn cancel(&mut self, job_id: &str) {
        self.pause(0..6_000).await;
        loop {
            let request = v1::CancelJobRequest { job_id: job_id.to_owned() };
            let answer = self.coordinator().cancel_job(request).await;
            match self.sort("cancel", answer) {
                Outcome::Done(answer) => {
                    let job = answer.into_inner().job.expect("an answer has a job");
                    return self.world.model.lock().cancelled(&job);
                }
                Outcome::Again => {}
                Outcome::Refused(status) => {
                    let problem = format!("job {job_id} cannot be cancelled: {status}");
                    return self.world.model.lock().broken(problem);
                }
            }
            self.pause(100..1_500).await;
        }
    }

    /// Follows a job to its end, over as many streams as it takes.
    async fn watch(&mut self, job_id: &str) {
        let mut cursor = 0;
        while !self.watch_once(job_id, &mut cursor).await {
            self.pause(50..1_000).await;
        }
        self.world.note(format!("{}: job {} has ended", self.host, short(job_id)));
    }

    /// Whether the job's end was seen.
    async fn watch_once(&mut self, job_id: &str, cursor: &mut u64) -> bool {
        let request = v1::WatchJobRequest { job_id: job_id.to_owned(), after_sequence: *cursor };
        let answer = self.coordinator().watch_job(request).await;
        let mut events = match self.sort("watch", answer) {
            Outcome::Done(answer) => answer.into_inner(),
            Outcome::Again => return false,
            Outcome::Refused(status) => {
                let problem = format!("job {job_id} cannot be watched: {status}");
                self.world.model.lock().broken(problem);
                return true;
            }
        };
        // A stream may go silent for ever if its packets are lost and nobody notices: look again.
        let patience = Duration::from_millis(self.rng.random_range(2_000..40_000));
        while let Ok(Ok(Some(message))) = tokio::time::timeout(patience, events.message()).await {
            *cursor = self.world.model.lock().watched(job_id, *cursor, &message);
            match message.event {
                Some(Event::Job(job)) if is_over(&job) => return true,
                Some(Event::Image(image)) => self.look(job_id, &image).await,
                _ => {}
            }
        }
        false
    }

    /// Fetches an image as soon as it is known to be released.
    async fn look(&mut self, job_id: &str, image: &v1::ImageInfo) {
        if image.status() == ImageStatus::Released && self.rng.random_bool(0.5) {
            self.fetch(job_id, image.index).await;
        }
    }

    /// One try to fetch an image and its record. Whether both came, or never will.
    async fn fetch(&mut self, job_id: &str, index: u32) -> bool {
        let request = v1::GetImageRequest { job_id: job_id.to_owned(), index };
        let answer = self.coordinator().get_image(request).await;
        match self.sort("fetch", answer) {
            Outcome::Done(answer) => {
                self.world.model.lock().fetched(job_id, index, answer.get_ref());
            }
            Outcome::Again => return false,
            Outcome::Refused(status) => {
                let problem = format!("image {index} of job {job_id} is released: {status}");
                self.world.model.lock().broken(problem);
            }
        }
        self.fetch_record(job_id, index).await
    }

    async fn fetch_record(&mut self, job_id: &str, index: u32) -> bool {
        let request =
            v1::GetRecordRequest { job_id: job_id.to_owned(), index, ..Default::default() };
        let answer = self.coordinator().get_record(request).await;
        match self.sort("record", answer) {
            Outcome::Done(answer) => {
                let record = answer.into_inner().record.unwrap_or_default();
                self.world.model.lock().record(job_id, index, &record);
            }
            Outcome::Again => return false,
            Outcome::Refused(status) => {
                let problem = format!("image {index} of job {job_id} has no record: {status}");
                self.world.model.lock().broken(problem);
            }
        }
        true
    }

    /// Looks at everything that came out of a job that has ended.
    async fn collect(&mut self, job_id: &str) {
        let job = loop {
            let request = v1::GetJobRequest { job_id: job_id.to_owned() };
            let answer = self.coordinator().get_job(request).await;
            match self.sort("get", answer) {
                Outcome::Done(answer) => break answer.into_inner().job.unwrap_or_default(),
                Outcome::Again => self.pause(100..1_500).await,
                Outcome::Refused(status) => {
                    return self.world.model.lock().broken(format!("job {job_id}: {status}"));
                }
            }
        };
        let over = is_over(&job);
        if !over {
            self.world.model.lock().broken(format!("job {job_id} goes on after its end"));
        }
        self.world.model.lock().seen(&job);
        for image in &job.images {
            match image.status() {
                ImageStatus::Released => {
                    while !self.fetch(job_id, image.index).await {
                        self.pause(100..1_500).await;
                    }
                }
                ImageStatus::Withheld => {
                    while !self.fetch_record(job_id, image.index).await {
                        self.pause(100..1_500).await;
                    }
                }
                _ => {}
            }
            if image.status() != ImageStatus::Released {
                self.must_not_come(job_id, image.index).await;
            }
        }
    }

    /// Tries to fetch an image that was not released.
    async fn must_not_come(&mut self, job_id: &str, index: u32) {
        let request = v1::GetImageRequest { job_id: job_id.to_owned(), index };
        let answer = self.coordinator().get_image(request).await;
        if answer.is_ok() {
            let problem = format!("image {index} of job {job_id} came and is not released");
            self.world.model.lock().broken(problem);
        }
    }
}

fn is_over(job: &v1::Job) -> bool {
    matches!(job.state(), JobState::Completed | JobState::Failed | JobState::Cancelled)
}
