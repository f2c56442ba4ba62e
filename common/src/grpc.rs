//! Channels and servers with the project's limits and deadlines.

use std::{
    collections::HashMap,
    fmt,
    future::poll_fn,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use fairlead_proto::v1::NodeInfo;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rand::Rng;
use tokio::net::TcpListener;
use tokio_stream::Stream;
use tonic::{
    Code,
    body::Body,
    codegen::{Service, StdError as Error, http},
    transport::{Channel, ClientTlsConfig, Endpoint, Server, Uri},
};

use crate::{
    connection::Connection,
    door::{self, ServerArgs},
    identity::Expected,
    tls::{Peers, Tls},
};

/// Time to open a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The port of an address that names none.
const HTTPS: u16 = 443;

/// Most calls at once on one connection, and most bytes of the headers of one.
const MAX_STREAMS: u32 = 128;
const MAX_HEADERS: u32 = 16 << 10;

/// Channels kept; a cluster has fewer energy nodes.
const MAX_CHANNELS: usize = 256;

/// Deadline of a plain request, unless a caller has a reason for another.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A lazily connected channel to a coordinator at `address` ("http://host:port", or with "https" by `tls`)
/// whose calls end after `timeout`. Streams are bounded by it only until their first response headers.
///
/// # Errors
/// If the address is none, or is in the clear where `tls` has an authority.
pub fn channel(address: &str, timeout: Duration, tls: &Tls) -> Result<Channel, AddressError> {
    channel_to(&Expected::coordinator(), address, timeout, tls)
}

/// As [`channel`], to the energy node `node_id`.
///
/// # Errors
/// As [`channel`].
pub fn node_channel(
    node_id: &str,
    address: &str,
    timeout: Duration,
    tls: &Tls,
) -> Result<Channel, AddressError> {
    channel_to(&Expected::node(node_id), address, timeout, tls)
}

fn channel_to(
    expected: &Expected,
    address: &str,
    timeout: Duration,
    tls: &Tls,
) -> Result<Channel, AddressError> {
    let endpoint = endpoint(address, timeout)?;
    let is_secret = endpoint.uri().scheme_str() == Some("https");
    match (is_secret, tls.has_authority()) {
        (false, false) => Ok(endpoint.connect_lazy()),
        (false, true) => Err(AddressError::clear(address)),
        // Of an authority that the system trusts: not the cluster's, so nobody in particular is there.
        (true, false) => {
            let endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots());
            let endpoint = endpoint.map_err(|source| AddressError::malformed(address, source))?;
            Ok(endpoint.connect_lazy())
        }
        (true, true) => {
            let uri = endpoint.uri().clone();
            let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(HTTPS));
            let there = Arc::new((host.to_owned(), port, tls.clone(), expected.clone()));
            let connector = tower::service_fn(move |_: Uri| {
                let there = Arc::clone(&there);
                async move {
                    let (host, port, tls, expected) = &*there;
                    Connection::connect(host, *port, tls, expected).await.map(TokioIo::new)
                }
            });
            // The transport would speak TLS itself where it is told so; the requests say "https".
            let clear = format!("http://{}", uri.authority().map_or(host, |there| there.as_str()));
            let endpoint = self::endpoint(&clear, timeout)?.origin(uri);
            Ok(endpoint.connect_with_connector_lazy(connector))
        }
    }
}

/// Where a channel to `address` connects to, with the project's settings.
///
/// # Errors
/// If the address is none.
pub fn endpoint(address: &str, timeout: Duration) -> Result<Endpoint, AddressError> {
    let endpoint = Endpoint::from_shared(address.to_owned())
        .map_err(|source| AddressError::malformed(address, source))?;
    let has_host = endpoint.uri().host().is_some_and(|host| !host.is_empty());
    // "host:port" is a URI as well, that nothing can connect to.
    if !matches!(endpoint.uri().scheme_str(), Some("http" | "https")) || !has_host {
        let address = address.to_owned();
        return Err(AddressError { address, problem: Problem::Malformed, source: None });
    }
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10)))
}

/// How a channel to a node is made.
type Connect = dyn Fn(&NodeInfo) -> Result<Channel, AddressError> + Send + Sync;

/// Channels to the energy nodes of a cluster, one a name and address, made when they are first asked for;
/// clones share them. Where there is TLS, a channel leads to nobody but the node of that name.
#[derive(Clone)]
pub struct Channels {
    connect: Arc<Connect>,
    open: Arc<Mutex<HashMap<(String, String), Channel>>>,
}

impl fmt::Debug for Channels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channels").field("open", &self.open).finish_non_exhaustive()
    }
}

impl Channels {
    /// Channels as [`node_channel`] makes them.
    pub fn new(timeout: Duration, tls: Tls) -> Self {
        Self::made_by(move |node| node_channel(&node.node_id, &node.address, timeout, &tls))
    }

    /// Channels as `connect` makes them, e.g. over a simulated network.
    pub fn made_by(
        connect: impl Fn(&NodeInfo) -> Result<Channel, AddressError> + Send + Sync + 'static,
    ) -> Self {
        Self { connect: Arc::new(connect), open: Arc::default() }
    }

    /// Another channel to `node`, which knows nothing of what became of earlier connections.
    ///
    /// # Errors
    /// As [`node_channel`].
    pub fn fresh(&self, node: &NodeInfo) -> Result<Channel, AddressError> {
        (self.connect)(node)
    }

