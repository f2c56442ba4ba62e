//! A coordinator and energy nodes that do as they are told, over real gRPC.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fairlead_common::{grpc, picture::sha256, tensor};
use fairlead_proto::{
    PREPROCESSING_VERSION, PROTOCOL_VERSION,
    v1::{
        AddConceptsRequest, AddConceptsResponse, AttachRequest, AttachResponse, CheckRequest,
        CheckResponse, DescribeRequest, DescribeResponse, EnergyEndpoint, EvaluateRequest,
        EvaluateResponse, InputSpec, NodeInfo, WorkerWelcome,
        attach_request::Message,
        attach_response::Message as Reply,
        energy_service_server::{EnergyService, EnergyServiceServer},
        worker_service_server::{WorkerService, WorkerServiceServer},
    },
};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::toy::{SIDE, concept, judge, scores_of};

/// Longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an energy node gets wrong, from its second evaluation on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    NanScore,
    NanGradient,
    ZeroGradient,
    WrongShape,
    NoGradient,
    MissingConcept,
    /// Refuses with UNAVAILABLE.
    Gone,
    /// Answers when the test is over.
    Late,
    /// Refuses for want of a calibration.
    NoCalibration,
    /// Judges other bytes than it was given.
    OtherBytes,
}

/// An energy node in the test's process.
pub(crate) struct Node {
    pub(crate) endpoint: EnergyEndpoint,
    /// Evaluations so far.
    pub(crate) evaluations: Arc<AtomicUsize>,
    stop: CancellationToken,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[derive(Clone)]
struct NodeService {
    gate: f32,
    flaw: Flaw,
    evaluations: Arc<AtomicUsize>,
}

impl Node {
    /// Serves the concept "red" with the toy's scores.
    pub(crate) async fn start(id: &str, gate: f32, flaw: Flaw) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let (stop, evaluations) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
        let service = NodeService { gate, flaw, evaluations: evaluations.clone() };
        let server = grpc::server()
            .add_service(EnergyServiceServer::new(service))
            .serve_with_incoming_shutdown(grpc::incoming(listener), stop.clone().cancelled_owned());
        tokio::spawn(server);
        let node = NodeInfo {
            node_id: id.into(),
            address,
            protocol_version: PROTOCOL_VERSION,
            preprocessing_version: PREPROCESSING_VERSION,
            model_hash: "toy-energy".into(),
            input: Some(InputSpec {
                height: SIDE,
                width: SIDE,
                range_min: 0.0,
                range_max: 1.0,
                max_batch: 2,
                ..Default::default()
            }),
            ..Default::default()
        };
        let endpoint = EnergyEndpoint { node: Some(node), concepts: vec![concept("red")] };
        Self { endpoint, evaluations, stop }
    }
}

#[tonic::async_trait]
impl EnergyService for NodeService {
    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn evaluate(
        &self,
        request: Request<EvaluateRequest>,
    ) -> Result<Response<EvaluateResponse>, Status> {
        assert!(request.metadata().contains_key("grpc-timeout"), "every call has a deadline");
        let request = request.into_inner();
        let wire = request.pixels.ok_or_else(|| Status::invalid_argument("no pixels"))?;
        let (shape, pixels) =
            tensor::decode(&wire).map_err(|e| Status::invalid_argument(e.to_string()))?;
        assert!(shape[0] <= 2, "the node declared a largest batch of 2");
        let gate = if request.scores_only { f32::INFINITY } else { self.gate };
        let (mut samples, mut gradient) =
            scores_of(&pixels, SIDE as usize, &request.concepts, &request.samples, gate);
        let mut shape = vec![shape[0], 3, SIDE as usize, SIDE as usize];
        let count = self.evaluations.fetch_add(1, Ordering::SeqCst);
        match if count > 0 { self.flaw } else { Flaw::None } {
            Flaw::NanScore => samples[0].scores[0].z = f32::NAN,
            Flaw::NanGradient => gradient.fill(f32::NAN),
            Flaw::ZeroGradient => gradient.fill(0.0),
            Flaw::WrongShape => shape = vec![shape[0], 3, SIDE as usize * 2, SIDE as usize / 2],
            Flaw::MissingConcept => samples[0].scores.clear(),
            Flaw::Gone => return Err(Status::unavailable("going away")),
            Flaw::Late => std::future::pending().await,
            Flaw::NoCalibration => {
                return Err(Status::failed_precondition("run `fairlead calibrate`"));
            }
            Flaw::None | Flaw::NoGradient | Flaw::OtherBytes => {}
        }
        let any = samples.iter().any(|sample| sample.amplitude > 0.0);
        let datatype = wire.datatype();
        Ok(Response::new(EvaluateResponse {
            samples,
            gradient: (any && self.flaw != Flaw::NoGradient)
                .then(|| tensor::encode("gradient", &shape, &gradient, datatype)),
            calibration_ids: vec!["calibration-1".into()],
            calibration_fallbacks: Vec::new(),
        }))
    }

