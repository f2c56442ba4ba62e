//! The release gate. The coordinator itself asks a live node of every pinned concept about the
//! exact bytes that would leave; then it stores the safety record, then the image, and only then
//! may the store mark the image released. Whatever goes wrong on the way releases nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fairlead_common::{
    grpc::Channels,
    probe::{Probe, names_asked},
    record,
    signature::Signer,
    trace,
};
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{self, ImageStatus, energy_service_client::EnergyServiceClient},
};
use futures::future::join_all;
use tokio::sync::Semaphore;
use tonic::Code;
use tracing::Instrument;

use crate::{
    admission,
    clock::unix_ms,
    metrics,
    outputs::{Outputs, sha256_hex},
    registry::Registry,
    routing::{self, LiveNode, Unserved},
    state::JobRecord,
    verdict::{self, Question},
};

/// Images that are checked at once, over all shards.
const CONCURRENT_CHECKS: usize = 16;

/// Why an image cannot be released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rejection {
    /// For the job's reason.
    pub(crate) reason: String,
    /// Another delivery may succeed.
    pub(crate) retryable: bool,
}

impl Rejection {
    fn retryable(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), retryable: true }
    }
}

/// A worker's result for one image, as it arrived.
#[derive(Debug)]
pub(crate) struct Proposal {
    /// The job when the shard was handed out.
    pub(crate) job: Arc<JobRecord>,
    /// Token of the delivery.
    pub(crate) token: u64,
    /// The worker that made it.
    pub(crate) worker_id: String,
    /// What it sent.
    pub(crate) outcome: v1::ImageOutcome,
}

/// The answers of all nodes about one image.
#[derive(Debug, Default)]
struct Judgement {
    scores: BTreeMap<Probe, v1::ConceptScore>,
    flagged: bool,
    nodes: BTreeSet<String>,
    calibrations: BTreeSet<String>,
}

/// The release gate; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    registry: Registry,
    outputs: Outputs,
    timeout: Duration,
    permits: Arc<Semaphore>,
    channels: Channels,
    signer: Signer,
}

impl Gate {
    /// Each node has `timeout` to answer about one image; `signer` vouches for what was decided.
    pub(crate) fn new(
        registry: Registry,
        outputs: Outputs,
        channels: Channels,
        timeout: Duration,
        signer: Signer,
    ) -> Self {
        Self {
            registry,
            outputs,
            timeout,
            permits: Arc::new(Semaphore::new(CONCURRENT_CHECKS)),
            channels,
            signer,
        }
    }

    /// Decides about one image and stores its record and, if it may leave, the image. The returned
    /// info is what the store's commit then makes true.
    pub(crate) async fn decide(&self, proposal: Proposal) -> Result<v1::ImageInfo, Rejection> {
        let Proposal { job, token, worker_id, outcome } = proposal;
        let index = outcome.index;
        let (spec, policy) = (job.spec(), job.policy());
        let image = job.job.images.get(index as usize).cloned().unwrap_or_default();
        verdict::accept_outcome(&spec, &policy, &outcome).map_err(|problem| {
            Rejection::retryable(format!("worker {worker_id}, image {index}: {problem}"))
        })?;
        let png = Bytes::from(outcome.png);
        let claimed = outcome.record.unwrap_or_default();
        let proposed = v1::ImageStatus::try_from(outcome.status).unwrap_or_default();
        let judgement = match proposed {
            ImageStatus::Released => {
                let span =
                    tracing::info_span!("release", job = job.job.job_id, image = i64::from(index));
                trace::follow(&span, &job.traceparent);
                Some(self.check(&job, &image, &png, &claimed).instrument(span).await?)
            }
            _ => None,
        };
        let released = judgement.as_ref().is_some_and(|judgement| !judgement.flagged);
        let mut record = assemble(&job, &image, claimed, judgement);
        record.worker_id = worker_id;
        record.finished_unix_ms = unix_ms();
        record.set_status(if released { ImageStatus::Released } else { ImageStatus::Withheld });
        if proposed == ImageStatus::Released {
            record.image_sha256 = sha256_hex(&png);
        }
        self.signer.sign(&mut record);
        let info = v1::ImageInfo {
            status: record.status,
            image_sha256: record.image_sha256.clone(),
            final_scores: record.final_scores.clone(),
            steered: record.steered,
            ..image
        };
        let stored = |error: crate::outputs::OutputError| Rejection::retryable(error.to_string());
        self.outputs.put_record(&record, token).await.map_err(stored)?;
        if released {
            self.outputs.put_image(&job.job.job_id, index, token, png).await.map_err(stored)?;
        }
        Ok(info)
    }

