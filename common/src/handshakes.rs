//! Real handshakes between servers and channels as the product makes them.

use std::{io, path::Path, time::Duration};

use fairlead_proto::v1::{
    AttachRequest, AttachResponse, DeregisterNodeRequest, DeregisterNodeResponse, NodeInfo,
    RegisterNodeRequest, RegisterNodeResponse, RenewNodeRequest, RenewNodeResponse,
    registry_service_client::RegistryServiceClient,
    registry_service_server::{RegistryService, RegistryServiceServer},
    worker_service_client::WorkerServiceClient,
    worker_service_server::{WorkerService, WorkerServiceServer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming, transport::Channel};

use crate::{
    door::{self, ServerArgs},
    grpc::{self, Channels},
    identity::{Peer, Role, Shown},
    testing::Authority,
    tls::{Peers, Tls, TlsArgs},
};

/// Bounds every wait: reached only if something hangs.
const PATIENCE: Duration = Duration::from_secs(60);

async fn patient<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it ends before the test's patience")
}

/// Answers with the serial number of its caller, or with nothing.
struct Mirror;

#[tonic::async_trait]
impl RegistryService for Mirror {
    async fn register_node(
        &self,
        request: Request<RegisterNodeRequest>,
    ) -> Result<Response<RegisterNodeResponse>, Status> {
        let peer = request.extensions().get::<Peer>().expect("every connection has one");
        let registration_id = match &peer.shown {
            Shown::Identity(who) => who.serial.clone(),
            Shown::Nothing | Shown::Unusable(_) => String::new(),
        };
        Ok(Response::new(RegisterNodeResponse { registration_id, ttl_ms: 0 }))
    }

    async fn renew_node(
        &self,
        _: Request<RenewNodeRequest>,
    ) -> Result<Response<RenewNodeResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn deregister_node(
        &self,
        _: Request<DeregisterNodeRequest>,
    ) -> Result<Response<DeregisterNodeResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }
}

#[tonic::async_trait]
impl WorkerService for Mirror {
    type AttachStream = ReceiverStream<Result<AttachResponse, Status>>;

