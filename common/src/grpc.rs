//! Channels and servers with the project's limits and deadlines.

use std::time::Duration;

use tokio::net::TcpListener;
use tonic::transport::{Channel, Endpoint, Server, server::TcpIncoming};

/// Time to open a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Deadline of a plain request, unless a caller has a reason for another.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A lazily connected channel to `address` ("http://host:port") whose calls end after `timeout`.
/// Streams are bounded by it only until their first response headers.
pub fn channel(address: &str, timeout: Duration) -> Result<Channel, AddressError> {
    let endpoint = Endpoint::from_shared(address.to_owned())
        .map_err(|source| AddressError { address: address.to_owned(), source })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .connect_lazy())
}

/// A server with the project's transport settings.
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
}

/// The connections of `listener`, for `serve_with_incoming`. They do not wait to fill a packet: the
/// builder's own setting does not reach a listener that the caller bound, and Nagle's algorithm
/// with delayed acknowledgements adds 40 ms to every answer of more than one packet.
pub fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// An address that is no URI.
#[derive(Debug, thiserror::Error)]
#[error("`{address}` is not an address; write it as http://host:port")]
pub struct AddressError {
    address: String,
    source: tonic::transport::Error,
}