    async fn add_concepts(
        &self,
        _: Request<AddConceptsRequest>,
    ) -> Result<Response<AddConceptsResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let request = request.into_inner();
        let (scores, flagged) = judge(&request.png, &request.concepts, self.gate);
        let mut image_sha256 = sha256(&request.png);
        if self.flaw == Flaw::OtherBytes {
            image_sha256 = sha256(b"other bytes");
        }
        Ok(Response::new(CheckResponse {
            scores,
            flagged,
            image_sha256,
            calibration_ids: vec!["calibration-1".into()],
            ..Default::default()
        }))
    }
}

/// One attachment as the coordinator sees it.
pub(crate) struct Attachment {
    replies: mpsc::Sender<Result<AttachResponse, Status>>,
    requests: Streaming<AttachRequest>,
}

impl Attachment {
    /// Sends one message to the worker.
    pub(crate) async fn send(&self, reply: Reply) {
        let response = AttachResponse { message: Some(reply) };
        self.replies.send(Ok(response)).await.expect("the worker is attached");
    }

    /// The worker's next message; none once it has left.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        let message = timeout(PATIENCE, self.requests.message()).await.expect("in time");
        message.ok().flatten().map(|request| request.message.expect("a message"))
    }

    /// The worker's next message that is neither progress nor a renewal.
    pub(crate) async fn result(&mut self) -> Option<Message> {
        loop {
            match self.next().await {
                Some(Message::Progress(_) | Message::Renewal(_)) => {}
                other => return other,
            }
        }
    }
}

/// A coordinator that hands its attachments to the test.
pub(crate) struct Coordinator {
    pub(crate) address: String,
    attachments: mpsc::Receiver<Attachment>,
    stop: CancellationToken,
}

struct HubService(mpsc::Sender<Attachment>);

impl Coordinator {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let (sender, attachments) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let server = grpc::server()
            .add_service(WorkerServiceServer::new(HubService(sender)))
            .serve_with_incoming_shutdown(grpc::incoming(listener), stop.clone().cancelled_owned());
        tokio::spawn(server);
        Self { address, attachments, stop }
    }

    /// The next attachment, greeted; its hello comes first.
    pub(crate) async fn greet(&mut self, lease_ttl: Duration) -> Attachment {
        let mut attachment =
            timeout(PATIENCE, self.attachments.recv()).await.expect("in time").expect("it serves");
        match attachment.next().await {
            Some(Message::Hello(hello)) => {
                assert_eq!(hello.protocol_version, PROTOCOL_VERSION);
                assert_eq!(hello.models[0].name, "toy");
            }
            other => panic!("expected hello, got {other:?}"),
        }
        let lease_ttl_ms = lease_ttl.as_millis() as u32;
        let welcome = WorkerWelcome { coordinator_id: "test".into(), lease_ttl_ms };
        attachment.send(Reply::Welcome(welcome)).await;
        attachment
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tonic::async_trait]
impl WorkerService for HubService {
    type AttachStream =
        Pin<Box<dyn futures::Stream<Item = Result<AttachResponse, Status>> + Send + 'static>>;

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (replies, stream) = mpsc::channel(16);
        let attachment = Attachment { replies, requests: request.into_inner() };
        self.0.send(attachment).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}