    /// A stream that says one thing and then nothing, for as long as the caller's lasts.
    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (sender, stream) = mpsc::channel(1);
        let mut inbound = request.into_inner();
        tokio::spawn(async move {
            let _ = sender.send(Ok(AttachResponse { message: None })).await;
            while let Ok(Some(_)) = inbound.message().await {}
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Serves on a free port of 127.0.0.1 and returns the port.
async fn serve(tls: &Tls, peers: Peers, args: &ServerArgs) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let incoming = door::open(listener, tls.clone(), peers, args);
    let server = grpc::server()
        .add_service(RegistryServiceServer::new(Mirror))
        .add_service(WorkerServiceServer::new(Mirror));
    tokio::spawn(server.serve_with_incoming(incoming));
    port
}

async fn asked(channel: Channel) -> Result<String, Status> {
    let request = RegisterNodeRequest::default();
    let answer = patient(RegistryServiceClient::new(channel).register_node(request)).await?;
    Ok(answer.into_inner().registration_id)
}

/// What an error says with all its causes.
fn reasons(status: &Status) -> String {
    let mut text = status.to_string();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn tls(authority: &Authority, folder: &Path, role: Role, name: &str) -> Tls {
    authority.write(folder, role, name).load().expect("it is right")
}

fn node(id: &str, port: u16) -> NodeInfo {
    let address = format!("https://127.0.0.1:{port}");
    NodeInfo { node_id: id.into(), address, ..Default::default() }
}

#[tokio::test]
async fn a_channel_leads_to_whom_it_is_for_and_to_nobody_else() {
    let (folder, authority) = (folder(), Authority::new());
    let folder = folder.path();
    let worker = tls(&authority, folder, Role::Worker, "worker-1");
    let args = ServerArgs::default();
    let roles = [Role::Coordinator, Role::Worker, Role::Energy, Role::Operator];
    for role in roles {
        let name = format!("{role}-1");
        let server = tls(&authority, folder, role, &name);
        let port = serve(&server, Peers::Services, &args).await;
        let coordinator =
            grpc::channel(&format!("https://127.0.0.1:{port}"), PATIENCE, &worker).expect("one");
        let channels = Channels::new(PATIENCE, worker.clone());
        for (channel, right) in [
            (coordinator, role == Role::Coordinator),
            (channels.get(&node(&name, port)).expect("an address"), role == Role::Energy),
            (channels.get(&node("other", port)).expect("an address"), false),
        ] {
            match asked(channel).await {
                Ok(serial) => {
                    assert!(right, "{role} was taken for another");
                    assert_eq!(serial, worker.identity().expect("its own").serial);
                }
                Err(status) => {
                    assert!(!right && status.code() == Code::Unavailable, "{role}: {status}");
                    let reasons = reasons(&status);
                    assert!(reasons.contains(&format!("{role} `{name}` answers")), "{reasons}");
                }
            }
        }
    }
}

#[tokio::test]
async fn certificates_of_others_and_of_nobody_are_refused() {
    let (folder, other, authority) = (folder(), Authority::new(), Authority::new());
    let folder = folder.path();
    let args = ServerArgs::default();
    let server = tls(&authority, folder, Role::Coordinator, "coordinator");
    let worker = tls(&authority, folder, Role::Worker, "worker-1");
    let services = serve(&server, Peers::Services, &args).await;
    let anybody = serve(&server, Peers::Anybody, &args).await;
    let ask = async |port, tls: &Tls| {
        let channel = grpc::channel(&format!("https://127.0.0.1:{port}"), PATIENCE, tls);
        asked(channel.expect("an address")).await
    };
    let ca = TlsArgs { tls_ca: authority.write_ca(folder), ..TlsArgs::default() };
    let client = ca.load().expect("it is right");
    assert_eq!(ask(anybody, &client).await.expect("anybody"), "");
    ask(services, &client).await.expect_err("no certificate");
    ask(services, &worker).await.expect("a member");

    // The other authority's servers and clients, at the same host and under the same name.
    let elsewhere = self::folder();
    let stranger = tls(&other, elsewhere.path(), Role::Coordinator, "coordinator");
    for port in [services, anybody] {
        ask(port, &stranger).await.expect_err("of another authority");
    }
    let false_one = serve(&stranger, Peers::Anybody, &args).await;
    ask(false_one, &client).await.expect_err("of another authority");
    // At another host than its certificate is for.
    let (certificate, _) = authority.certificate(&["fairlead://coordinator/c"], &["10.9.9.9"]);
    assert!(!crate::identity::Identity::of(&certificate).expect("right").is_at("127.0.0.1"));
}

#[tokio::test]
async fn nobody_is_called_in_the_clear_where_there_is_an_authority() {
    let (folder, authority) = (folder(), Authority::new());
    let worker = tls(&authority, folder.path(), Role::Worker, "worker-1");
    let ca = TlsArgs { tls_ca: authority.write_ca(folder.path()), ..TlsArgs::default() };
    for tls in [worker, ca.load().expect("it is right")] {
        let error = grpc::channel("http://127.0.0.1:1", PATIENCE, &tls).expect_err("clear");
        assert!(error.to_string().contains("in the clear"), "{error}");
        let addresses = "https://127.0.0.1:1,http://127.0.0.1:2";
        grpc::replicas(addresses, PATIENCE, &tls).map(drop).expect_err("one of them");
        let node = NodeInfo { address: "http://127.0.0.1:1".into(), ..Default::default() };
        let channels = Channels::new(PATIENCE, tls);
        channels.get(&node).map(drop).expect_err("clear");
        channels.fresh(&node).map(drop).expect_err("clear");
    }
}

#[tokio::test]
async fn what_was_renewed_is_used_by_the_next_connection() {
    let (folder, authority) = (folder(), Authority::new());
    let folder = folder.path();
    let server = tls(&authority, folder, Role::Coordinator, "coordinator");
    let worker = tls(&authority, folder, Role::Worker, "worker-1");
    let port = serve(&server, Peers::Services, &ServerArgs::default()).await;
    let address = format!("https://127.0.0.1:{port}");
    let channel = || grpc::channel(&address, PATIENCE, &worker).expect("an address");
    let before = channel();
    let first = asked(before.clone()).await.expect("a member");
    for (tls, role, name) in
        [(&worker, Role::Worker, "worker-1"), (&server, Role::Coordinator, "coordinator")]
    {
        authority.write(folder, role, name);
        assert!(tls.reload().expect("it is right"));
    }
    let second = asked(channel()).await.expect("a member");
    assert_eq!(second, worker.identity().expect("its own").serial);
    assert_ne!(first, second);
    assert_eq!(asked(before).await.expect("it goes on"), first);

    // Another authority: who is of the old one is no member any longer.
    let (old, fresh) = (channel(), Authority::new());
    for (tls, role, name) in
        [(&worker, Role::Worker, "worker-1"), (&server, Role::Coordinator, "coordinator")]
    {
        fresh.write(folder, role, name);
        assert!(tls.reload().expect("it is right"));
    }
    asked(old).await.expect("both have moved");
}

#[tokio::test]
async fn streams_of_the_revoked_end_on_both_sides_and_they_do_not_come_back() {
    for server_revokes in [true, false] {
        let (folder, authority) = (folder(), Authority::new());
        let list = folder.path().join("revoked");
        std::fs::write(&list, "").expect("written");
        let tls = |role, name: &str| {
            let args = authority.write(folder.path(), role, name);
            let args = TlsArgs { tls_revoked: Some(list.clone()), ..args };
            args.load().expect("it is right")
        };
        let server = tls(Role::Coordinator, "coordinator");
        let workers = [tls(Role::Worker, "worker-1"), tls(Role::Worker, "worker-2")];
        let port = serve(&server, Peers::Anybody, &ServerArgs::default()).await;
        let address = format!("https://127.0.0.1:{port}");
        let mut streams = Vec::new();
        for worker in &workers {
            let channel = grpc::channel(&address, PATIENCE, worker).expect("an address");
            let (sender, messages) = mpsc::channel(1);
            let mut client = WorkerServiceClient::new(channel.clone());
            let attached = patient(client.attach(ReceiverStream::new(messages))).await;
            let mut stream = attached.expect("attached").into_inner();
            patient(stream.message()).await.expect("it is there").expect("a message");
            streams.push((channel, sender, stream));
        }
        let (revoked, who) = match server_revokes {
            true => ("worker-1", &server),
            false => ("coordinator/coordinator # stolen", &workers[0]),
        };
        std::fs::write(&list, revoked).expect("written");
        assert!(who.reload().expect("it is right"));
        let mut streams = streams.into_iter();
        let (channel, _sender, mut stream) = streams.next().expect("the first");
        patient(stream.message()).await.expect_err("it ends");
        asked(channel).await.expect_err("it does not come back");
        // The other one goes on.
        let (channel, sender, mut stream) = streams.next().expect("the second");
        asked(channel).await.expect("it is no worse");
        drop(sender);
        assert!(patient(stream.message()).await.expect("an orderly end").is_none());
    }
}

/// Whether the server closes a connection on which nothing comes back.
async fn is_closed(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    let read = patient(stream.read(&mut byte)).await;
    matches!(read, Ok(0)) || read.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn who_never_begins_to_speak_is_shown_out_and_keeps_nobody_waiting() {
    let (folder, authority) = (folder(), Authority::new());
    let server = tls(&authority, folder.path(), Role::Coordinator, "coordinator");
    let worker = tls(&authority, folder.path(), Role::Worker, "worker-1");
    let args = ServerArgs { handshake_timeout: 1, ..ServerArgs::default() };
    let clear = serve(&Tls::default(), Peers::Anybody, &args).await;
    let secret = serve(&server, Peers::Anybody, &args).await;
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".as_slice();
    let cases: [(u16, &[u8]); 6] = [
        (clear, b""),
        (clear, b"PRI * HTTP/2.0\r\n"),
        (clear, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        (secret, b""),
        (secret, hello),
        (secret, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ];
    let mut open = Vec::new();
    for (port, said) in cases {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
        stream.write_all(said).await.expect("it is sent");
        open.push(stream);
    }
    let channel = grpc::channel(&format!("https://127.0.0.1:{secret}"), PATIENCE, &worker);
    asked(channel.expect("an address")).await.expect("nobody waits for them");
    let channel = grpc::channel(&format!("http://127.0.0.1:{clear}"), PATIENCE, &Tls::default());
    asked(channel.expect("an address")).await.expect("nobody waits for them");
    for (index, stream) in open.iter_mut().enumerate() {
        // A server may say why (TLS has alerts) before it closes.
        let mut rest = Vec::new();
        let read = patient(stream.read_to_end(&mut rest)).await;
        assert!(read.is_ok_and(|n| n < 64) || rest.is_empty(), "{index}: {} bytes", rest.len());
    }
}

#[tokio::test]
async fn connections_are_bounded_by_peer_and_members_have_room_of_their_own() {
    let (folder, authority) = (folder(), Authority::new());
    let server = tls(&authority, folder.path(), Role::Coordinator, "coordinator");
    let worker = tls(&authority, folder.path(), Role::Worker, "worker-1");
    let args = ServerArgs { max_connections_per_peer: 2, ..ServerArgs::default() };
    let port = serve(&server, Peers::Anybody, &args).await;
    let address = format!("https://127.0.0.1:{port}");
    let mut members = Vec::new();
    for _ in 0..4 {
        let channel = grpc::channel(&address, PATIENCE, &worker).expect("an address");
        asked(channel.clone()).await.expect("members do not count");
        members.push(channel);
    }
    let stranger = async || TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    let kept = [stranger().await, stranger().await];
    assert!(is_closed(&mut stranger().await).await, "the third is turned away");
    drop(kept);
    // Their places come free as soon as the server sees that they are gone.
    patient(async {
        let channel = grpc::channel(&address, PATIENCE, &worker).expect("an address");
        while asked(channel.clone()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
