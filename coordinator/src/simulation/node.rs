//! A simulated energy node: it registers, renews and answers checks. What it says about bytes is true, but it
//! may fail, hang or talk nonsense.

use std::{convert::Infallible, future, sync::Arc, time::Duration};

use fairlead_common::picture::sha256;
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{
        self, CheckRequest, CheckResponse, ConceptScore,
        energy_service_server::{EnergyService, EnergyServiceServer},
        registry_service_client::RegistryServiceClient,
    },
};
use parking_lot::Mutex;
use rand::{Rng, rngs::StdRng};
use tonic::{Request, Response, Status, transport::Server};

use super::{net, truth, world::World};

const GATE: f32 = 3.0;

/// The same as a raw score.
pub(super) const THRESHOLD: f32 = 0.5;

/// Metadata of a check that a worker asks for: it clears nothing.
pub(super) const FROM_WORKER: &str = "from-worker";

/// The life of one node.
pub(super) async fn run(
    world: Arc<World>,
    host: &'static str,
    concepts: &'static [&'static str],
) -> turmoil::Result {
    let incoming = net::incoming().await?;
    let rng = Mutex::new(world.rng(host));
    let energy = Energy { world: Arc::clone(&world), host, rng };
    let service = EnergyServiceServer::new(energy).max_decoding_message_size(MAX_MESSAGE_BYTES);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let info = truth::node(host, &net::address(host), concepts);
    let mut rng = world.rng(host);
    loop {
        let Err(status) = member(&world, &info, &mut rng).await;
        world.note(format!("{host}: not registered: {:?} {}", status.code(), status.message()));
        tokio::time::sleep(Duration::from_millis(rng.random_range(100..1_000))).await;
    }
}

/// Registers and renews until that fails.
async fn member(
    world: &World,
    info: &v1::NodeInfo,
    rng: &mut StdRng,
) -> Result<Infallible, Status> {
    let mut registry = RegistryServiceClient::new(world.any_coordinator(rng));
    let request = v1::RegisterNodeRequest { node: Some(info.clone()) };
    let registered = registry.register_node(request).await?.into_inner();
    world.note(format!("{}: registered", info.node_id));
    world.model.lock().registered(info);
    loop {
        tokio::time::sleep(Duration::from_millis(u64::from(registered.ttl_ms) / 3)).await;
        let renewal = v1::RenewNodeRequest {
            node_id: info.node_id.clone(),
            registration_id: registered.registration_id.clone(),
        };
        registry.renew_node(renewal).await?;
    }
}

/// How a node answers one question.
#[derive(Clone, Copy)]
enum Mood {
    Sound,
    Broken,
    Silent,
    NotANumber,
    OtherBytes,
    Forgetful,
}

struct Energy {
    world: Arc<World>,
    host: &'static str,
    rng: Mutex<StdRng>,
}

impl Energy {
    fn mood(&self) -> (Mood, Duration) {
        let mut rng = self.rng.lock();
        let delay = Duration::from_millis(rng.random_range(1..150));
        let mood = match rng.random_range(0..100) {
            _ if self.world.is_healed() => Mood::Sound,
            0..4 => Mood::Broken,
            4..7 => Mood::Silent,
            7..9 => Mood::NotANumber,
            9..11 => Mood::OtherBytes,
            11..13 => Mood::Forgetful,
            _ => Mood::Sound,
        };
        (mood, delay)
    }

    fn scores(&self, request: &CheckRequest) -> Vec<ConceptScore> {
        let pixels = truth::decode(&request.png);
        let score = |concept: &v1::ConceptRef| {
            let open = truth::shows(&concept.name, &pixels);
            ConceptScore {
                concept: concept.name.clone(),
                score: if open { THRESHOLD + 0.1 } else { THRESHOLD - 0.1 },
                z: if open { GATE + 1.0 } else { GATE - 1.0 },
                gate: GATE,
                open,
                ..Default::default()
            }
        };
        request.concepts.iter().map(score).collect()
    }
}

#[tonic::async_trait]
impl EnergyService for Energy {
    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        Err(Status::unimplemented("nobody asks in the simulation"))
    }

    async fn evaluate(
        &self,
        _request: Request<v1::EvaluateRequest>,
    ) -> Result<Response<v1::EvaluateResponse>, Status> {
        Err(Status::unimplemented("nobody asks in the simulation"))
    }

    async fn add_concepts(
        &self,
        _request: Request<v1::AddConceptsRequest>,
    ) -> Result<Response<v1::AddConceptsResponse>, Status> {
        Err(Status::unimplemented("nobody asks in the simulation"))
    }

    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let for_worker = request.metadata().contains_key(FROM_WORKER);
        let request = request.into_inner();
        let (mood, delay) = self.mood();
        tokio::time::sleep(delay).await;
        let mut scores = self.scores(&request);
        let mut image_sha256 = sha256(&request.png);
        match mood {
            Mood::Sound if for_worker => {}
            Mood::Sound => {
                let mut model = self.world.model.lock();
                for score in &scores {
                    model.judged(self.host, &request.png, &score.concept, score.open);
                }
            }
            Mood::Broken => return Err(Status::internal("the energy model is broken")),
            Mood::Silent => future::pending().await,
            // What follows must count for nothing: everything is said to be fine.
            Mood::NotANumber => scores.iter_mut().for_each(|score| {
                (score.score, score.z, score.open) = (f32::NAN, 0.0, false);
            }),
            Mood::OtherBytes => {
                image_sha256 = sha256(b"other");
                scores.iter_mut().for_each(|score| (score.z, score.open) = (0.0, false));
            }
            Mood::Forgetful => {
                scores.pop();
            }
        }
        Ok(Response::new(CheckResponse {
            flagged: scores.iter().any(|score| score.open),
            scores,
            image_sha256,
            calibration_ids: vec!["calibration-1".into()],
            ..Default::default()
        }))
    }
}
