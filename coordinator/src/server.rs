//! The server: from a bound listener to a clean end.

use std::{future::Future, io, path::PathBuf, time::Duration};

use fairlead_common::{
    door::{self, ServerArgs},
    tls::Peers,
};
use fairlead_proto::{
    FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES,
    v1::{
        catalog_service_server::CatalogServiceServer,
        generation_service_server::GenerationServiceServer,
        registry_service_server::RegistryServiceServer, worker_service_server::WorkerServiceServer,
    },
};
use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::{
    config::CoordinatorOptions,
    error::{Error, Result},
    grpc::Grpc,
    health::Health,
    service::Coordinator,
};

/// How long connections may take to end once every stream has.
const CONNECTION_GRACE: Duration = Duration::from_secs(2);

/// Largest request of a client or an energy node: words. It is read before anybody asks who sent it.
const MAX_REQUEST_BYTES: usize = 8 << 20;

/// The project's message limits on both directions of a service, whose requests have at most so many bytes.
macro_rules! limits {
    ($service:expr, $request:expr) => {
        $service.max_decoding_message_size($request).max_encoding_message_size(MAX_MESSAGE_BYTES)
    };
}

/// Serves on `listener` until `shutdown`, then stops admission, gives running shards their grace,
/// ends all streams and closes the store.
pub async fn run(
    listener: TcpListener,
    options: CoordinatorOptions,
    shutdown: CancellationToken,
) -> Result<()> {
    let address = listener
        .local_addr()
        .map_err(|source| Error::Io { what: "listener".to_owned(), source })?;
    let coordinator = Coordinator::start(options.clone()).await?;
    tracing::info!(%address, id = options.coordinator_id, data = ?options.data, "coordinator ready");
    let incoming = door::open(listener, options.tls.clone(), Peers::Anybody, &options.server);
    serve_until(incoming, coordinator, options, shutdown).await
}

/// Serves the connections of `incoming` as [`run`] does.
pub(crate) async fn serve_until<I>(
    incoming: impl Stream<Item = io::Result<I>>,
    coordinator: Coordinator,
    options: CoordinatorOptions,
    shutdown: CancellationToken,
) -> Result<()>
where
    I: AsyncRead + AsyncWrite + Connected + Send + Unpin + 'static,
{
    let ended = CancellationToken::new();
    let server = serve(incoming, coordinator.clone(), options.server, ended.clone());
    tokio::pin!(server);
    tokio::select! {
        served = &mut server => return served,
        () = shutdown.cancelled() => {}
        () = forget_old(&coordinator) => {}
        () = follow_policies(&coordinator, options.policies_file) => {}
    }
    tracing::info!("coordinator stopping");
    // The server goes on while running shards finish and clients watch them.
    tokio::select! {
        served = &mut server => return served,
        () = coordinator.stop() => {}
    }
    ended.cancel();
    match tokio::time::timeout(CONNECTION_GRACE, server).await {
        Ok(served) => served?,
        Err(_) => tracing::warn!("connections were still open and are cut"),
    }
    tracing::info!("coordinator stopped");
    Ok(())
}

async fn follow_policies(coordinator: &Coordinator, file: Option<PathBuf>) {
    match file {
        Some(file) => coordinator.access().follow(file).await,
        None => std::future::pending().await,
    }
}

async fn forget_old(coordinator: &Coordinator) {
    let mut retention = coordinator.retention();
    let mut interval = tokio::time::interval(retention.pause());
    loop {
        interval.tick().await;
        match retention.look().await {
            Ok(0) => {}
            Ok(jobs) => tracing::info!(jobs, "jobs past their retention were deleted"),
            Err(error) => tracing::error!(%error, "cannot delete old jobs"),
        }
    }
}

fn serve<I>(
    incoming: impl Stream<Item = io::Result<I>>,
    coordinator: Coordinator,
    shown: ServerArgs,
    ended: CancellationToken,
) -> impl Future<Output = Result<()>>
where
    I: AsyncRead + AsyncWrite + Connected + Send + Unpin + 'static,
{
    let grpc = Grpc::new(coordinator.clone());
    async move {
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let health = Health::new(coordinator, reporter).await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .expect("the descriptors come from the build");
        let server = fairlead_common::grpc::server()
            .add_optional_service(shown.health.then(health_service))
            .add_optional_service(shown.reflection.then(reflection))
            .add_service(limits!(GenerationServiceServer::new(grpc.clone()), MAX_REQUEST_BYTES))
            .add_service(limits!(CatalogServiceServer::new(grpc.clone()), MAX_REQUEST_BYTES))
            .add_service(limits!(RegistryServiceServer::new(grpc.clone()), MAX_REQUEST_BYTES))
            .add_service(limits!(WorkerServiceServer::new(grpc), MAX_MESSAGE_BYTES))
            .serve_with_incoming_shutdown(incoming, ended.cancelled());
        tokio::select! {
            served = server => Ok(served?),
            () = health.follow() => Ok(()),
        }
    }
}
