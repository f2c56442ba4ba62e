//! Channels and servers with the project's limits and deadlines.

use std::{
    collections::HashMap,
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use parking_lot::Mutex;
use rand::Rng;
use tokio::net::TcpListener;
use tonic::{
    Code,
    body::Body,
    codegen::{Service, StdError as Error, http},
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};

use crate::tls::{Peers, Tls};

/// Time to open a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Channels kept; a cluster has fewer energy nodes.
const MAX_CHANNELS: usize = 256;

/// Deadline of a plain request, unless a caller has a reason for another.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A lazily connected channel to `address` ("http://host:port", or with "https" by `tls`) whose calls end
/// after `timeout`. Streams are bounded by it only until their first response headers.
pub fn channel(address: &str, timeout: Duration, tls: &Tls) -> Result<Channel, AddressError> {
    Ok(endpoint(address, timeout, tls)?.connect_lazy())
}

/// Where [`channel`] connects to, with the project's settings.
pub fn endpoint(address: &str, timeout: Duration, tls: &Tls) -> Result<Endpoint, AddressError> {
    let failed = |source| AddressError { address: address.to_owned(), source: Some(source) };
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(failed)?;
    // "host:port" is a URI as well, that nothing can connect to.
    if !matches!(endpoint.uri().scheme_str(), Some("http" | "https")) {
        return Err(AddressError { address: address.to_owned(), source: None });
    }
    Ok(tls
        .connect(endpoint)
        .map_err(failed)?
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10)))
}

/// How a channel to an address is made.
type Connect = dyn Fn(&str) -> Result<Channel, AddressError> + Send + Sync;

/// Channels to the energy nodes of a cluster, one an address, made when they are first asked for; clones
/// share them.
#[derive(Clone)]
pub struct Channels {
    connect: Arc<Connect>,
    open: Arc<Mutex<HashMap<String, Channel>>>,
}

impl fmt::Debug for Channels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channels").field("open", &self.open).finish_non_exhaustive()
    }
}

impl Channels {
    /// Channels as [`channel`] makes them.
    pub fn new(timeout: Duration, tls: Tls) -> Self {
        Self::made_by(move |address| channel(address, timeout, &tls))
    }

    /// Channels as `connect` makes them, e.g. over a simulated network.
    pub fn made_by(
        connect: impl Fn(&str) -> Result<Channel, AddressError> + Send + Sync + 'static,
    ) -> Self {
        Self { connect: Arc::new(connect), open: Arc::default() }
    }

    /// Another channel to `address`, which knows nothing of what became of earlier connections.
    pub fn fresh(&self, address: &str) -> Result<Channel, AddressError> {
        (self.connect)(address)
    }

    /// The channel to `address`. Call it inside a tokio runtime.
    pub fn get(&self, address: &str) -> Result<Channel, AddressError> {
        let mut open = self.open.lock();
        if let Some(channel) = open.get(address) {
            return Ok(channel.clone());
        }
        let channel = self.fresh(address)?;
        // Nodes that came and went on ports of their own; those that are left connect again.
        if open.len() >= MAX_CHANNELS {
            open.clear();
        }
        open.insert(address.to_owned(), channel.clone());
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

/// A server with the project's transport settings, which lets in `peers` where `tls` has a certificate.
pub fn server(tls: &Tls, peers: Peers) -> Result<Server, tonic::transport::Error> {
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)));
    match tls.server(peers) {
        Some(config) => server.tls_config(config),
        None => Ok(server),
    }
}

/// The connections of `listener`, for `serve_with_incoming`. They do not wait to fill a packet: the
/// builder's own setting does not reach a listener that the caller bound, and Nagle's algorithm
/// with delayed acknowledgements adds 40 ms to every answer of more than one packet.
pub fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// An address that is no URL.
#[derive(Debug, thiserror::Error)]
#[error("`{address}` is not an address; write it as http://host:port, or https:// with TLS")]
pub struct AddressError {
    address: String,
    source: Option<tonic::transport::Error>,
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
