//! Registration against a coordinator's registry as a test plays it.

use fairlead_proto::v1::{
    DeregisterNodeRequest, DeregisterNodeResponse, RegisterNodeRequest, RegisterNodeResponse,
    RenewNodeRequest, RenewNodeResponse,
    registry_service_server::{RegistryService, RegistryServiceServer},
};
use tokio::sync::{Mutex, mpsc};
use tonic::{Request, Response};

use super::*;
use crate::testing::Fault;

#[derive(Debug)]
enum Call {
    Register(Box<NodeInfo>),
    Renew(RenewNodeRequest),
    Deregister(DeregisterNodeRequest),
}

/// Tells the test of every call and answers what the test says.
struct Registry {
    calls: mpsc::Sender<Call>,
    answers: Mutex<mpsc::Receiver<Result<String, Status>>>,
    ttl_ms: u32,
}

impl Registry {
    async fn answer(&self, call: Call) -> Result<String, Status> {
        let gone = || Status::unavailable("the test is over");
        self.calls.send(call).await.map_err(|_| gone())?;
        self.answers.lock().await.recv().await.unwrap_or_else(|| Err(gone()))
    }
}

#[tonic::async_trait]
impl RegistryService for Registry {
    async fn register_node(
        &self,
        request: Request<RegisterNodeRequest>,
    ) -> Result<Response<RegisterNodeResponse>, Status> {
        let node = request.into_inner().node.expect("a node");
        let registration_id = self.answer(Call::Register(Box::new(node))).await?;
        Ok(Response::new(RegisterNodeResponse { registration_id, ttl_ms: self.ttl_ms }))
    }

    async fn renew_node(
        &self,
        request: Request<RenewNodeRequest>,
    ) -> Result<Response<RenewNodeResponse>, Status> {
        self.answer(Call::Renew(request.into_inner())).await?;
        Ok(Response::new(RenewNodeResponse { ttl_ms: self.ttl_ms }))
    }

    async fn deregister_node(
        &self,
        request: Request<DeregisterNodeRequest>,
    ) -> Result<Response<DeregisterNodeResponse>, Status> {
        self.answer(Call::Deregister(request.into_inner())).await?;
        Ok(Response::new(DeregisterNodeResponse {}))
    }
}

/// The test's side of the registry.
struct Coordinator {
    address: String,
    calls: mpsc::Receiver<Call>,
    answers: mpsc::Sender<Result<String, Status>>,
}

impl Coordinator {
    async fn start(ttl_ms: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let (calls_in, calls) = mpsc::channel(16);
        let (answers, answers_out) = mpsc::channel(16);
        let registry = Registry { calls: calls_in, answers: Mutex::new(answers_out), ttl_ms };
        let serve = grpc::server()
            .add_service(RegistryServiceServer::new(registry))
            .serve_with_incoming(fairlead_common::grpc::incoming(listener));
        tokio::spawn(serve);
        Self { address, calls, answers }
    }

    /// The next call, answered with `answer`.
    async fn next(&mut self, answer: Result<&str, Status>) -> Call {
        self.answers.send(answer.map(str::to_owned)).await.expect("the registry is there");
        self.calls.recv().await.expect("a call")
    }

    async fn node(&self) -> (TempDir, TestNode, Probe) {
        let folder = folder();
        let options =
            EnergyOptions { coordinator: Some(self.address.clone()), ..options(folder.path()) };
        let (node, probe) = TestNode::start(options).await;
        (folder, node, probe)
    }
}

/// Short enough that a test sees renewals.
const SHORT: u32 = 30;

/// Longer than any test.
const LONG: u32 = 3_600_000;

#[tokio::test]
async fn a_node_registers_renews_and_leaves_in_order() {
    let mut coordinator = Coordinator::start(SHORT).await;
    let (_folder, mut node, _) = coordinator.node().await;
    let Call::Register(info) = coordinator.next(Ok("r1")).await else { panic!("registers first") };
    assert_eq!(*info, node.describe().await);
    for _ in 0..3 {
        let call = coordinator.next(Ok("")).await;
        let Call::Renew(renewal) = call else { panic!("renews, not {call:?}") };
        assert_eq!((renewal.node_id.as_str(), renewal.registration_id.as_str()), ("node-1", "r1"));
    }
    node.shutdown.cancel();
    loop {
        // A renewal may have been on its way.
        if let Call::Deregister(request) = coordinator.next(Ok("")).await {
            assert_eq!(request.registration_id, "r1");
            break;
        }
    }
    (&mut node.task).await.expect("no panic").expect("stopped in order");
}

