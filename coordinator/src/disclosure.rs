//! What a tenant is told that may not see scores.
//!
//! How near an image came to a gate is what a search for a way around it feeds on. So everything that is
//! handed to clients passes here: jobs, events and records. What remains of scores are the names of the
//! concepts for which an image was withheld, which says why and not how nearly.

use std::collections::BTreeSet;

use fairlead_common::signature::Signer;
use fairlead_proto::v1::{self, watch_job_response::Event};

use crate::tenants::Tenant;

impl Tenant {
    /// A job, as this tenant may see it.
    pub(crate) fn job(&self, mut job: v1::Job) -> v1::Job {
        if !self.sees_scores {
            hide_job(&mut job);
        }
        job
    }

    /// An event of a job.
    pub(crate) fn event(&self, mut message: v1::WatchJobResponse) -> v1::WatchJobResponse {
        if self.sees_scores {
            return message;
        }
        match &mut message.event {
            Some(Event::Job(job)) => hide_job(job),
            Some(Event::Image(image)) => hide_image(image),
            Some(Event::Progress(step)) => hide_step(step),
            None => {}
        }
        message
    }

    /// A safety record. One without its scores is signed anew: its first signature would not fit it.
    pub(crate) fn safety_record(
        &self,
        mut record: v1::SafetyRecord,
        signer: &Signer,
    ) -> v1::GetRecordResponse {
        if self.sees_scores {
            return v1::GetRecordResponse { record: Some(record), reduced: false };
        }
        hide_record(&mut record);
        signer.sign(&mut record);
        v1::GetRecordResponse { record: Some(record), reduced: true }
    }
}

// Every field is named below, so that whoever adds one decides about it here.

/// A record keeps nothing that tells how near the image came to a gate.
fn hide_record(record: &mut v1::SafetyRecord) {
    let v1::SafetyRecord {
        record_id: _,
        job_id: _,
        index: _,
        status: _,
        policy,
        model: _,
        model_hash: _,
        sampler: _,
        steps: _,
        guidance_scale: _,
        width: _,
        height: _,
        seed: _,
        prompt: _,
        negative_prompt: _,
        final_scores,
        image_sha256: _,
        pixels_sha256: _,
        energy_nodes: _,
        calibrations: _,
        worker_id: _,
        finished_unix_ms: _,
        reported_by_worker,
        withheld_by_worker: _,
        // It is signed anew.
        signature: _,
    } = record;
    policy.iter_mut().for_each(hide_policy);
    *final_scores = found(final_scores);
    reported_by_worker.iter_mut().for_each(hide_report);
}

fn hide_report(report: &mut v1::WorkerReport) {
    let v1::WorkerReport {
        trajectory,
        final_scores,
        // Both tell how often an image was corrected.
        reruns,
        engine_ms,
        steered: _,
        energy_nodes: _,
        calibrations: _,
    } = report;
    trajectory.clear();
    *final_scores = found(final_scores);
    (*reruns, *engine_ms) = (0, 0);
}

fn hide_policy(policy: &mut v1::PinnedPolicy) {
    let v1::PinnedPolicy {
        name: _,
        concepts: _,
        steering: _,
        allow_calibration_fallback: _,
        observe_only: _,
        weights: _,
        outside_envelope: _,
        // What a search has to stay below.
        levels,
        checks: _,
    } = policy;
    levels.clear();
}

fn hide_job(job: &mut v1::Job) {
    let v1::Job {
        job_id: _,
        spec: _,
        policy,
        state: _,
        reason: _,
        images,
        created_unix_ms: _,
        updated_unix_ms: _,
        notices: _,
    } = job;
    images.iter_mut().for_each(hide_image);
    policy.iter_mut().for_each(hide_policy);
}

fn hide_image(image: &mut v1::ImageInfo) {
    let v1::ImageInfo {
        index: _,
        seed: _,
        status: _,
        record_id: _,
        image_sha256: _,
        final_scores,
        steered: _,
    } = image;
    *final_scores = found(final_scores);
}

fn hide_step(step: &mut v1::StepProgress) {
    let v1::StepProgress {
        index: _,
        step: _,
        steps: _,
        scores,
        correction,
        preview_png: _,
        attempt: _,
    } = step;
    scores.clear();
    *correction = 0.0;
}

