//! Who may do what in a cluster with TLS: every call with the certificate of every role, and attempts to be
//! somebody else.

use std::path::Path;

use fairlead_common::{
    door, grpc,
    identity::Role,
    testing::Authority,
    tls::{Peers, Tls, TlsArgs},
};
use fairlead_coordinator::CoordinatorOptions;
use fairlead_proto::v1::{
    self, AttachRequest, NodeInfo, attach_request::Message as Up,
    catalog_service_client::CatalogServiceClient, energy_service_server::EnergyServiceServer,
    registry_service_client::RegistryServiceClient, worker_service_client::WorkerServiceClient,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

use crate::{
    cluster::{PATIENCE, assert_status, options, patient},
    node::{Deaf, describe},
    worker::hello,
};

/// A coordinator with a certificate, and the authority of its cluster.
struct Secured {
    folder: tempfile::TempDir,
    authority: Authority,
    address: String,
    _stop: tokio_util::sync::DropGuard,
}

impl Secured {
    async fn start() -> Self {
        let (folder, authority) = (tempfile::tempdir().expect("a folder"), Authority::new());
        let tls = load(&authority.write(folder.path(), Role::Coordinator, "coordinator"));
        let options = CoordinatorOptions { tls, ..options() };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let stop = CancellationToken::new();
        tokio::spawn(fairlead_coordinator::run(listener, options, stop.clone()));
        // By name and by address.
        let address = format!("https://localhost:{port}");
        Self { folder, authority, address, _stop: stop.drop_guard() }
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn tls(&self, role: Role, name: &str) -> Tls {
        load(&self.authority.write(self.folder(), role, name))
    }

    fn channel(&self, tls: &Tls) -> Channel {
        grpc::channel(&self.address, PATIENCE, tls).expect("an address")
    }

    /// Somebody of this role and name.
    fn member(&self, role: Role, name: &str) -> Caller {
        Caller(self.channel(&self.tls(role, name)))
    }

    /// Somebody who has no certificate.
    fn stranger(&self) -> Caller {
        let tls_ca = self.authority.write_ca(self.folder());
        Caller(self.channel(&load(&TlsArgs { tls_ca, ..TlsArgs::default() })))
    }
}

fn load(args: &TlsArgs) -> Tls {
    args.load().expect("it is right")
}

#[derive(Clone)]
struct Caller(Channel);

impl Caller {
    async fn register(&self, node: NodeInfo) -> Result<String, Status> {
        let mut client = RegistryServiceClient::new(self.0.clone());
        let request = v1::RegisterNodeRequest { node: Some(node) };
        Ok(patient(client.register_node(request)).await?.into_inner().registration_id)
    }

    async fn renew(&self, node_id: &str, registration_id: &str) -> Result<(), Status> {
        let mut client = RegistryServiceClient::new(self.0.clone());
        let request = v1::RenewNodeRequest {
            node_id: node_id.into(),
            registration_id: registration_id.into(),
        };
        patient(client.renew_node(request)).await.map(drop)
    }

    async fn deregister(&self, node_id: &str, registration_id: &str) -> Result<(), Status> {
        let mut client = RegistryServiceClient::new(self.0.clone());
        let request = v1::DeregisterNodeRequest {
            node_id: node_id.into(),
            registration_id: registration_id.into(),
        };
        patient(client.deregister_node(request)).await.map(drop)
    }

    /// The first answer to a hello.
    async fn attach(&self, worker_id: &str) -> Result<(), Status> {
        let first = AttachRequest { message: Some(Up::Hello(hello(worker_id, 1))) };
        let (sender, stream) = tokio::sync::mpsc::channel(1);
        sender.send(first).await.expect("there is room");
        let mut client = WorkerServiceClient::new(self.0.clone());
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut answers = patient(client.attach(stream)).await?.into_inner();
        patient(answers.message()).await.map(drop)
    }

    async fn retire(&self) -> Result<(), Status> {
        let mut client = CatalogServiceClient::new(self.0.clone());
        let request = v1::RetireConceptRequest { concept: "nothing".into() };
        patient(client.retire_concept(request)).await.map(drop)
    }

    async fn deploy(&self) -> Result<v1::DeployConceptsResponse, Status> {
        let mut client = CatalogServiceClient::new(self.0.clone());
        let request = v1::DeployConceptsRequest::default();
        patient(client.deploy_concepts(request)).await.map(tonic::Response::into_inner)
    }

    async fn models(&self) -> Result<(), Status> {
        let mut client = CatalogServiceClient::new(self.0.clone());
        patient(client.list_models(v1::ListModelsRequest {})).await.map(drop)
    }
}

fn node(id: &str, address: &str) -> NodeInfo {
    describe(id, address, "clip", &["axe"])
}

/// Nobody listens there.
const NOBODY: &str = "https://127.0.0.1:1";

fn code(result: Result<(), Status>) -> Code {
    result.err().map_or(Code::Ok, |status| status.code())
}

#[tokio::test]
async fn every_call_is_for_the_roles_that_need_it() {
    use Code::{NotFound, Ok, PermissionDenied, Unauthenticated};
    use Role::{Coordinator, Energy, Operator, Worker};
    let cluster = Secured::start().await;
    let certificate = cluster.authority.write_for(cluster.folder(), "old", &[]);
    // Made before there were roles.
    let old = certificate.load().expect_err("it is for nobody").to_string();
    assert!(old.contains("`fairlead keys tls --role"), "{old}");

    // Registration, renewal, end of it; stream; what all share; what anybody may ask.
    let table = [
        (Some(Energy), [Ok, NotFound, NotFound, PermissionDenied, PermissionDenied, Ok]),
        (
            Some(Worker),
            [PermissionDenied, PermissionDenied, PermissionDenied, Ok, PermissionDenied, Ok],
        ),
        (
            Some(Coordinator),
            [
                PermissionDenied,
                PermissionDenied,
                PermissionDenied,
                PermissionDenied,
                PermissionDenied,
                Ok,
            ],
        ),
        (
            Some(Operator),
            [PermissionDenied, PermissionDenied, PermissionDenied, PermissionDenied, NotFound, Ok],
        ),
        (
            None,
            [
                Unauthenticated,
                Unauthenticated,
                Unauthenticated,
                Unauthenticated,
                Unauthenticated,
                Ok,
            ],
        ),
    ];
    for (role, expected) in table {
        let caller = match role {
            Some(role) => cluster.member(role, "name"),
            None => cluster.stranger(),
        };
        let found = [
            code(caller.register(node("name", NOBODY)).await.map(drop)),
            code(caller.renew("name", "none").await),
            code(caller.deregister("name", "none").await),
            code(caller.attach("name").await),
            code(caller.retire().await),
            code(caller.models().await),
        ];
        assert_eq!(found, expected, "{role:?}");
    }
    let refused = cluster.member(Worker, "worker-1").register(node("worker-1", NOBODY)).await;
    assert_status(refused, PermissionDenied, "for the role energy, the certificate is for worker");
    let refused = cluster.stranger().attach("w").await;
    assert_status(refused, Unauthenticated, "`fairlead keys tls --role worker --name NAME`");
}

#[tokio::test]
async fn nobody_takes_the_name_or_the_place_of_another() {
    let cluster = Secured::start().await;
    let own = cluster.member(Role::Energy, "energy-1");
    let registration = own.register(node("energy-1", NOBODY)).await.expect("its own name");

    let other = cluster.member(Role::Energy, "energy-2");
    let refused = other.register(node("energy-1", NOBODY)).await;
    assert_status(refused, Code::PermissionDenied, "not who the certificate is for");
    let refused = other.renew("energy-1", &registration).await;
    assert_status(refused, Code::PermissionDenied, "not who the certificate is for");
    let refused = other.deregister("energy-1", &registration).await;
    assert_status(refused, Code::PermissionDenied, "not who the certificate is for");
    own.renew("energy-1", &registration).await.expect("nobody took it");

    for (address, code, part) in [
        ("http://127.0.0.1:1", Code::InvalidArgument, "in the clear"),
        ("https://10.0.0.9:1", Code::PermissionDenied, "not for the host `10.0.0.9`"),
        ("https://127.0.0.1@10.0.0.9:1", Code::PermissionDenied, "not for the host `10.0.0.9`"),
    ] {
        assert_status(own.register(node("energy-1", address)).await, code, part);
    }
    own.renew("energy-1", &registration).await.expect("what was refused changed nothing");
    // The same name with a renewed certificate.
    let renewed = cluster.member(Role::Energy, "energy-1");
    renewed.register(node("energy-1", NOBODY)).await.expect("it is the same node");

    let worker = cluster.member(Role::Worker, "worker-1");
    for part in ["worker-1", "worker-1/2"] {
        worker.attach(part).await.expect(part);
    }
    let thief = cluster.member(Role::Worker, "worker-2");
    for id in ["worker-1", "worker-1/2", "worker-20"] {
        let refused = thief.attach(id).await;
        assert_status(refused, Code::PermissionDenied, "not who the certificate is for");
    }
}

#[tokio::test]
async fn a_coordinator_asks_nobody_but_the_node_itself() {
    let cluster = Secured::start().await;
    let operator = cluster.member(Role::Operator, "alice");
    // At the address of energy-1 answers whoever has the certificate of `who`.
    for (role, who, part) in [
        (Role::Energy, "energy-2", "energy `energy-2` answers there, not energy `energy-1`"),
        (Role::Worker, "energy-1", "worker `energy-1` answers there, not energy `energy-1`"),
        (Role::Energy, "energy-1", "Unimplemented: not needed here"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = format!("https://{}", listener.local_addr().expect("an address"));
        let tls = cluster.tls(role, who);
        let incoming = door::open(listener, tls, Peers::Services, &door::ServerArgs::default());
        let server = grpc::server().add_service(EnergyServiceServer::new(Deaf));
        let server = tokio::spawn(server.serve_with_incoming(incoming));
        let own = cluster.member(Role::Energy, "energy-1");
        let registration = own.register(node("energy-1", &address)).await.expect("its own name");
        let deployed = operator.deploy().await.expect("asked");
        let [deployment] = deployed.deployments.as_slice() else { panic!("{deployed:?}") };
        assert!(deployment.error.contains(part), "{}", deployment.error);
        own.deregister("energy-1", &registration).await.expect("registered");
        server.abort();
    }
}
