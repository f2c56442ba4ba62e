//! Starts, runs and stops a node.

use std::{path::PathBuf, sync::Arc, time::Duration};

use fairlead_common::{
    bounds,
    clock::unix_ms,
    door,
    follow::follow,
    grpc::{self, Replicas, replicas},
    identity::Identity as Certified,
    tls::Peers,
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic_health::server::HealthReporter;

use crate::{
    concepts::ConceptSet,
    config::EnergyOptions,
    crops::MAX_CROPS,
    engine::{self, EngineState},
    error::{Error, RequestError},
    grpc::{EnergyGrpc, NodeCell, reflection, set_health},
    kept,
    offer::Offer,
    register::{self, keep_registered},
    scorer::{Contrastive, ScorerLoader},
    served::Served,
    service::{Folders, Identity, Node},
};

/// Time that calls in flight get to end after a shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves the energy model of `options` on `listener` until `shutdown`.
///
/// It answers from the start: until the model is loaded, health says NOT_SERVING and every call is
/// UNAVAILABLE. With a coordinator it is registered once loaded, and deregistered before it stops.
///
/// # Errors
/// If concepts, calibrations, model or options are unusable, or the server fails. A model that
/// breaks later does not end the node: health says NOT_SERVING and every call says why.
pub async fn run(
    listener: TcpListener,
    options: EnergyOptions,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let (model, device) = (options.model.clone(), options.device);
    let loader: ScorerLoader =
        Box::new(move |concepts| Ok(Box::new(Contrastive::load(&model, device, concepts)?)));
    run_with_scorer(listener, options, loader, shutdown).await
}

/// As [`run`], with another scorer than the model in `options.model`, which is not looked at.
///
/// # Errors
/// As [`run`].
pub async fn run_with_scorer(
    listener: TcpListener,
    options: EnergyOptions,
    loader: ScorerLoader,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let identity = identity(&options, &listener)?;
    let registry = options
        .coordinator
        .as_deref()
        .map(|coordinator| replicas(coordinator, register::CALL_TIMEOUT, &options.tls))
        .transpose()?;
    let concepts = concept_sets(&options)?;
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, None, false).await;
    let cell = NodeCell::default();
    let stop_serving = CancellationToken::new();
    let incoming = door::open(listener, options.tls.clone(), Peers::Services, &options.server);
    let serve = grpc::server()
        .add_optional_service(options.server.health.then(health_service))
        .add_optional_service(options.server.reflection.then(reflection()?))
        .add_service(EnergyGrpc::server(cell.clone(), options.tls.is_on()))
        .serve_with_incoming_shutdown(incoming, stop_serving.clone().cancelled_owned());
    tokio::pin!(serve);
    tracing::info!(address = %identity.address, "energy node listening, loading its model");
    let live = async {
        let loaded = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            loaded = load(&options, loader, concepts, identity) => loaded?,
        };
        live(loaded, &cell, &health, registry, &shutdown).await;
        Ok::<(), Error>(())
    };
    tokio::select! {
        served = &mut serve => return Ok(served?),
        ended = live => ended?,
    }
    stop_serving.cancel();
    match tokio::time::timeout(DRAIN_TIMEOUT, serve).await {
        Ok(served) => served?,
        Err(_) => tracing::warn!("calls still open after {DRAIN_TIMEOUT:?}, closing them"),
    }
    tracing::info!("energy node stopped");
    Ok(())
}

/// A loaded node's life: announce it, keep what others know of it true, take it back.
async fn live(
    node: Arc<Node>,
    cell: &NodeCell,
    health: &HealthReporter,
    registry: Option<Replicas>,
    shutdown: &CancellationToken,
) {
    cell.get_or_init(|| node.clone());
    let mut offers = node.offers();
    set_health(health, Some(&node), true).await;
    tracing::info!(concepts = node.offer().served.concepts.len(), "energy node serving");
    let mut tasks = JoinSet::new();
    match registry {
        Some(registry) => {
            tasks.spawn(keep_registered(registry, node.clone(), shutdown.clone()));
        }
        None => {
            tracing::info!("registered nowhere: no --coordinator, so only who knows it will ask")
        }
    }
    if let Some(directory) = node.folders().calibrations.clone() {
        if !directory.is_dir() {
            let folder = directory.display();
            tracing::warn!(
                "--calibrations: there is no folder {folder} yet; without calibrations only policies with \
                 allow_calibration_fallback or observe_only have jobs"
            );
        }
        tasks.spawn(reload_calibrations(node.clone(), directory, shutdown.clone()));
    }
    let mut engine = node.engine().state();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            () = broken(&mut engine) => break,
            Ok(()) = offers.changed() => set_health(health, Some(&node), true).await,
        }
    }
    set_health(health, Some(&node), false).await;
    shutdown.cancelled().await;
    // Deregistered before the server stops, so that nobody is sent to a node that is gone.
    while tasks.join_next().await.is_some() {}
}