#[tokio::test]
async fn a_node_that_was_forgotten_or_refused_registers_again() {
    let mut coordinator = Coordinator::start(SHORT).await;
    let (_folder, _node, _) = coordinator.node().await;
    let refused = Err(Status::failed_precondition("another protocol version"));
    assert!(matches!(coordinator.next(refused).await, Call::Register(_)));
    assert!(matches!(coordinator.next(Ok("r1")).await, Call::Register(_)));
    let lost = Err(Status::unavailable("restarting"));
    assert!(matches!(coordinator.next(lost).await, Call::Renew(_)));
    let forgotten = Err(Status::not_found("unknown registration"));
    assert!(matches!(coordinator.next(forgotten).await, Call::Renew(_)));
    assert!(matches!(coordinator.next(Ok("r2")).await, Call::Register(_)));
    let Call::Renew(renewal) = coordinator.next(Ok("")).await else { panic!("renews") };
    assert_eq!(renewal.registration_id, "r2");
}

#[tokio::test]
async fn a_broken_model_takes_its_registration_back() {
    let mut coordinator = Coordinator::start(LONG).await;
    let (_folder, mut node, probe) = coordinator.node().await;
    assert!(matches!(coordinator.next(Ok("r1")).await, Call::Register(_)));
    probe.set(Fault::Panic);
    let request = EvaluateRequest { scores_only: true, ..node.request(&[benign(1)]).await };
    node.evaluate(request).await.expect_err("panicked");
    assert!(matches!(coordinator.next(Ok("")).await, Call::Deregister(_)));
}

/// A node that was registered as "r1" and has learned a concept since.
async fn changed() -> (Coordinator, TempDir, TestNode) {
    let mut coordinator = Coordinator::start(LONG).await;
    let (folder, mut node, _) = coordinator.node().await;
    assert!(matches!(coordinator.next(Ok("r1")).await, Call::Register(_)));
    node.client.add_concepts(super::adding::hat()).await.expect("added");
    (coordinator, folder, node)
}

#[tokio::test]
async fn added_concepts_are_announced() {
    let (mut coordinator, _folder, mut node) = changed().await;
    let Call::Register(info) = coordinator.next(Ok("r2")).await else { panic!("registers anew") };
    assert_eq!(*info, node.describe().await);
    assert_eq!(info.concepts.len(), 4);
}

#[tokio::test]
async fn what_is_registered_while_the_node_stops_is_taken_back() {
    let (mut coordinator, _folder, node) = changed().await;
    let call = coordinator.calls.recv().await.expect("a call");
    assert!(matches!(call, Call::Register(_)), "{call:?}");
    // Only now it is answered.
    node.shutdown.cancel();
    coordinator.answers.send(Ok("r2".into())).await.expect("the registry is there");
    let Call::Deregister(request) = coordinator.next(Ok("")).await else { panic!("leaves") };
    assert_eq!(request.registration_id, "r2");
}

#[tokio::test]
async fn a_node_that_stops_while_it_is_refused_leaves_what_it_had() {
    let (mut coordinator, _folder, node) = changed().await;
    let refused = Err(Status::already_exists("another has the name"));
    assert!(matches!(coordinator.next(refused).await, Call::Register(_)));
    node.shutdown.cancel();
    loop {
        // It may have asked once more.
        let again = Err(Status::already_exists("another has the name"));
        if let Call::Deregister(request) = coordinator.next(again).await {
            assert_eq!(request.registration_id, "r1");
            break;
        }
    }
}

#[tokio::test]
async fn new_calibrations_are_picked_up_and_announced() {
    let mut coordinator = Coordinator::start(LONG).await;
    let (folder, mut node, _) = coordinator.node().await;
    let Call::Register(info) = coordinator.next(Ok("r1")).await else { panic!("registers") };
    assert!(info.calibrations.is_empty());
    calibrate(folder.path()).await;
    let Call::Register(info) = coordinator.next(Ok("r2")).await else { panic!("registers anew") };
    assert_eq!(info.calibrations.len(), 1);
    let request = node.request(&[axe()]).await;
    assert!(node.evaluate(request).await.expect("evaluated").samples[0].scores[0].open);
}
