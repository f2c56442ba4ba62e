//! Why a job waits, told to who waits for it.

use std::{
    cell::Cell,
    convert::Infallible,
    time::{Duration, Instant},
};

use anyhow::Result;
use fairlead_proto::v1::{ConceptRef, Job, JobState, ModelInfo, ServedConcept};

use crate::{client::Client, progress::JobProgress};

/// Nothing heard of a job for so long asks for a reason.
const QUIET: Duration = Duration::from_secs(5);

/// When a step of a job was last heard of.
#[derive(Debug, Default)]
pub(crate) struct Heard(Cell<Option<Instant>>);

impl Heard {
    /// There was a step.
    pub(crate) fn step(&self) {
        self.0.set(Some(Instant::now()));
    }

    fn is_fresh(&self) -> bool {
        self.0.get().is_some_and(|at| at.elapsed() < QUIET)
    }
}

/// Says why `job` waits whenever nothing was heard of it for a while and there is something new to say.
pub(crate) async fn tell_why(
    client: &Client,
    job: &Job,
    heard: &Heard,
    progress: &JobProgress,
) -> Infallible {
    let mut told = Told::default();
    loop {
        tokio::time::sleep(QUIET).await;
        if heard.is_fresh() && told.0.is_empty() {
            continue;
        }
        // Who cannot be asked now is told of by whoever follows the job.
        let Ok(reason) = reason(client, &job.job_id, heard).await else { continue };
        if let Some(news) = told.news(reason, heard.is_fresh()) {
            progress.say(&format!("job {} {news}", job.job_id));
        }
    }
}

/// What was said last and holds still.
#[derive(Debug, Default)]
struct Told(String);

impl Told {
    /// What is to be said of `reason`, which may be empty: nothing twice while it holds, and nothing of a
    /// job whose steps are heard.
    fn news(&mut self, reason: String, is_fresh: bool) -> Option<&str> {
        if reason == self.0 {
            return None;
        }
        self.0 = if is_fresh { String::new() } else { reason };
        (!self.0.is_empty()).then_some(self.0.as_str())
    }
}

async fn reason(client: &Client, job_id: &str, heard: &Heard) -> Result<String> {
    let job = client.job(job_id).await?;
    let obstacle = obstacle(&job, &client.models().await?, &client.concepts().await?);
    let has_stepped = heard.0.get().is_some();
    let stands = match has_stepped {
        false => "was begun and has made no step yet",
        true => "has made no step for a while",
    };
    Ok(match (job.state(), obstacle) {
        (JobState::Queued, Some(obstacle)) => format!("waits: {obstacle}"),
        (JobState::Queued, None) => "waits for its turn".to_owned(),
        // It may be made by a worker that is told to stop, or by nobody since one was lost.
        (JobState::Running, Some(obstacle)) => format!("{stands}, and {obstacle}"),
        (JobState::Running, None) if !has_stepped => stands.to_owned(),
        // A step may take long.
        _ => String::new(),
    })
}

/// What keeps `job` from being made, as far as the catalog tells.
fn obstacle(job: &Job, models: &[ModelInfo], concepts: &[ServedConcept]) -> Option<String> {
    let model = job.spec.as_ref().map_or("", |spec| &spec.model);
    if models.iter().all(|attached| attached.name != model) {
        return Some(format!("no worker takes new work for `{model}`"));
    }
    let is_served = |pinned: &ConceptRef| {
        let mut served = concepts.iter().filter(|served| !served.nodes.is_empty());
        served.any(|served| {
            served.concept.as_ref().and_then(|info| info.concept.as_ref()) == Some(pinned)
        })
    };
    let pinned = job.policy.iter().flat_map(|policy| &policy.concepts);
    let gone: Vec<&ConceptRef> = pinned.filter(|pinned| !is_served(pinned)).collect();
    let ConceptRef { name, version, energy } = *gone.first()?;
    let more = match gone.len() - 1 {
        0 => String::new(),
        more => format!(", nor {more} more"),
    };
    Some(format!("no live energy node with {energy} serves `{name}` in version {version}{more}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::{ConceptInfo, JobSpec, PinnedPolicy, ServingNode};

    fn concept(name: &str, version: &str, energy: &str) -> ConceptRef {
        ConceptRef { name: name.into(), version: version.into(), energy: energy.into() }
    }

    fn served(concept: ConceptRef, nodes: usize) -> ServedConcept {
        let info = ConceptInfo { concept: Some(concept), ..Default::default() };
        ServedConcept { concept: Some(info), nodes: vec![ServingNode::default(); nodes] }
    }

    #[test]
    fn a_reason_is_said_once_until_it_ends() {
        let mut told = Told::default();
        let mut says =
            |reason: &str, is_fresh| told.news(reason.into(), is_fresh).map(str::to_owned);
        assert_eq!(says("", false), None);
        assert_eq!(says("no worker", false).as_deref(), Some("no worker"));
        assert_eq!(says("no worker", false), None);
        assert_eq!(says("no node", false).as_deref(), Some("no node"));
        // A slow worker makes the last steps it will.
        assert_eq!(says("no node", true), None);
        assert_eq!(says("no node", false), None);
        // The reason was gone in between.
        assert_eq!(says("", true), None);
        assert_eq!(says("no node", false).as_deref(), Some("no node"));
        assert_eq!(says("no worker", true), None);
        assert_eq!(says("no worker", false).as_deref(), Some("no worker"));
    }

    #[test]
    fn a_job_waits_for_a_worker_and_for_the_very_concepts_of_its_policy() {
        let (axe, bomb) = (concept("axe", "v1", "clip"), concept("bomb", "v1", "clip"));
        let job = Job {
            spec: Some(JobSpec { model: "sd".into(), ..Default::default() }),
            policy: Some(PinnedPolicy {
                concepts: vec![axe.clone(), bomb.clone()],
                ..Default::default()
            }),
            ..Default::default()
        };
        let sd = [ModelInfo { name: "sd".into(), ..Default::default() }];
        let both = [served(axe.clone(), 1), served(bomb, 2)];
        assert_eq!(obstacle(&job, &sd, &both), None);
        let other = [ModelInfo { name: "flux".into(), ..Default::default() }];
        let waits = |models, concepts| obstacle(&job, models, concepts).expect("it cannot be made");
        assert_eq!(waits(&other, &both), "no worker takes new work for `sd`");
        // The same name in another version or by another energy is another concept; nobody is there for
        // one that only was served.
        let others = [
            served(axe, 1),
            served(concept("bomb", "v2", "clip"), 1),
            served(concept("bomb", "v1", "siglip"), 1),
            served(concept("bomb", "v1", "clip"), 0),
        ];
        let text = waits(&sd, &others);
        assert_eq!(text, "no live energy node with clip serves `bomb` in version v1");
        let text = waits(&sd, &[]);
        assert_eq!(text, "no live energy node with clip serves `axe` in version v1, nor 1 more");
    }
}