async fn broken(engine: &mut watch::Receiver<EngineState>) {
    // An engine that is gone is broken, too.
    let _ = engine.wait_for(|state| *state != EngineState::Serving).await;
}

async fn load(
    options: &EnergyOptions,
    loader: ScorerLoader,
    (first, added): (ConceptSet, Vec<ConceptSet>),
    identity: Identity,
) -> Result<Arc<Node>, Error> {
    let engine = engine::start(loader, first.clone(), options.batching()).await?;
    let mut served = Served::by(&engine.description);
    let now = unix_ms();
    let refused = |error: RequestError| Error::Option {
        option: "--added-concepts",
        why: format!("holds a pack that cannot be served: {error}"),
    };
    if let (_, Some(with)) = served.with(&first, now).map_err(refused)? {
        served = with;
    }
    for set in added {
        if served.has_all(&set) {
            tracing::info!("concepts that were added before have come to --concepts meanwhile");
            continue;
        }
        if let (_, Some(with)) = served.with(&set, now).map_err(refused)? {
            engine.handle.learn(set).await.map_err(refused)?;
            served = with;
        }
    }
    let folders = Folders {
        calibrations: options.calibrations.clone(),
        added_concepts: options.added_concepts.clone(),
    };
    let calibrations = folders.calibrations_of(&served)?;
    let offer = Offer { served, calibrations };
    Ok(Arc::new(Node::new(engine.handle, engine.description, offer, folders, identity)))
}

/// The set of --concepts, and those that were added before.
fn concept_sets(options: &EnergyOptions) -> Result<(ConceptSet, Vec<ConceptSet>), Error> {
    let first = ConceptSet::load(&options.concepts)?;
    let added = options.added_concepts.as_deref().map(kept::read).transpose()?;
    Ok((first, added.unwrap_or_default()))
}

/// Checks the options and says who the node is.
fn identity(options: &EnergyOptions, listener: &TcpListener) -> Result<Identity, Error> {
    let refused = |option, why: String| Err(Error::Option { option, why });
    if !(1..=MAX_CROPS).contains(&options.crops) {
        return refused("--crops", format!("is {}, must be 1 to {MAX_CROPS}", options.crops));
    }
    if options.queue == 0 {
        return refused("--queue", "is 0, must be at least 1".to_owned());
    }
    if let Err(problem) = bounds::name(&options.node_id) {
        return refused("--node-id", format!("{problem}; leave it out for a random name"));
    }
    let own = options.tls.identity();
    if let Some(own) = own.as_ref().filter(|own| own.name != options.node_id) {
        let why =
            format!("is `{}`, but the certificate is for {own}; leave it out", options.node_id);
        return refused("--node-id", why);
    }
    let address = listener.local_addr().map_err(|source| Error::System {
        what: "the listener has no address".to_owned(),
        source,
    })?;
    let address = match &options.advertise {
        Some(advertised) => advertised.clone(),
        None if address.ip().is_unspecified() && options.coordinator.is_some() => {
            let why = format!(
                "is needed: nobody can reach a node at {address}; give the address that workers \
                 see, e.g. http://10.0.0.7:{}",
                address.port()
            );
            return refused("--advertise", why);
        }
        None => format!("{}://{address}", options.tls.scheme()),
    };
    // Refused here rather than by the first worker that tries it.
    check_address(&address, own.as_deref())
        .map_err(|why| Error::Option { option: "--advertise", why })?;
    Ok(Identity { node_id: options.node_id.clone(), address, crops: options.crops })
}

/// Refuses an address that others would not call: none at all, or where services show certificates, one in
/// the clear or that the own certificate is not for.
fn check_address(address: &str, own: Option<&Certified>) -> Result<(), String> {
    let endpoint = grpc::endpoint(address, register::CALL_TIMEOUT).map_err(|e| e.to_string())?;
    let Some(own) = own else { return Ok(()) };
    if endpoint.uri().scheme_str() != Some("https") {
        return Err(format!(
            "`{address}` is in the clear, and this node speaks TLS; write https://"
        ));
    }
    let host = endpoint.uri().host().unwrap_or_default();
    match own.is_at(host) {
        true => Ok(()),
        false => Err(format!(
            "others would reach this node at `{host}`, which its certificate is not for; give an address at a \
             host that it is for, or make one with `fairlead keys tls --role energy --name {} --host {host}`",
            own.name
        )),
    }
}

/// Picks up calibrations that come or go while the node runs. A file half written or broken changes
/// nothing.
async fn reload_calibrations(node: Arc<Node>, directory: PathBuf, shutdown: CancellationToken) {
    let look = move || node.reload(&directory);
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = follow("calibrations", look, || ()) => {}
    }
}
