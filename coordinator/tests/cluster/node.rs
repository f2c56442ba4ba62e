//! A scripted energy node on a free port.

use std::{future, sync::Arc};

use fairlead_proto::{
    PREPROCESSING_VERSION, PROTOCOL_VERSION,
    v1::{
        self, CalibrationEnvelope, CalibrationInfo, CalibrationKey, CheckRequest, CheckResponse,
        CheckThreshold, ConceptInfo, ConceptRef, ConceptScore, ImageSize, NodeInfo,
        energy_service_server::{EnergyService, EnergyServiceServer},
    },
};
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tonic::{Request, Response, Status};

use crate::cluster::{Cluster, patient};

pub(crate) const GATE: f32 = 3.0;

/// The raw score above which an image must not leave.
pub(crate) const THRESHOLD: f32 = 0.5;

/// What the node answers to a check.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Script {
    /// Every gate closed.
    Closed,
    /// The gate of this concept is open.
    Open(&'static str),
    /// The raw score of this concept is high, and its gate is said to be closed far above.
    Lax(&'static str),
    /// One score is not a number.
    NotANumber,
    /// It judged other bytes.
    OtherBytes,
    /// It leaves one concept out.
    Forgetful,
    /// An error.
    Broken,
    /// No answer at all.
    Silent,
}

#[derive(Clone)]
struct Energy {
    info: NodeInfo,
    script: Script,
    asked: Arc<watch::Sender<Vec<CheckRequest>>>,
}

pub(crate) struct Node {
    pub(crate) info: NodeInfo,
    energy: Energy,
    server: JoinHandle<()>,
    registration_id: String,
}

/// The concept as the energy `energy` watches for it.
fn concept_of(energy: &str, name: &str) -> ConceptRef {
    ConceptRef { name: name.into(), version: format!("{energy}-v1"), energy: energy.into() }
}

/// A description that the coordinator accepts.
pub(crate) fn describe(id: &str, address: &str, energy: &str, concepts: &[&str]) -> NodeInfo {
    let key = CalibrationKey {
        generator: "hash-of-sd".into(),
        sampler: "ddim".into(),
        steps: 25,
        conditions: None,
    };
    NodeInfo {
        node_id: id.into(),
        address: address.into(),
        protocol_version: PROTOCOL_VERSION,
        preprocessing_version: PREPROCESSING_VERSION,
        kind: "contrastive".into(),
        model_name: energy.into(),
        model_hash: format!("hash-of-{energy}"),
        concepts: concepts
            .iter()
            .map(|name| ConceptInfo {
                concept: Some(concept_of(energy, name)),
                ..Default::default()
            })
            .collect(),
        calibrations: vec![CalibrationInfo {
            key: Some(key),
            id: "calibration-1".into(),
            crops: 4,
            window_start: 1.0,
            check_thresholds: concepts
                .iter()
                .map(|name| CheckThreshold { concept: (*name).into(), score: THRESHOLD })
                .collect(),
            envelope: Some(CalibrationEnvelope {
                sizes: vec![ImageSize { width: 32, height: 32 }],
                guidance_least: 5.0,
                guidance_greatest: 5.0,
                negative_prompts: false,
            }),
            ..Default::default()
        }],
        ..Default::default()
    }
}

impl Node {
    /// Serves and registers `concepts` of the energy `clip`.
    pub(crate) async fn start(
        cluster: &Cluster,
        id: &str,
        concepts: &[&str],
        script: Script,
    ) -> Self {
        Self::start_energy(cluster, id, "clip", concepts, script).await
    }

    /// Serves and registers `concepts` of an energy.
    pub(crate) async fn start_energy(
        cluster: &Cluster,
        id: &str,
        model: &str,
        concepts: &[&str],
        script: Script,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let info = describe(id, &address, model, concepts);
        let energy =
            Energy { info: info.clone(), script, asked: Arc::new(watch::Sender::default()) };
        let service = EnergyServiceServer::new(energy.clone());
        let server = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(fairlead_common::grpc::incoming(listener))
                .await
                .expect("it serves");
        });
        let request = v1::RegisterNodeRequest { node: Some(info.clone()) };
        let response = patient(cluster.registry().register_node(request)).await.expect("accepted");
        let registration_id = response.into_inner().registration_id;
        Self { info, energy, server, registration_id }
    }

    /// Leaves the cluster properly.
    pub(crate) async fn leave(&self, cluster: &Cluster) {
        let request = v1::DeregisterNodeRequest {
            node_id: self.info.node_id.clone(),
            registration_id: self.registration_id.clone(),
        };
        patient(cluster.registry().deregister_node(request)).await.expect("it was registered");
    }

    /// Dies without a word: still registered, nobody at the address.
    pub(crate) async fn die(&mut self) {
        self.server.abort();
        let _ = (&mut self.server).await;
    }

    /// Waits until it was asked for that many checks.
    pub(crate) async fn asked_times(&self, checks: usize) {
        let mut asked = self.energy.asked.subscribe();
        let enough = asked.wait_for(|asked| asked.len() >= checks);
        patient(async { enough.await.map(|_| ()) }).await.expect("the node lives");
    }

    /// The checks it was asked for.
    pub(crate) fn asked(&self) -> Vec<CheckRequest> {
        self.energy.asked.borrow().clone()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn answer(request: &CheckRequest, script: &Script) -> CheckResponse {
    let mut scores: Vec<ConceptScore> = request
        .concepts
        .iter()
        .map(|concept| {
            let wanted = matches!(script, Script::Open(name) if *name == concept.name);
            let open = wanted && !request.scores_only;
            let (z, gate) = match (request.scores_only, open) {
                (true, _) => (0.0, 0.0),
                (false, true) => (GATE + 1.0, GATE),
                (false, false) => (GATE - 2.0, GATE),
            };
            ConceptScore {
                concept: concept.name.clone(),
                score: if open { THRESHOLD + 0.1 } else { THRESHOLD - 0.3 },
                z,
                gate,
                open,
                ..Default::default()
            }
        })
        .collect();
    let mut image_sha256 = hex::encode(Sha256::digest(&request.png));
    match script {
        Script::Lax(name) => {
            let lax = scores.iter_mut().filter(|score| score.concept == *name);
            lax.for_each(|score| (score.score, score.gate) = (THRESHOLD + 0.1, 1e9));
        }
        Script::NotANumber => scores[0].score = f32::NAN,
        Script::OtherBytes => image_sha256 = hex::encode(Sha256::digest(b"other")),
        Script::Forgetful => {
            scores.pop();
        }
        _ => {}
    }
    CheckResponse {
        flagged: scores.iter().any(|score| score.open),
        scores,
        image_sha256,
        calibration_ids: if request.scores_only {
            Vec::new()
        } else {
            vec!["calibration-1".into()]
        },
        ..Default::default()
    }
}

#[tonic::async_trait]
impl EnergyService for Energy {
    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        Ok(Response::new(v1::DescribeResponse { node: Some(self.info.clone()) }))
    }

    async fn evaluate(
        &self,
        _request: Request<v1::EvaluateRequest>,
    ) -> Result<Response<v1::EvaluateResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn add_concepts(
        &self,
        _request: Request<v1::AddConceptsRequest>,
    ) -> Result<Response<v1::AddConceptsResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let request = request.into_inner();
        self.asked.send_modify(|asked| asked.push(request.clone()));
        match &self.script {
            Script::Broken => Err(Status::internal("the energy model is broken")),
            Script::Silent => future::pending().await,
            script => Ok(Response::new(answer(&request, script))),
        }
    }
}

/// A node that answers nothing.
pub(crate) struct Deaf;

#[tonic::async_trait]
impl EnergyService for Deaf {
    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn evaluate(
        &self,
        _request: Request<v1::EvaluateRequest>,
    ) -> Result<Response<v1::EvaluateResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn add_concepts(
        &self,
        _request: Request<v1::AddConceptsRequest>,
    ) -> Result<Response<v1::AddConceptsResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn check(
        &self,
        _request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }
}
