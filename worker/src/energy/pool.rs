//! The energy nodes of one shard over gRPC: a node that fails is replaced by another that serves
//! its concepts, if there is one in time; otherwise the shard fails and nothing is released.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use fairlead_common::{
    probe::{Probe, names_asked},
    tensor,
};
use fairlead_proto::v1::{
    CheckRequest, ConceptRef, ConceptScore, EnergyEndpoint, EvaluateRequest, InputSpec,
    SampleContext,
};
use futures::future::{BoxFuture, join_all};
use tokio::sync::watch;
use tonic::Request;
use tracing::{Instrument, Span};

use super::{
    Answer, Candidate, Energy, PoolOptions, Render, Sample, Sources, Terms, Verdict,
    call::{self, Answered, Trouble},
    routing::{Failed, Route, names, route},
};
use crate::{Error, NodeFailure, error::Result, turn::Turn};

/// Longest wait for another node, or for the same one to recover, once a call has failed.
const FAILOVER_WAIT: Duration = Duration::from_secs(10);

/// Pause before the same node is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The energy nodes of one shard.
#[derive(Debug)]
pub struct EnergyPool {
    options: PoolOptions,
    endpoints: watch::Receiver<Vec<EnergyEndpoint>>,
    /// Nodes not to ask until the list of nodes changes.
    failed: Failed,
    sources: Sources,
}

type Call<T> = BoxFuture<'static, Result<Answered<T>, Trouble>>;

/// A call that failed before it was made.
fn hopeless<T: Send + 'static>(trouble: Trouble) -> Call<T> {
    Box::pin(std::future::ready(Err(trouble)))
}

impl EnergyPool {
    /// A pool over the nodes that `endpoints` names now and later.
    pub fn new(options: PoolOptions, endpoints: watch::Receiver<Vec<EnergyEndpoint>>) -> Self {
        Self { options, endpoints, failed: Failed::new(), sources: Sources::default() }
    }

    /// Calls each node that the concepts need, all at once, replaces nodes that fail, and returns
    /// the answers in the order of the concepts.
    fn gather<T>(
        &mut self,
        concepts: &[ConceptRef],
        turn: &Turn<'_>,
        mut call: impl FnMut(&Route) -> Result<Call<T>>,
    ) -> Result<Vec<(Route, T)>> {
        let mut answers: Vec<(Route, T)> = Vec::new();
        let mut pending = concepts.to_vec();
        let mut trouble: Option<(NodeFailure, Instant)> = None;
        while !pending.is_empty() {
            let routes = self.routes(&pending, trouble.as_ref(), turn)?;
            let calls = routes.iter().map(&mut call).collect::<Result<Vec<_>>>()?;
            let results = self.block_on(turn, join_all(calls))?;
            pending.clear();
            for (route, result) in routes.into_iter().zip(results) {
                match result {
                    Ok(answered) => {
                        let node = &route.node;
                        self.sources.nodes.insert(format!("{} {}", node.node_id, node.model_hash));
                        self.sources.calibrations.extend(answered.calibrations);
                        answers.push((route, answered.answer));
                    }
                    Err(why) => {
                        pending.extend(route.concepts.iter().cloned());
                        let deadline = trouble.as_ref().map_or_else(
                            || Instant::now() + FAILOVER_WAIT.min(self.options.timeout),
                            |(_, deadline)| *deadline,
                        );
                        trouble = Some((self.note(&route, why), deadline));
                    }
                }
            }
        }
        answers.sort_by_key(|(route, _)| concepts.iter().position(|c| *c == route.concepts[0]));
        Ok(answers)
    }

    /// Marks a node as failed.
    fn note(&mut self, route: &Route, trouble: Trouble) -> NodeFailure {
        let failure = NodeFailure {
            node: route.label(),
            concepts: names(&route.concepts),
            reason: trouble.reason,
            retryable: trouble.retryable,
        };
        tracing::warn!(passing = trouble.passing, "{failure}");
        self.failed.insert(route.node.node_id.clone(), trouble.passing);
        failure
    }