    /// The channel to `node`. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// As [`node_channel`].
    pub fn get(&self, node: &NodeInfo) -> Result<Channel, AddressError> {
        let key = (node.node_id.clone(), node.address.clone());
        let mut open = self.open.lock();
        if let Some(channel) = open.get(&key) {
            return Ok(channel.clone());
        }
        let channel = self.fresh(node)?;
        // Nodes that came and went on ports of their own; those that are left connect again.
        if open.len() >= MAX_CHANNELS {
            open.clear();
        }
        open.insert(key, channel.clone());
        Ok(channel)
    }
}

/// Coordinators that serve the same cluster: calls go to one of them until it cannot be reached, says
/// that it is unavailable or is not waited for any longer, then to the next. A call that failed is not
/// repeated; its caller knows whether it may be. Clones move on together.
#[derive(Debug, Clone)]
pub struct Replicas {
    /// Each with its address.
    channels: Arc<[(String, Channel)]>,
    current: Arc<AtomicUsize>,
}

/// Lazily connected channels to `addresses`, separated by commas, as [`channel`] makes them.
pub fn replicas(addresses: &str, timeout: Duration, tls: &Tls) -> Result<Replicas, AddressError> {
    let connect = |address: &str| Ok((address.to_owned(), channel(address, timeout, tls)?));
    let channels: Vec<_> =
        addresses.split(',').map(str::trim).map(connect).collect::<Result<_, _>>()?;
    // Not all clients of a cluster begin with the first.
    let first = rand::rng().random_range(0..channels.len());
    Ok(Replicas { channels: channels.into(), current: Arc::new(AtomicUsize::new(first)) })
}

impl Replicas {
    /// The coordinator that calls go to now.
    pub fn address(&self) -> &str {
        let (address, _) = self.at(self.moves());
        address
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.channels.len()
    }

    /// Counts how often calls have moved on, from a beginning by chance.
    pub fn moves(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Moves on from the one that calls went to after so many `moves`, where nobody has done so since: for
    /// a stream that broke after its call was answered.
    pub fn leave(&self, moves: usize) {
        let next = moves.wrapping_add(1);
        let _ = self.current.compare_exchange(moves, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The one that the `number`th move led to.
    fn at(&self, number: usize) -> &(String, Channel) {
        &self.channels[number % self.channels.len()]
    }
}

impl Service<http::Request<Body>> for Replicas {
    type Response = http::Response<Body>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let turn = Turn { replicas: self.clone(), moves: self.moves(), is_sound: false };
        let (_, mut channel) = self.at(turn.moves).clone();
        Box::pin(async move {
            poll_fn(|context| channel.poll_ready(context)).await?;
            let answer = channel.call(request).await?;
            if !is_unavailable(&answer) {
                turn.ended_well();
            }
            Ok(answer)
        })
    }
}

/// One call; unless it ends well, the next goes to another.
struct Turn {
    replicas: Replicas,
    moves: usize,
    is_sound: bool,
}

impl Turn {
    fn ended_well(mut self) {
        self.is_sound = true;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.is_sound {
            self.replicas.leave(self.moves);
        }
    }
}

/// Whether a server refused at once because it stops or lacks something.
fn is_unavailable(answer: &http::Response<Body>) -> bool {
    let code = answer.headers().get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
    code == Some(Code::Unavailable)
}

/// A server with the project's transport settings, for the connections of [`crate::door::open`].
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .http2_max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(MAX_STREAMS)
}

/// The connections of `listener` in the clear, with the usual limits.
pub fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<Connection>> + use<> {
    door::open(listener, Tls::default(), Peers::Anybody, &ServerArgs::default())
}

/// An address that nothing can, or may, connect to.
#[derive(Debug, thiserror::Error)]
#[error("`{address}` {problem}")]
pub struct AddressError {
    address: String,
    problem: Problem,
    source: Option<tonic::transport::Error>,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("is not an address; write it as http://host:port, or https:// with TLS")]
    Malformed,
    #[error("is in the clear, and where there is a --tls-ca nobody is called so; write https://")]
    Clear,
}

impl AddressError {
    fn malformed(address: &str, source: tonic::transport::Error) -> Self {
        let (address, problem) = (address.to_owned(), Problem::Malformed);
        Self { address, problem, source: Some(source) }
    }

    fn clear(address: &str) -> Self {
        Self { address: address.to_owned(), problem: Problem::Clear, source: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both take connections, and that is all.
    #[tokio::test]
    async fn one_that_is_not_waited_for_is_left() {
        let silent = [0, 1].map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("a port"));
        let silent = silent.each_ref().map(|listener| listener.local_addr().expect("an address"));
        let addresses = silent.map(|address| format!("http://{address}")).join(",");
        let mut both = replicas(&addresses, REQUEST_TIMEOUT, &Tls::default()).expect("addresses");
        let (first, before) = (both.address().to_owned(), both.moves());
        for moves in [1, 2] {
            let call = both.call(http::Request::new(Body::empty()));
            let answer = tokio::time::timeout(Duration::from_millis(50), call).await;
            answer.expect_err("nobody answers");
            assert_eq!(both.moves() - before, moves);
            assert_eq!(both.address() == first, moves == 2);
        }
        // A stream of the first breaks late.
        both.leave(before);
        assert_eq!(both.address(), first);
    }

    #[tokio::test]
    async fn an_address_has_a_scheme_that_can_be_connected_to() {
        let get = |addresses| replicas(addresses, REQUEST_TIMEOUT, &Tls::default());
        let both = get("http://127.0.0.1:7100, http://[::1]:7200").expect("both are addresses");
        assert!(["http://127.0.0.1:7100", "http://[::1]:7200"].contains(&both.address()));
        for wrong in ["127.0.0.1:7100", "localhost:7100", "ftp://host:1", "http://a,b", ""] {
            let error = get(wrong).expect_err(wrong).to_string();
            assert!(error.contains("write it as http://host:port"), "{wrong}: {error}");
        }
    }
}