/// The concepts that were found, each once, without any number.
fn found(scores: &[v1::ConceptScore]) -> Vec<v1::ConceptScore> {
    let names: BTreeSet<&str> =
        scores.iter().filter(|score| score.open).map(|score| score.concept.as_str()).collect();
    let name = |name: &str| v1::ConceptScore {
        concept: name.to_owned(),
        open: true,
        ..Default::default()
    };
    names.into_iter().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_common::{record, signature};

    fn score(concept: &str, energy: &str, open: bool) -> v1::ConceptScore {
        v1::ConceptScore {
            concept: concept.into(),
            energy: energy.into(),
            score: 0.625,
            z: 7.25,
            gate: 3.5,
            open,
        }
    }

    fn scores() -> Vec<v1::ConceptScore> {
        vec![score("axe", "a", true), score("axe", "b", true), score("bomb", "a", false)]
    }

    fn image() -> v1::ImageInfo {
        v1::ImageInfo { final_scores: scores(), ..Default::default() }
    }

    fn policy() -> v1::PinnedPolicy {
        let level = v1::PinnedLevel { threshold: 0.375, ..Default::default() };
        v1::PinnedPolicy { levels: vec![level], ..Default::default() }
    }

    fn tenant(sees_scores: bool) -> Tenant {
        Tenant { sees_scores, ..Tenant::everyone() }
    }

    /// Everything that clients are told, with scores wherever there can be some.
    fn told(
        tenant: &Tenant,
        signer: &Signer,
    ) -> (v1::Job, [v1::WatchJobResponse; 3], v1::GetRecordResponse) {
        let job =
            || v1::Job { images: vec![image()], policy: Some(policy()), ..Default::default() };
        let step = v1::StepProgress { scores: scores(), correction: 0.5, ..Default::default() };
        let events = [Event::Job(job()), Event::Image(image()), Event::Progress(step)];
        let event = |event| v1::WatchJobResponse { sequence: 1, event: Some(event) };
        let step = v1::StepRecord { scores: scores(), correction: 0.5, ..Default::default() };
        let mut record = v1::SafetyRecord {
            reported_by_worker: Some(v1::WorkerReport {
                trajectory: vec![step],
                final_scores: scores(),
                reruns: 1,
                engine_ms: 400,
                ..Default::default()
            }),
            final_scores: scores(),
            policy: Some(policy()),
            prompt: "a cat".into(),
            ..Default::default()
        };
        signer.sign(&mut record);
        let events = events.map(|kind| tenant.event(event(kind)));
        (tenant.job(job()), events, tenant.safety_record(record, signer))
    }

    #[test]
    fn scores_are_for_those_who_may_see_them() {
        let (job, events, response) = told(&tenant(true), &Signer::generate());
        assert_eq!(job.images[0], image());
        assert_eq!(events[1].event, Some(Event::Image(image())));
        let record = response.record.expect("a record");
        assert!(!response.reduced && record.signature.is_some());
        assert_eq!(record::reported(&record).trajectory.len(), 1);
        assert_eq!(record.final_scores, scores());
    }

    #[test]
    fn others_are_told_what_was_found_and_no_number() {
        let signer = Signer::generate();
        let (job, events, response) = told(&tenant(false), &signer);
        let axe = v1::ConceptScore { concept: "axe".into(), open: true, ..Default::default() };
        let named = [axe];
        assert_eq!(job.images[0].final_scores, named);
        let record = response.record.expect("a record");
        assert!(response.reduced && record::reported(&record).trajectory.is_empty());
        signature::verify(&record, &[signer.public()]).expect("it vouches for what is left");
        assert_eq!((record.final_scores.as_slice(), record.prompt.as_str()), (&named[..], "a cat"));
        let unsigned = v1::SafetyRecord { signature: None, ..record };
        let text = format!("{job:?} {events:?} {}", record::to_json(&unsigned));
        for number in ["0.625", "7.25", "3.5", "0.5", "400", "0.375"] {
            assert!(!text.contains(number), "{number}: {text}");
        }
    }
}
