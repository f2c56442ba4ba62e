//! What the coordinator counts; `fairlead_common::metrics` shows it.

use std::{collections::BTreeSet, time::Duration};

use fairlead_proto::v1;
use metrics::{counter, gauge, histogram};

use crate::{clock::unix_ms, state::JobRecord};

/// What the dispatcher sees in one round.
pub(crate) struct Round {
    /// Shards that wait for a worker.
    pub(crate) queued: usize,
    /// Shards that workers hold.
    pub(crate) running: usize,
    /// Attached workers.
    pub(crate) workers: usize,
    /// Registered energy nodes.
    pub(crate) nodes: usize,
}

pub(crate) fn round(round: &Round) {
    gauge!("fairlead_coordinator_shards_queued").set(round.queued as f64);
    gauge!("fairlead_coordinator_shards_running").set(round.running as f64);
    gauge!("fairlead_coordinator_workers").set(round.workers as f64);
    gauge!("fairlead_coordinator_energy_nodes").set(round.nodes as f64);
}

/// Whether the coordinator can store what it is told.
pub(crate) fn sound(is_sound: bool) {
    gauge!("fairlead_coordinator_serving").set(f64::from(u8::from(is_sound)));
}

/// The store's clock was set while this process ran.
pub(crate) fn clock_set() {
    counter!("fairlead_coordinator_clock_jumps_total").increment(1);
}

/// A stored job could not be read.
pub(crate) fn unreadable() {
    counter!("fairlead_coordinator_unreadable_jobs_total").increment(1);
}

/// A policies file could not be used.
pub(crate) fn reload_failed() {
    counter!("fairlead_coordinator_reload_failures_total").increment(1);
}

/// A job was not admitted because a bound is reached.
pub(crate) fn refused() {
    counter!("fairlead_coordinator_jobs_refused_total").increment(1);
}

pub(crate) fn admitted() {
    counter!("fairlead_coordinator_jobs_admitted_total").increment(1);
}

/// A job has just come to its end.
pub(crate) fn ended(record: &JobRecord) {
    let state = record.job.state().as_str_name().trim_start_matches("JOB_STATE_").to_lowercase();
    counter!("fairlead_coordinator_jobs_total", "state" => state).increment(1);
    let took = unix_ms().saturating_sub(record.job.created_unix_ms).max(0);
    histogram!("fairlead_coordinator_job_seconds").record(took as f64 / 1000.0);
}

/// A delivery's images were accepted.
pub(crate) fn committed(images: &[v1::ImageInfo]) {
    delivery("committed");
    for image in images {
        let status = match image.status() {
            v1::ImageStatus::Released => "released",
            _ => "withheld",
        };
        counter!("fairlead_coordinator_images_total", "status" => status).increment(1);
    }
}

/// Images of a job under `policy` were withheld: by the concepts that were found, of those that the policy
/// names, since only these are known.
pub(crate) fn withheld(policy: &v1::PinnedPolicy, images: &[&v1::ImageInfo]) {
    for image in images {
        let open = image.final_scores.iter().filter(|score| score.open);
        let found: BTreeSet<&str> = open.map(|score| score.concept.as_str()).collect();
        let pinned: BTreeSet<&str> = policy.concepts.iter().map(|c| c.name.as_str()).collect();
        for concept in found.intersection(&pinned) {
            let concept = (*concept).to_owned();
            counter!("fairlead_coordinator_withheld_total", "concept" => concept).increment(1);
        }
    }
}

/// A tenant has had as many images withheld as it may in a minute.
pub(crate) fn withheld_bound_reached() {
    counter!("fairlead_coordinator_withheld_bounds_reached_total").increment(1);
}

/// A delivery ended: committed, failed or expired; or its result was refused, because it had ended
/// before.
pub(crate) fn delivery(outcome: &'static str) {
    counter!("fairlead_coordinator_deliveries_total", "outcome" => outcome).increment(1);
}

/// A preview was shown, or left out.
pub(crate) fn preview(is_shown: bool) {
    let outcome = if is_shown { "shown" } else { "left out" };
    counter!("fairlead_coordinator_previews_total", "outcome" => outcome).increment(1);
}

/// Energy nodes contradict each other, or one what a job was admitted with.
pub(crate) fn disagreement() {
    counter!("fairlead_coordinator_node_disagreements_total").increment(1);
}

/// A stored image or record that is not what the coordinator signed was not handed out.
pub(crate) fn damaged() {
    counter!("fairlead_coordinator_damaged_outputs_total").increment(1);
}

/// A final check of one image by one node; an error is one without an answer.
pub(crate) fn check(took: Duration, is_answered: bool) {
    histogram!("fairlead_coordinator_check_seconds").record(took);
    if !is_answered {
        counter!("fairlead_coordinator_check_failures_total").increment(1);
    }
}