    /// Routes for `pending`. Where none is left, waits until the deadline of `trouble` for the list
    /// of nodes to change, or for a node whose trouble may pass to be asked again.
    fn routes(
        &mut self,
        pending: &[ConceptRef],
        trouble: Option<&(NodeFailure, Instant)>,
        turn: &Turn<'_>,
    ) -> Result<Vec<Route>> {
        loop {
            if self.endpoints.has_changed().unwrap_or(false) {
                self.failed.clear();
            }
            let missing = match route(pending, &self.endpoints.borrow_and_update(), &self.failed) {
                Ok(routes) => return Ok(routes),
                Err(missing) => missing,
            };
            let Some((failure, deadline)) = trouble else {
                return Err(unserved(&missing).into());
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.failed.values().any(|&passing| passing) {
                return Err(failure.clone().into());
            }
            let endpoints = self.endpoints.clone();
            self.block_on(turn, changed(endpoints, RETRY_PAUSE.min(left)))?;
            self.failed.retain(|_, passing| !*passing);
        }
    }

    /// Runs `future` on the runtime while this thread waits and others compute; cancellation drops it.
    fn block_on<T>(&self, turn: &Turn<'_>, future: impl Future<Output = T>) -> Result<T> {
        let answer = async {
            tokio::select! {
                biased;
                () = turn.cancel().cancelled() => Err(Error::Cancelled),
                value = future => Ok(value),
            }
        };
        turn.aside(|| self.options.runtime.block_on(answer))
    }
}

/// Waits for the list of nodes to change, at most `pause`.
async fn changed(mut endpoints: watch::Receiver<Vec<EnergyEndpoint>>, pause: Duration) {
    let change = async {
        // The list of a shard whose stream ended changes no more.
        if endpoints.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let _ = tokio::time::timeout(pause, change).await;
}

fn unserved(concepts: &[ConceptRef]) -> NodeFailure {
    NodeFailure {
        node: "none".to_owned(),
        concepts: names(concepts),
        reason: "no live node serves them at the job's versions; start one with `fairlead energy`"
            .to_owned(),
        retryable: true,
    }
}

/// The span of a call to one node.
fn span_of(route: &Route, call: &'static str, images: usize) -> Span {
    let node = route.node.node_id.as_str();
    // OpenTelemetry knows signed integers; others would arrive as text.
    let images = images as i64;
    tracing::info_span!("energy_call", otel.kind = "client", call, node, images)
}

/// The parts of a batch as requests to one node, each at most as large as it takes.
fn parts(
    options: &PoolOptions,
    terms: &Terms,
    route: &Route,
    samples: &[Sample],
    pixels: &[f32],
    input: &InputSpec,
) -> Vec<Request<EvaluateRequest>> {
    let row = pixels.len() / samples.len();
    let most = if input.max_batch == 0 { samples.len() } else { input.max_batch as usize };
    let context = |sample: &Sample| SampleContext {
        time: sample.time,
        open_concepts: names_asked(&route.concepts, &sample.open),
        held_concepts: names_asked(&route.concepts, &sample.held),
        crop_seed: sample.crop_seed,
    };
    samples
        .chunks(most)
        .zip(pixels.chunks(most * row))
        .map(|(samples, pixels)| {
            let shape = [samples.len(), 3, input.height as usize, input.width as usize];
            options.request(EvaluateRequest {
                concepts: route.concepts.clone(),
                calibration: Some(terms.calibration.clone()),
                allow_calibration_fallback: terms.allow_fallback,
                pixels: Some(tensor::encode("pixels", &shape, pixels, input.datatype())),
                samples: samples.iter().map(context).collect(),
                crops: terms.crops,
                scores_only: terms.scores_only,
            })
        })
        .collect()
}

/// The finished images as requests to one node, with their hashes.
fn checks(
    options: &PoolOptions,
    terms: &Terms,
    route: &Route,
    candidates: &[Candidate],
) -> Vec<(Request<CheckRequest>, String)> {
    candidates
        .iter()
        .map(|candidate| {
            let request = options.request(CheckRequest {
                concepts: route.concepts.clone(),
                calibration: Some(terms.calibration.clone()),
                allow_calibration_fallback: terms.allow_fallback,
                png: candidate.png.clone(),
                crops: terms.crops,
                crop_seed: candidate.crop_seed,
                scores_only: terms.scores_only,
                open_concepts: names_asked(&route.concepts, &candidate.steered_away),
            });
            (request, candidate.sha256.clone())
        })
        .collect()
}

impl Energy for EnergyPool {
    fn evaluate(
        &mut self,
        terms: &Terms,
        samples: &[Sample],
        render: &mut Render<'_>,
        turn: &Turn<'_>,
    ) -> Result<Vec<Answer>> {
        let options = self.options.clone();
        let answers = self.gather(&terms.concepts, turn, |route| {
            let (client, input) = match options.connect(&route.node) {
                Ok(ready) => ready,
                Err(trouble) => return Ok(hopeless(trouble)),
            };
            let pixels = render(&input)?;
            let span = span_of(route, "evaluate", samples.len());
            let parts = span.in_scope(|| parts(&options, terms, route, samples, &pixels, &input));
            let call = call::evaluate(client, parts, input, options.timeout);
            Ok(Box::pin(call.instrument(span)))
        })?;
        let weighted = |(route, answer): (Route, Answer)| {
            let weight = terms.weights.get(&route.concepts[0].energy).copied().unwrap_or(1.0);
            Answer { weight, ..answer }
        };
        Ok(answers.into_iter().map(weighted).collect())
    }

    fn check(
        &mut self,
        terms: &Terms,
        candidates: &[Candidate],
        turn: &Turn<'_>,
    ) -> Result<Vec<Verdict>> {
        let options = self.options.clone();
        let answers = self.gather(&terms.concepts, turn, |route| {
            let (client, _) = match options.connect(&route.node) {
                Ok(ready) => ready,
                Err(trouble) => return Ok(hopeless(trouble)),
            };
            let span = span_of(route, "check", candidates.len());
            let requests = span.in_scope(|| checks(&options, terms, route, candidates));
            Ok(Box::pin(call::check(client, requests, options.timeout).instrument(span)))
        })?;
        let mut verdicts = vec![Verdict::default(); candidates.len()];
        for (_, answer) in answers {
            for (verdict, part) in verdicts.iter_mut().zip(answer) {
                verdict.flagged |= part.flagged;
                verdict.scores.extend(part.scores);
                verdict.remaining.extend(part.remaining);
            }
        }
        let place = |score: &ConceptScore| {
            let probe = Probe::from(score);
            terms.concepts.iter().position(|concept| Probe::from(concept) == probe)
        };
        for verdict in &mut verdicts {
            verdict.scores.sort_by_key(place);
        }
        Ok(verdicts)
    }

    fn sources(&self) -> &Sources {
        &self.sources
    }
}
