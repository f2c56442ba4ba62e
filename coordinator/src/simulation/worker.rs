//! A simulated worker: it speaks the real protocol, and most of its work is honest. The rest is late, sent
//! twice, wrong, a lie, or never heard of again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use fairlead_common::picture::Rgb8;
use fairlead_proto::{
    PROTOCOL_VERSION,
    v1::{
        self, AttachRequest, ImageOutcome, ImageStatus, LeaseRef, ShardAssignment, ShardFailure,
        attach_request::Message as Up, attach_response::Message as Down,
        energy_service_client::EnergyServiceClient, worker_service_client::WorkerServiceClient,
    },
};
use parking_lot::Mutex;
use rand::{Rng, rngs::StdRng};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{net, node::FROM_WORKER, truth, world::World};
use crate::lease::LeaseKey;

/// What a worker makes of one delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Honest,
    /// Says that forbidden images are fine.
    Lie,
    /// Sends everything twice.
    Twice,
    /// Stands still, then sends what nobody waits for any longer.
    Late,
    /// Goes on although it was told to stop.
    Deaf,
    /// Sends an image of the wrong size.
    WrongSize,
    /// Says it is done before it is.
    Incomplete,
    /// Fails.
    Fail,
    /// Forgets the shard.
    Forget,
    /// Gives it back.
    HandBack,
}

struct Worker {
    world: Arc<World>,
    host: &'static str,
    rng: Mutex<StdRng>,
    /// The stream that is open now.
    up: Mutex<Option<mpsc::Sender<AttachRequest>>>,
    /// Deliveries in work, and what stops them.
    held: Mutex<BTreeMap<LeaseKey, (LeaseRef, CancellationToken)>>,
    /// It does nothing before.
    still_until: Mutex<Instant>,
}

/// The life of one worker.
pub(super) async fn run(world: Arc<World>, host: &'static str) -> turmoil::Result {
    let worker = Arc::new(Worker {
        rng: Mutex::new(world.rng(host)),
        world,
        host,
        up: Mutex::default(),
        held: Mutex::default(),
        still_until: Mutex::new(Instant::now()),
    });
    loop {
        let ended = worker.attach().await;
        *worker.up.lock() = None;
        worker.note(format!("stream ended: {:?}", ended.map_err(|status| status.code())));
        // Mostly what is in work is given up with its stream.
        if worker.chance(0.7) {
            worker.held.lock().values().for_each(|(_, stop)| stop.cancel());
            worker.held.lock().clear();
        }
        tokio::time::sleep(worker.pause(50..800)).await;
    }
}

impl Worker {
    fn note(&self, what: impl AsRef<str>) {
        self.world.note(format!("{}: {}", self.host, what.as_ref()));
    }

    fn chance(&self, probability: f64) -> bool {
        self.rng.lock().random_bool(probability)
    }