    /// Deletes what a delivery stored for images that were not committed after all.
    pub(crate) async fn discard(&self, job_id: &str, token: u64, images: &[v1::ImageInfo]) {
        for image in images {
            let discarded = self.outputs.discard(job_id, image.index, token).await;
            if let Err(error) = discarded {
                tracing::warn!(%error, job = job_id, image = image.index, "left an object behind");
            }
        }
    }

    /// Asks nodes until every pinned concept has an accepted answer, each failed node replaced by
    /// another replica; fails with the name of a concept that nobody could answer for.
    async fn check(
        &self,
        job: &JobRecord,
        image: &v1::ImageInfo,
        png: &Bytes,
        claimed: &v1::SafetyRecord,
    ) -> Result<Judgement, Rejection> {
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let (policy, run) = (job.policy(), job.run());
        let sha256 = sha256_hex(png);
        let steered_away = record::steered_away(&claimed.trajectory);
        let mut left = policy.concepts.clone();
        let mut judgement = Judgement::default();
        let mut failed: BTreeMap<String, (LiveNode, String)> = BTreeMap::new();
        while !left.is_empty() {
            let mut nodes = self.registry.live();
            nodes.retain(|node| !failed.contains_key(&node.info.node_id));
            let need = admission::calibration(&policy, &run);
            let routing::Assignment { endpoints, unserved, .. } =
                routing::assign(&left, &nodes, need);
            if let Some(unserved) = unserved.first() {
                return Err(nobody_answers(unserved, &failed));
            }
            let _reservation = self.registry.reserve(&endpoints);
            let asks = endpoints.iter().map(|endpoint| {
                let request = v1::CheckRequest {
                    concepts: endpoint.concepts.clone(),
                    calibration: Some(run.key.clone()),
                    allow_calibration_fallback: policy.allow_calibration_fallback,
                    png: png.to_vec(),
                    crops: policy.steering.as_ref().map(|s| s.crops()).unwrap_or_default(),
                    crop_seed: image.seed,
                    scores_only: policy.observe_only,
                    open_concepts: names_asked(&endpoint.concepts, &steered_away),
                };
                self.ask(endpoint, request, &policy, &sha256, &job.traceparent)
            });
            for (endpoint, answer) in endpoints.iter().zip(join_all(asks).await) {
                let node = endpoint.node.clone().unwrap_or_default();
                match answer {
                    Ok(answer) => {
                        left.retain(|concept| !endpoint.concepts.contains(concept));
                        judgement.add(&node, answer);
                    }
                    Err(problem) => {
                        tracing::warn!(
                            node = node.node_id,
                            job = job.job.job_id,
                            image = image.index,
                            problem,
                            "final check failed"
                        );
                        if let Some(live) = nodes.iter().find(|n| n.info.node_id == node.node_id) {
                            failed.insert(node.node_id.clone(), (live.clone(), problem));
                        }
                    }
                }
            }
        }
        Ok(judgement)
    }

