//! Prometheus metrics of a process: one recorder for all its services, one page over HTTP.
//!
//! Names are `fairlead_<service>_<what>_<unit>`; labels never name jobs, images or users.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, http::header, routing::get, serve::Listener};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};

/// Upper bounds of the buckets of `_seconds`: from a small model's step to a large model's image.
const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0];
/// Upper bounds of the buckets of `_images`.
const IMAGES: [f64; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];
/// Most connections at once, and how long each may last: a scrape takes far less.
const CONNECTIONS: usize = 32;
const LONGEST: Duration = Duration::from_secs(60);
/// How often what was measured is moved into its buckets.
const UPKEEP: Duration = Duration::from_secs(5);

/// Starts recording. Until then, and in processes that never call it, measuring costs next to nothing.
///
/// # Panics
/// If a constant of this module is wrong.
fn recorder() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
            .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("_images".into()), &IMAGES))
            .expect("buckets are not empty")
            .build_recorder();
        let handle = recorder.handle();
        // It fails where another recorder was installed, which then has the numbers.
        let _ = metrics::set_global_recorder(recorder);
        handle
    })
}

/// Answers `GET /metrics` on `listener`.
///
/// # Errors
/// If the listener fails.
pub async fn serve(listener: TcpListener) -> io::Result<()> {
    serve_bounded(Bounded::new(listener, LONGEST)).await
}

async fn serve_bounded(listener: Bounded) -> io::Result<()> {
    let handle = recorder();
    let page = move || async move {
        ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], handle.render())
    };
    let upkeep = async {
        loop {
            tokio::time::sleep(UPKEEP).await;
            handle.run_upkeep();
        }
    };
    let router = Router::new().route("/metrics", get(page));
    tokio::select! {
        served = axum::serve(listener, router).into_future() => served,
        () = upkeep => Ok(()),
    }
}

/// Takes so many connections at once, each for so long: nobody has to prove who it is.
struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
    longest: Duration,
}

impl Bounded {
    fn new(listener: TcpListener, longest: Duration) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(CONNECTIONS)), longest }
    }
}

impl Listener for Bounded {
    type Io = Brief;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Brief, SocketAddr) {
        let place = Arc::clone(&self.places).acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        let (stream, from) = Listener::accept(&mut self.listener).await;
        (Brief { stream, end: Box::pin(sleep(self.longest)), _place: place }, from)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends in time.
struct Brief {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl Brief {
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl AsyncRead for Brief {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Brief {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn who_says_nothing_makes_room_for_who_asks() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(serve_bounded(Bounded::new(listener, Duration::from_secs(2))));
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(TcpStream::connect(address).await.expect("it listens"));
        }
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        let request = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        for mut stream in silent {
            assert_eq!(stream.read(&mut [0]).await.unwrap_or_default(), 0);
        }
    }
}
