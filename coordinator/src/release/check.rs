//! The final check: the coordinator itself asks live nodes of every pinned concept about the very bytes
//! that would leave. Nothing here depends on a worker: the level is the one that was pinned when the job
//! was admitted, the nodes are drawn at random, and the crops come from a secret.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fairlead_common::{
    grpc::Channels, picture::sha256, probe::Probe, record, signature::Signer, trace,
};
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{self, energy_service_client::EnergyServiceClient},
};
use futures::future::join_all;
use tonic::Code;
use tracing::Instrument;

use super::{Rejection, file::FinishedFile};
use crate::{
    admission, levels, metrics,
    registry::Registry,
    routing::{LiveNode, Panel, Unserved},
    state::JobRecord,
    verdict::{self, Question},
};

/// What the nodes read in one image.
#[derive(Debug, Default)]
pub(crate) struct Readings {
    /// Of several nodes asked, the highest score.
    pub(super) scores: BTreeMap<Probe, v1::ConceptScore>,
    pub(super) nodes: BTreeSet<String>,
    pub(super) calibrations: BTreeSet<String>,
}

impl Readings {
    /// Whether some node found some concept: the image must not leave.
    pub(super) fn is_flagged(&self) -> bool {
        self.scores.values().any(|score| score.open)
    }

    fn add(&mut self, node: &v1::NodeInfo, answer: v1::CheckResponse, policy: &v1::PinnedPolicy) {
        let (ids, fallbacks) = (answer.calibration_ids, answer.calibration_fallbacks);
        self.calibrations.extend(record::calibrations(ids, fallbacks));
        self.nodes.insert(format!("{} {}", node.node_id, node.model_hash));
        for score in answer.scores {
            // Who was asked counts, not who says it answers.
            let score = v1::ConceptScore { energy: node.model_name.clone(), ..score };
            let score = levels::hold(policy, score);
            let probe = Probe::from(&score);
            match self.scores.get_mut(&probe) {
                Some(other) => {
                    let open = other.open || score.open;
                    if score.score > other.score {
                        *other = score;
                    }
                    other.open = open;
                }
                None => {
                    self.scores.insert(probe, score);
                }
            }
        }
    }
}

/// Asks energy nodes about finished images; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Checker {
    registry: Registry,
    channels: Channels,
    /// Each node has as long to answer about one image.
    timeout: Duration,
    /// Where the crops come from.
    secret: Arc<[u8; 32]>,
}

impl Checker {
    pub(super) fn new(
        registry: Registry,
        channels: Channels,
        timeout: Duration,
        signer: &Signer,
    ) -> Self {
        let secret = Arc::new(signer.derive("fairlead.v1.check-crops"));
        Self { registry, channels, timeout, secret }
    }

    /// Asks nodes until every pinned concept has as many accepted answers as the policy wants, each
    /// failed node replaced by another; fails with the name of a concept that is left.
    pub(super) async fn check(
        &self,
        job: &JobRecord,
        index: u32,
        file: &FinishedFile,
    ) -> Result<Readings, Rejection> {
        let (policy, run) = (job.policy(), job.run());
        let question = Question { image_sha256: &sha256(&file.png), policy: &policy };
        let request = v1::CheckRequest {
            calibration: Some(run.key.clone()),
            allow_calibration_fallback: policy.allow_calibration_fallback,
            crops: policy.steering.as_ref().map(|s| s.crops()).unwrap_or_default(),
            crop_seed: self.crop_seed(&file.pixels_sha256),
            scores_only: policy.observe_only,
            ..Default::default()
        };
        let mut panel = Panel::new(&policy.concepts, policy.checks.max(1));
        let mut readings = Readings::default();
        let mut failed: BTreeMap<String, (LiveNode, String)> = BTreeMap::new();
        while !panel.is_complete() {
            let mut nodes = self.registry.live();
            nodes.retain(|node| !failed.contains_key(&node.info.node_id));
            let need = admission::calibration(&policy, &run);
            let endpoints = panel
                .next(&nodes, need, rand::random())
                .map_err(|unserved| nobody_answers(&unserved, &failed))?;
            let _reservation = self.registry.reserve(&endpoints);
            let asks = endpoints.iter().map(|endpoint| {
                let concepts = endpoint.concepts.clone();
                let request = v1::CheckRequest { concepts, ..request.clone() };
                self.ask(endpoint, request, file.png.clone(), question, &job.traceparent)
            });
            for (endpoint, answer) in endpoints.iter().zip(join_all(asks).await) {
                let node = endpoint.node.clone().unwrap_or_default();
                match answer {
                    Ok(answer) => {
                        panel.answered(&node.node_id, &endpoint.concepts);
                        readings.add(&node, answer, &policy);
                    }
                    Err(problem) => {
                        tracing::warn!(
                            node = node.node_id,
                            job = job.job.job_id,
                            image = index,
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
        Ok(readings)
    }

    /// Seed of the crops that judge these pixels. Nobody outside can know it, so no image can be made
    /// for it; and it is the same whenever the same pixels come, so nobody can try again until it suits.
    fn crop_seed(&self, pixels_sha256: &str) -> u64 {
        let digest = sha256(&[&*self.secret, pixels_sha256.as_bytes()].concat());
        u64::from_str_radix(&digest[..16], 16).expect("a hash is hex digits")
    }

    async fn ask(
        &self,
        endpoint: &v1::EnergyEndpoint,
        request: v1::CheckRequest,
        png: Bytes,
        question: Question<'_>,
        traceparent: &str,
    ) -> Result<v1::CheckResponse, String> {
        let node = endpoint.node.clone().unwrap_or_default();
        let channel = self.channels.get(&node).map_err(|error| error.to_string())?;
        let mut client = EnergyServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let mut request = tonic::Request::new(v1::CheckRequest { png: png.to_vec(), ..request });
        // The deadline travels along, so that the node does not work on what nobody waits for.
        request.set_timeout(self.timeout);
        let span = tracing::info_span!("check", otel.kind = "client", node = node.node_id);
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
        verdict::accept_answer(question, &endpoint.concepts, &answer)?;
        if let Some(change) = levels::change(question.policy, &endpoint.concepts, &answer) {
            metrics::disagreement();
            tracing::error!(
                node = node.node_id,
                "{change}; the stricter of both levels holds for this job"
            );
        }
        Ok(answer)
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
