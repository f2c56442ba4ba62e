//! Who may ask a node with a certificate for what.

use fairlead_common::{identity::Role, testing::Authority, tls::TlsArgs};
use fairlead_proto::v1::{AddConceptsRequest, CheckRequest};
use tonic::Code;

use super::*;

struct Secured {
    folder: TempDir,
    authority: Authority,
    address: String,
    _stop: tokio_util::sync::DropGuard,
}

impl Secured {
    /// A node that serves.
    async fn start() -> Self {
        let (folder, authority) = (folder(), Authority::new());
        let tls = authority.write(folder.path(), Role::Energy, "node-1").load().expect("right");
        let options = EnergyOptions { tls, ..options(folder.path()) };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("https://{}", listener.local_addr().expect("an address"));
        let (loader, _) = TestScorer::loader();
        let stop = CancellationToken::new();
        tokio::spawn(run_with_scorer(listener, options, loader, stop.clone()));
        let secured = Self { folder, authority, address, _stop: stop.drop_guard() };
        let mut client = secured.caller(Role::Worker);
        while client.describe(DescribeRequest {}).await.is_err() {
            tokio::task::yield_now().await;
        }
        secured
    }

    fn client(&self, args: &TlsArgs) -> EnergyServiceClient<Channel> {
        let tls = args.load().expect("it is right");
        let channel = grpc::node_channel("node-1", &self.address, DEADLINE, &tls);
        EnergyServiceClient::new(channel.expect("an address"))
    }

    fn caller(&self, role: Role) -> EnergyServiceClient<Channel> {
        self.client(&self.authority.write(self.folder.path(), role, "caller"))
    }
}

#[tokio::test]
async fn every_call_is_for_the_roles_that_need_it() {
    use Code::{InvalidArgument, Ok, PermissionDenied};
    let node = Secured::start().await;
    // Describe, evaluate, check, add concepts. What gets in is refused for being empty.
    for (role, expected) in [
        (Role::Coordinator, [Ok, PermissionDenied, InvalidArgument, InvalidArgument]),
        (Role::Worker, [Ok, InvalidArgument, InvalidArgument, PermissionDenied]),
        (Role::Operator, [Ok, InvalidArgument, PermissionDenied, InvalidArgument]),
        (Role::Energy, [PermissionDenied; 4]),
    ] {
        let mut client = node.caller(role);
        let code = |error: Option<Status>| error.map_or(Ok, |status| status.code());
        let found = [
            code(client.describe(DescribeRequest {}).await.err()),
            code(client.evaluate(EvaluateRequest::default()).await.err()),
            code(client.check(CheckRequest::default()).await.err()),
            code(client.add_concepts(AddConceptsRequest::default()).await.err()),
        ];
        assert_eq!(found, expected, "{role}");
    }
    // Who has no certificate does not even connect.
    let ca = node.authority.write_ca(node.folder.path());
    let mut stranger = node.client(&TlsArgs { tls_ca: ca, ..TlsArgs::default() });
    stranger.describe(DescribeRequest {}).await.expect_err("no certificate");
}

#[tokio::test]
async fn a_node_is_named_and_reached_as_its_certificate_says() {
    let (folder, authority) = (folder(), Authority::new());
    let tls = authority.write(folder.path(), Role::Energy, "node-1").load().expect("right");
    let start = async |change: fn(&mut EnergyOptions)| {
        let mut options = EnergyOptions { tls: tls.clone(), ..options(folder.path()) };
        change(&mut options);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let (loader, _) = TestScorer::loader();
        let run = run_with_scorer(listener, options, loader, CancellationToken::new());
        run.await.expect_err("refused").to_string()
    };
    let named = start(|options| options.node_id = "node-2".into()).await;
    assert!(named.contains("--node-id is `node-2`, but the certificate is for"), "{named}");
    let odd = start(|options| options.node_id = "node\u{1b}c".into()).await;
    assert!(odd.contains("--node-id `node\\u{1b}c` must be"), "{odd}");
    let clear = start(|options| options.advertise = Some("http://localhost:1".into())).await;
    assert!(clear.contains("--advertise") && clear.contains("in the clear"), "{clear}");
    let away = start(|options| options.advertise = Some("https://10.0.0.9:1".into())).await;
    assert!(away.contains("--role energy --name node-1 --host 10.0.0.9"), "{away}");
}

#[tokio::test]
async fn reflection_and_health_can_be_shut() {
    use fairlead_common::door::{ServerArgs, Switch};
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    };
    let folder = folder();
    for (switch, expected) in [(Switch::On, None), (Switch::Off, Some(Code::Unimplemented))] {
        let server = ServerArgs { reflection: switch, health: switch, ..Default::default() };
        let options = EnergyOptions { server, ..options(folder.path()) };
        let (loader, _) = TestScorer::loader();
        let mut node = TestNode::spawn(options, loader).await;
        while node.client.describe(DescribeRequest {}).await.is_err() {
            tokio::task::yield_now().await;
        }
        assert_eq!(node.health("").await.err().map(|status| status.code()), expected);
        let mut reflection = ServerReflectionClient::new(node.channel.clone());
        let requests = tokio_stream::iter([ServerReflectionRequest::default()]);
        let answer = reflection.server_reflection_info(requests).await;
        assert_eq!(answer.err().map(|status| status.code()), expected);
    }
}