    async fn ask(
        &self,
        endpoint: &v1::EnergyEndpoint,
        request: v1::CheckRequest,
        policy: &v1::PinnedPolicy,
        image_sha256: &str,
        traceparent: &str,
    ) -> Result<v1::CheckResponse, String> {
        let address = endpoint.node.as_ref().map(|node| node.address.as_str()).unwrap_or_default();
        let channel = self.channels.get(address).map_err(|error| error.to_string())?;
        let mut client = EnergyServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        // The deadline travels along, so that the node does not work on what nobody waits for.
        let mut request = tonic::Request::new(request);
        request.set_timeout(self.timeout);
        let node = endpoint.node.as_ref().map(|node| node.node_id.as_str()).unwrap_or_default();
        let span = tracing::info_span!("check", otel.kind = "client", node);
        trace::send(&span, traceparent, request.metadata_mut());
        let asked = Instant::now();
        let answer = client.check(request).instrument(span).await;
        metrics::check(asked.elapsed(), answer.is_ok());
        let answer = answer.map_err(|status| match status.code() {
            Code::Cancelled | Code::DeadlineExceeded => {
                format!("no answer within {:?}", self.timeout)
            }
            code => format!("{code:?}: {}", status.message()),
        })?;
        let answer = answer.into_inner();
        let question = Question { concepts: &endpoint.concepts, image_sha256, policy };
        verdict::accept_answer(question, &answer)?;
        Ok(answer)
    }
}

impl Judgement {
    fn add(&mut self, node: &v1::NodeInfo, answer: v1::CheckResponse) {
        self.flagged |= answer.flagged;
        let (ids, fallbacks) = (answer.calibration_ids, answer.calibration_fallbacks);
        self.calibrations.extend(record::calibrations(ids, fallbacks));
        self.nodes.insert(format!("{} {}", node.node_id, node.model_hash));
        // Who was asked counts, not who says it answers.
        let energy = &node.model_name;
        let scores = answer.scores.into_iter();
        let scores = scores.map(|score| v1::ConceptScore { energy: energy.clone(), ..score });
        self.scores.extend(scores.map(|score| (Probe::from(&score), score)));
    }
}

fn nobody_answers(unserved: &Unserved, failed: &BTreeMap<String, (LiveNode, String)>) -> Rejection {
    let concept = &unserved.concept;
    let problem = failed.iter().find(|(_, (node, _))| node.serves(concept)).map_or_else(
        || unserved.to_string(),
        |(id, (_, problem))| {
            let name = &concept.name;
            format!("concept `{name}`: energy node `{id}` could not check it: {problem}")
        },
    );
    Rejection::retryable(format!("final check of {problem}"))
}

/// The record of one image: everything the coordinator knows is its own word; from the worker come
/// the trajectory, the reruns, the pixel hash and the nodes and calibrations that steered.
fn assemble(
    job: &JobRecord,
    image: &v1::ImageInfo,
    claimed: v1::SafetyRecord,
    judgement: Option<Judgement>,
) -> v1::SafetyRecord {
    let spec = job.spec();
    let withheld_scores = || verdict::withheld_scores(&claimed).to_vec();
    let mut nodes: BTreeSet<String> = claimed.energy_nodes.iter().cloned().collect();
    let mut calibrations: BTreeSet<String> = claimed.calibrations.iter().cloned().collect();
    let final_scores = match judgement {
        None => withheld_scores(),
        Some(judgement) => {
            nodes.extend(judgement.nodes);
            calibrations.extend(judgement.calibrations);
            judgement.scores.into_values().collect()
        }
    };
    v1::SafetyRecord {
        record_id: image.record_id.clone(),
        job_id: job.job.job_id.clone(),
        index: image.index,
        status: ImageStatus::Unspecified.into(),
        policy: Some(job.policy()),
        model: job.model.name.clone(),
        model_hash: job.model.hash.clone(),
        sampler: job.model.sampler.clone(),
        steps: spec.steps(),
        guidance_scale: spec.guidance_scale(),
        width: spec.width(),
        height: spec.height(),
        seed: image.seed,
        prompt: spec.prompt,
        negative_prompt: spec.negative_prompt,
        final_scores,
        reruns: claimed.reruns,
        image_sha256: String::new(),
        pixels_sha256: claimed.pixels_sha256,
        energy_nodes: nodes.into_iter().collect(),
        calibrations: calibrations.into_iter().collect(),
        steered: claimed.steered,
        engine_ms: claimed.engine_ms,
        worker_id: String::new(),
        finished_unix_ms: 0,
        trajectory: claimed.trajectory,
        signature: None,
    }
}
