//! A connection whose other end is known. It ends when that is revoked.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsStream;
use tonic::transport::server::Connected;

use crate::{
    door::Slot,
    identity::{Expected, Peer, Shown},
    tls::{HandshakeError, Peers, Tls},
};

/// What every client of HTTP/2 says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long the connection and its handshake may take on the side that connects.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

type Revoked = Pin<Box<dyn Future<Output = ()> + Send>>;

/// See the module.
pub struct Connection {
    io: Io,
    /// Of the preface, what its reader has not got yet.
    preface: &'static [u8],
    peer: Peer,
    /// Ends when the other end is revoked.
    revoked: Option<Revoked>,
    /// Counts it while it is there.
    _slot: Option<Slot>,
}

enum Io {
    Clear(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    /// The server's side: speaks TLS if `tls` has a certificate, then waits for the other end's preface.
    pub(crate) async fn accept(
        stream: TcpStream,
        tls: &Tls,
        peers: Peers,
    ) -> Result<Self, HandshakeError> {
        // They do not wait to fill a packet: Nagle's algorithm with delayed acknowledgements adds 40 ms
        // to every answer of more than one.
        stream.set_nodelay(true)?;
        let mut connection = match tls.is_on() {
            false => Self::new(Io::Clear(stream), Shown::Nothing, tls),
            true => {
                let (stream, shown) = tls.accept(stream, peers).await?;
                Self::new(Io::Tls(Box::new(stream)), shown, tls)
            }
        };
        let mut said = [0; PREFACE.len()];
        connection.io.read_exact(&mut said).await?;
        if said != *PREFACE {
            let problem = "the other end does not speak HTTP/2".to_owned();
            return Err(HandshakeError::Peer(problem));
        }
        connection.preface = PREFACE;
        Ok(connection)
    }

    /// The client's side, over TLS.
    pub(crate) async fn connect(
        host: &str,
        port: u16,
        tls: &Tls,
        expected: &Expected,
    ) -> io::Result<Self> {
        let connecting = async {
            let bare = host.trim_start_matches('[').trim_end_matches(']');
            let stream = TcpStream::connect((bare, port)).await?;
            stream.set_nodelay(true)?;
            let (stream, shown) = tls.connect(stream, host, expected).await?;
            Ok::<_, HandshakeError>(Self::new(Io::Tls(Box::new(stream)), shown, tls))
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(HandshakeError::Io(error))) => Err(error),
            Ok(Err(error)) => {
                Err(io::Error::new(io::ErrorKind::PermissionDenied, error.to_string()))
            }
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        }
    }

    fn new(io: Io, shown: Shown, tls: &Tls) -> Self {
        let revoked = match &shown {
            Shown::Identity(who) => Some(Box::pin(tls.clone().revoked(Arc::clone(who))) as Revoked),
            _ => None,
        };
        Self { io, preface: &[], peer: Peer { shown }, revoked, _slot: None }
    }

    /// Who is at the other end.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Counts it by `slot` from now on.
    pub(crate) fn counted(self, slot: Slot) -> Self {
        Self { _slot: Some(slot), ..self }
    }

    /// Fails once the other end is revoked; then its reader wakes.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(revoked) = &mut self.revoked else { return Ok(()) };
        match revoked.as_mut().poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => {
                // Asked again, it would be polled after its end.
                *revoked = Box::pin(std::future::ready(()));
                let problem = "the certificate of the other end was revoked";
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, problem))
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Err(error) = self.check(context) {
            return Poll::Ready(Err(error));
        }
        if !self.preface.is_empty() {
            let (now, later) = self.preface.split_at(self.preface.len().min(buffer.remaining()));
            buffer.put_slice(now);
            self.preface = later;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Calls the same of whichever it is.
macro_rules! either {
    ($io:expr, $stream:ident => $call:expr) => {
        match $io {
            Io::Clear($stream) => $call,
            Io::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self.get_mut(), stream => Pin::new(stream).poll_read(context, buffer))
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), stream => Pin::new(stream).poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), stream => Pin::new(stream).poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), stream => Pin::new(stream).poll_shutdown(context))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), stream => Pin::new(stream).poll_write_vectored(context, parts))
    }

    fn is_write_vectored(&self) -> bool {
        either!(self, stream => stream.is_write_vectored())
    }
}
