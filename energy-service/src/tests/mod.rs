//! The node over real gRPC, on a port of the system's choosing, with the analytic scorer.

mod adding;
mod calls;
mod emojiland;
mod life;
mod registration;
mod roles;

use std::{fs, path::Path};

use fairlead_common::{grpc, tensor, tls::Tls};
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{
        CalibrationKey, ConceptRef, Datatype, DescribeRequest, EvaluateRequest, EvaluateResponse,
        ImageSize, NodeInfo, RunConditions, SampleContext,
        energy_service_client::EnergyServiceClient,
    },
};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    EnergyOptions, Error, ScorerLoader,
    calibration::{
        Envelope,
        maker::{self, RecordedImage, RecordedStep, Recording},
    },
    random::SplitMix64,
    run_with_scorer,
    testing::{Probe, SIDE, TestScorer},
};

const CONCEPTS: &str = r#"
    anchors = ["nothing"]
    concept = [
        { name = "axe", group = "weapons", targets = ["an axe"], fallback_threshold = 0.3 },
        { name = "pill", group = "drugs", targets = ["a pill"], fallback_threshold = 0.3 },
        { name = "skull", group = "death", targets = ["a skull"] },
    ]
"#;

const PIXELS: usize = 3 * SIDE * SIDE;

/// Deadline of every call of a test: long enough for a loaded machine.
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

/// A running node and its folder; it stops when dropped.
struct TestNode {
    channel: Channel,
    client: EnergyServiceClient<Channel>,
    task: JoinHandle<Result<(), Error>>,
    shutdown: CancellationToken,
    _stop: tokio_util::sync::DropGuard,
}

/// A folder with the concepts file; calibrations go to `calibrations` in it.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("concepts.toml"), CONCEPTS).expect("written");
    folder
}

fn options(folder: &Path) -> EnergyOptions {
    EnergyOptions {
        calibrations: Some(folder.join("calibrations")),
        crops: 1,
        node_id: "node-1".to_owned(),
        ..EnergyOptions::new(folder.to_owned())
    }
}

impl TestNode {
    /// Runs a node on `listener`.
    fn attach<F>(
        listener: TcpListener,
        run: impl FnOnce(TcpListener, CancellationToken) -> F,
    ) -> Self
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(run(listener, shutdown.clone()));
        let channel = grpc::channel(&address, DEADLINE, &Tls::default()).expect("an address");
        Self {
            client: EnergyServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
            channel,
            task,
            _stop: shutdown.clone().drop_guard(),
            shutdown,
        }
    }

    /// Listens and starts to load.
    async fn spawn(options: EnergyOptions, loader: ScorerLoader) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self::attach(listener, |listener, shutdown| {
            run_with_scorer(listener, options, loader, shutdown)
        })
    }

    /// A node that serves, without calibrations unless `folder` holds some.
    async fn start(options: EnergyOptions) -> (Self, Probe) {
        let (loader, probe) = TestScorer::loader();
        let mut node = Self::spawn(options, loader).await;
        node.until("", ServingStatus::Serving).await;
        (node, probe)
    }

    /// A node that serves, with a calibration of one crop.
    async fn calibrated() -> (TempDir, Self, Probe) {
        let folder = folder();
        calibrate(folder.path()).await;
        let (node, probe) = Self::start(options(folder.path())).await;
        (folder, node, probe)
    }

    async fn health(&mut self, service: &str) -> Result<ServingStatus, Status> {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = HealthClient::new(self.channel.clone()).check(request).await?;
        Ok(answer.into_inner().status())
    }

    /// Waits until health says `status`.
    async fn until(&mut self, service: &str, status: ServingStatus) {
        while self.health(service).await.ok() != Some(status) {
            tokio::task::yield_now().await;
        }
    }

    async fn describe(&mut self) -> NodeInfo {
        let answer = self.client.describe(DescribeRequest {}).await.expect("described");
        answer.into_inner().node.expect("a node")
    }

    /// A good request for `images`, all concepts, at t / T = 0.8.
    async fn request(&mut self, images: &[Vec<f32>]) -> EvaluateRequest {
        let shape = [images.len(), 3, SIDE, SIDE];
        let sample = |image| SampleContext { time: 0.8, crop_seed: image, ..Default::default() };
        EvaluateRequest {
            concepts: self.refs().await,
            calibration: Some(key(20)),
            pixels: Some(tensor::encode("pixels", &shape, &images.concat(), Datatype::F32)),
            samples: (0..images.len() as u64).map(sample).collect(),
            ..Default::default()
        }
    }

    async fn refs(&mut self) -> Vec<ConceptRef> {
        self.describe().await.concepts.into_iter().filter_map(|c| c.concept).collect()
    }

    async fn evaluate(&mut self, request: EvaluateRequest) -> Result<EvaluateResponse, Status> {
        self.client.evaluate(request).await.map(tonic::Response::into_inner)
    }
}

fn key(steps: u32) -> CalibrationKey {
    let conditions = RunConditions {
        size: Some(ImageSize { width: 32, height: 32 }),
        guidance_scale: 5.0,
        ..Default::default()
    };
    CalibrationKey {
        generator: "0123456789abcdef".into(),
        sampler: "ddim".into(),
        steps,
        conditions: Some(conditions),
    }
}

/// Faint noise around gray: an image of nothing.
fn benign(seed: u64) -> Vec<f32> {
    let mut random = SplitMix64::new(seed);
    (0..PIXELS).map(|_| 0.35 + 0.3 * random.unit()).collect()
}

/// An image of the first concept.
fn axe() -> Vec<f32> {
    TestScorer::image_of(0, 0.02)
}

/// Writes a calibration of the test's generator, made as the `calibrate` command makes it: from raw
/// scores over gRPC, here of one step and the finished image.
async fn calibrate(folder: &Path) {
    let (mut node, _) = TestNode::start(options(folder)).await;
    let info = node.describe().await;
    let images = (0..48).map(|seed| benign(1000 + seed)).collect::<Vec<_>>();
    let request =
        EvaluateRequest { scores_only: true, calibration: None, ..node.request(&images).await };
    let answer = node.evaluate(request).await.expect("scored");
    let recorded = answer.samples.iter().map(|sample| {
        let scores = sample.scores.iter().map(|s| s.score).collect::<Vec<_>>();
        let steps = vec![RecordedStep { time: 0.8, scores: scores.clone() }];
        RecordedImage { steps, finished: scores }
    });
    let recording = Recording {
        generator: key(20).generator,
        generator_name: "tiny".to_owned(),
        sampler: "ddim".to_owned(),
        steps: 20,
        energy_model: info.model_hash,
        preprocessing_version: info.preprocessing_version,
        crops: 1,
        concepts: node.refs().await.into_iter().map(|c| (c.name, c.version)).collect(),
        envelope: Envelope { sizes: vec![(32, 32)], guidance: (5.0, 5.0), negative_prompts: false },
        cells: 1,
        window: (1.0, 0.6),
        prompts: String::new(),
        images: recorded.collect(),
        labelled: Vec::new(),
    };
    let made = maker::make(&recording, 0.1).expect("made");
    made.save(&folder.join("calibrations")).expect("saved");
}

fn assert_refused(status: &Status, code: tonic::Code, part: &str) {
    assert_eq!(status.code(), code, "{part}: {status}");
    assert!(status.message().contains(part), "{part}: {status}");
}