    fn pause(&self, ms: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.lock().random_range(ms))
    }

    fn plan(&self) -> Plan {
        if self.world.only_coordinators_die() {
            return Plan::Honest;
        }
        let draw = self.rng.lock().random_range(0..100);
        match draw {
            0..8 => Plan::Lie,
            8..14 => Plan::Twice,
            _ if self.world.is_healed() => Plan::Honest,
            14..20 => Plan::Late,
            20..26 => Plan::Deaf,
            26..28 => Plan::WrongSize,
            28..30 => Plan::Incomplete,
            30..33 => Plan::Fail,
            33..38 => Plan::Forget,
            38..40 => Plan::HandBack,
            _ => Plan::Honest,
        }
    }

    /// One stream, until it breaks.
    async fn attach(self: &Arc<Self>) -> Result<(), Status> {
        let channel = self.world.any_coordinator(&mut self.rng.lock());
        let (up, requests) = mpsc::channel(64);
        let hello = v1::WorkerHello {
            worker_id: self.host.into(),
            protocol_version: PROTOCOL_VERSION,
            models: vec![truth::model()],
            capacity: 2,
        };
        let _ = up.try_send(AttachRequest { message: Some(Up::Hello(hello)) });
        let mut client = WorkerServiceClient::new(channel);
        let mut down = client.attach(ReceiverStream::new(requests)).await?.into_inner();
        *self.up.lock() = Some(up);
        let mut renewal = tokio::time::interval(Duration::from_secs(2));
        loop {
            tokio::select! {
                message = down.message() => match message? {
                    Some(v1::AttachResponse { message: Some(message) }) => self.hear(message),
                    Some(v1::AttachResponse { message: None }) => {}
                    None => return Ok(()),
                },
                _ = renewal.tick() => self.renew().await,
            }
        }
    }

    fn hear(self: &Arc<Self>, message: Down) {
        match message {
            Down::Welcome(welcome) => {
                self.note(format!("attached to {}", welcome.coordinator_id));
            }
            Down::Assignment(assignment) => {
                let lease = assignment.lease.clone().unwrap_or_default();
                let Some(key) = LeaseKey::from_proto(Some(&lease)) else { return };
                let stop = CancellationToken::new();
                self.held.lock().insert(key, (lease, stop.clone()));
                tokio::spawn(Arc::clone(self).make(key, assignment, stop));
            }
            Down::Cancel(cancel) => self.cancelled(cancel.lease),
            Down::Renewed(renewed) => renewed.lost.iter().for_each(|lost| {
                self.stop(lost);
            }),
            Down::Commit(reply) => self.replied(&reply),
            Down::Nodes(_) => {}
        }
    }

    /// Stops what is in work for a lease; `false` if nothing is.
    fn stop(&self, lease: &LeaseRef) -> bool {
        let key = LeaseKey::from_proto(Some(lease));
        let held = key.and_then(|key| self.held.lock().remove(&key));
        held.is_some_and(|(_, stop)| {
            stop.cancel();
            true
        })
    }

    /// Stops, or confirms that nothing is left to stop: the coordinator waits for that.
    fn cancelled(self: &Arc<Self>, lease: Option<LeaseRef>) {
        let Some(key) = LeaseKey::from_proto(lease.as_ref()) else { return };
        if !self.stop(&key.to_proto()) {
            let worker = Arc::clone(self);
            tokio::spawn(async move { worker.fail(key, true, false).await });
        }
    }

    fn replied(self: &Arc<Self>, reply: &v1::CommitReply) {
        let Some(key) = LeaseKey::from_proto(reply.lease.as_ref()) else { return };
        self.held.lock().remove(&key);
        self.world.model.lock().commit_reply(self.host, key, reply);
        if self.chance(0.15) {
            // It has forgotten the answer, and asks again.
            let (worker, pause) = (Arc::clone(self), self.pause(10..6_000));
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                worker.send(Up::Done(v1::ShardDone { lease: Some(key.to_proto()) })).await;
            });
        }
    }

    async fn renew(&self) {
        if *self.still_until.lock() > Instant::now() {
            return;
        }
        let leases: Vec<LeaseRef> =
            self.held.lock().values().map(|(lease, _)| lease.clone()).collect();
        if !leases.is_empty() {
            self.send(Up::Renewal(v1::LeaseRenewal { leases })).await;
        }
    }

    /// Sends on whichever stream is open; without one the message is lost.
    async fn send(&self, message: Up) {
        let up = self.up.lock().clone();
        if let Some(up) = up {
            let _ = up.send(AttachRequest { message: Some(message) }).await;
        }
    }

    async fn make(
        self: Arc<Self>,
        key: LeaseKey,
        assignment: ShardAssignment,
        stop: CancellationToken,
    ) {
        let plan = self.plan();
        if plan != Plan::Honest {
            self.note(format!("{key}: {plan:?}"));
        }
        match plan {
            Plan::Forget => {
                self.held.lock().remove(&key);
            }
            Plan::Fail | Plan::HandBack => {
                tokio::time::sleep(self.pause(10..500)).await;
                self.held.lock().remove(&key);
                self.fail(key, false, plan == Plan::HandBack).await;
            }
            _ => self.make_images(key, &assignment, &stop, plan).await,
        }
    }

    async fn make_images(
        &self,
        key: LeaseKey,
        assignment: &ShardAssignment,
        stop: &CancellationToken,
        plan: Plan,
    ) {
        let last = assignment.images.len().saturating_sub(1);
        for (number, image) in assignment.images.iter().enumerate() {
            self.steps(key, assignment, image.index).await;
            if plan == Plan::Late {
                let until = Instant::now() + self.pause(4_000..12_000);
                *self.still_until.lock() = until;
                tokio::time::sleep_until(until).await;
            } else if stop.is_cancelled() && plan != Plan::Deaf {
                return self.fail(key, true, false).await;
            }
            if plan == Plan::Incomplete && number == last {
                continue;
            }
            let outcome = self.outcome(key, assignment, image, plan).await;
            if plan == Plan::Twice && self.chance(0.3) {
                self.send(Up::Image(outcome.clone())).await;
            }
            self.send(Up::Image(outcome)).await;
        }
        let done = || Up::Done(v1::ShardDone { lease: Some(key.to_proto()) });
        self.send(done()).await;
        if plan == Plan::Twice {
            tokio::time::sleep(self.pause(0..400)).await;
            self.send(done()).await;
        }
    }

    /// Steps with previews, whatever is to be seen in them, and beside them what only the coordinator may
    /// send.
    async fn steps(&self, key: LeaseKey, assignment: &ShardAssignment, index: u32) {
        let concepts = assignment.policy.iter().flat_map(|policy| &policy.concepts);
        let concepts: Vec<&v1::ConceptRef> = concepts.collect();
        for step in 0..4 {
            tokio::time::sleep(self.pause(10..250)).await;
            let scored = concepts.iter().filter(|_| self.chance(0.95));
            let scores = scored.map(|concept| v1::ConceptScore {
                concept: concept.name.clone(),
                energy: concept.energy.clone(),
                open: self.chance(0.1),
                ..Default::default()
            });
            let (scores, preview_png) = (scores.collect(), b"a preview".to_vec());
            let spec = assignment.spec.clone().unwrap_or_default();
            let preview = v1::Preview {
                index,
                step,
                width: truth::PREVIEW_SIDE,
                height: truth::PREVIEW_SIDE,
                pixels: truth::preview(&spec, index, step),
            };
            let step = v1::StepProgress {
                index,
                step,
                steps: 4,
                scores,
                preview_png,
                ..Default::default()
            };
            let lease = Some(key.to_proto());
            let (steps, previews) = (vec![step], vec![preview]);
            self.send(Up::Progress(v1::ShardProgress { lease, steps, previews })).await;
        }
    }

    async fn fail(&self, key: LeaseKey, cancelled: bool, handed_back: bool) {
        let failure = ShardFailure {
            lease: Some(key.to_proto()),
            reason: "as the simulation wants".into(),
            retryable: true,
            cancelled,
            handed_back,
        };
        self.send(Up::Failure(failure)).await;
    }

    async fn outcome(
        &self,
        key: LeaseKey,
        assignment: &ShardAssignment,
        image: &v1::ImageTask,
        plan: Plan,
    ) -> ImageOutcome {
        let mut spec = assignment.spec.clone().unwrap_or_default();
        if plan == Plan::WrongSize {
            spec.width = Some(64);
        }
        let pixels = truth::pixels(&spec, image.seed);
        if self.chance(0.2) {
            self.ask(assignment, &spec, &pixels).await;
        }
        let concepts = assignment.policy.iter().flat_map(|policy| &policy.concepts);
        let open: Vec<v1::ConceptScore> = concepts
            .filter(|concept| truth::shows(&concept.name, &pixels))
            .map(|concept| v1::ConceptScore {
                concept: concept.name.clone(),
                energy: concept.energy.clone(),
                z: 4.0,
                gate: 3.0,
                open: true,
                ..Default::default()
            })
            .collect();
        let withheld = !open.is_empty() && plan != Plan::Lie;
        let status = if withheld { ImageStatus::Withheld } else { ImageStatus::Released };
        ImageOutcome {
            lease: Some(key.to_proto()),
            index: image.index,
            status: status.into(),
            pixels: if withheld { Vec::new() } else { pixels },
            report: Some(v1::WorkerReport {
                final_scores: if withheld { open } else { Vec::new() },
                ..Default::default()
            }),
            notices: Vec::new(),
        }
    }

    /// Asks a node, as workers do; the coordinator must not rely on it.
    async fn ask(&self, assignment: &ShardAssignment, spec: &v1::JobSpec, pixels: &[u8]) {
        let picture = Rgb8::new(spec.width(), spec.height(), pixels.to_vec());
        let png = picture.and_then(|picture| picture.to_png(&[]).ok()).unwrap_or_default();
        let Some(endpoint) = assignment.energies.first() else { return };
        let Some(node) = &endpoint.node else { return };
        let mut request = tonic::Request::new(v1::CheckRequest {
            concepts: endpoint.concepts.clone(),
            png,
            ..Default::default()
        });
        request
            .metadata_mut()
            .insert(FROM_WORKER, tonic::metadata::MetadataValue::from_static("1"));
        let channel = net::channel(&node.address, Duration::from_secs(1));
        let channel = channel.expect("nodes have good addresses");
        let _ = EnergyServiceClient::new(channel).check(request).await;
    }
}
