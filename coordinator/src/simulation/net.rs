//! gRPC over the simulated network.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use fairlead_common::grpc::{self, AddressError};
use futures::{Stream, stream};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Channel, Uri, server::Connected};
use turmoil::net::{TcpListener, TcpStream};

/// Every server listens here, on a host of its own.
pub(super) const PORT: u16 = 7100;

/// How a host is addressed.
pub(super) fn address(host: &str) -> String {
    format!("http://{host}:{PORT}")
}

/// A channel as the product makes it, but over the simulated network.
pub(super) fn channel(address: &str, timeout: Duration) -> Result<Channel, AddressError> {
    let connector = tower::service_fn(|uri: Uri| async move {
        let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(PORT));
        TcpStream::connect((host, port)).await.map(TokioIo::new)
    });
    Ok(grpc::endpoint(address, timeout)?.connect_with_connector_lazy(connector))
}

/// The connections to this host.
pub(super) async fn incoming() -> io::Result<impl Stream<Item = io::Result<Accepted>>> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    Ok(stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await;
        Some((accepted.map(|(stream, _)| Accepted(stream)), listener))
    }))
}

/// A connection that a server accepted.
pub(super) struct Accepted(TcpStream);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
