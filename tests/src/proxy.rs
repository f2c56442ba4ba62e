//! A TCP proxy that stands between two services and harms what passes. Its address stays while the
//! service behind it dies and comes back elsewhere.

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::sleep,
};

/// Connections at once; more wait to be accepted.
const MOST_CONNECTIONS: usize = 256;
/// Bytes read before they are passed on, in each direction of a connection.
const CHUNK: usize = 16 * 1024;

/// What happens to bytes on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// They pass.
    Open,
    /// Each chunk waits so long first.
    Slow(Duration),
    /// They wait, and nobody is told: a network that loses every packet.
    Silent,
    /// Connections break, new ones at once.
    Cut,
}

/// Where a proxy leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// "host:port".
    Tcp(String),
    /// A socket's path.
    Unix(PathBuf),
}

impl Target {
    /// The host and port of a URL "http://host:port".
    pub fn url(url: &str) -> Self {
        Self::Tcp(url.trim_start_matches("http://").to_owned())
    }
}

/// A listening proxy; its connections break when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    line: Line,
    serving: JoinHandle<()>,
}

/// What the connections of a proxy share.
#[derive(Debug, Clone)]
struct Line {
    flow: watch::Sender<Flow>,
    target: watch::Sender<Option<Target>>,
}

impl Proxy {
    /// Listens on a free port for connections to `target`; while there is none they are closed.
    pub async fn start(target: Option<Target>) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let line =
            Line { flow: watch::Sender::new(Flow::Open), target: watch::Sender::new(target) };
        let serving = tokio::spawn(line.clone().serve(listener));
        Ok(Self { address, line, serving })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as a gRPC address.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Leads new connections elsewhere, or nowhere.
    pub fn lead(&self, target: Option<Target>) {
        self.line.target.send_replace(target);
    }

    /// Changes what happens to bytes, those under way included.
    pub fn set(&self, flow: Flow) {
        self.line.flow.send_replace(flow);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Line {
    async fn serve(self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => {
                    if let Ok((client, _)) = accepted {
                        connections.spawn(self.clone().carry(client));
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }

    /// One connection, until an end closes it, breaks, or the line is cut.
    async fn carry(self, client: TcpStream) -> io::Result<()> {
        let mut flow = self.flow.subscribe();
        tokio::select! {
            biased;
            _ = flow.wait_for(|flow| *flow == Flow::Cut) => Ok(()),
            carried = self.connect(client) => carried,
        }
    }

    async fn connect(&self, client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        self.pass().await;
        let target = self.target.borrow().clone();
        match target {
            Some(Target::Tcp(address)) => {
                let server = TcpStream::connect(address).await?;
                server.set_nodelay(true)?;
                self.both_ways(client, server).await
            }
            Some(Target::Unix(path)) => {
                self.both_ways(client, UnixStream::connect(path).await?).await
            }
            None => Ok(()),
        }
    }

    async fn both_ways<S>(&self, client: TcpStream, server: S) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite,
    {
        let ((from_client, to_client), (from_server, to_server)) = (split(client), split(server));
        tokio::try_join!(
            self.one_way(from_client, to_server),
            self.one_way(from_server, to_client)
        )?;
        Ok(())
    }

    async fn one_way(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        loop {
            let length = from.read(&mut chunk).await?;
            self.pass().await;
            if length == 0 {
                return to.shutdown().await;
            }
            to.write_all(&chunk[..length]).await?;
        }
    }

    /// Waits for as long as bytes are held back now.
    async fn pass(&self) {
        let mut flow = self.flow.subscribe();
        let passing = flow.wait_for(|flow| *flow != Flow::Silent).await.map(|flow| *flow);
        if let Ok(Flow::Slow(delay)) = passing {
            sleep(delay).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::tcp::OwnedReadHalf;

    /// A server that sends back what it gets.
    async fn echo() -> Target {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.into_split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        Target::Tcp(address)
    }

    async fn five(from: &mut OwnedReadHalf) -> io::Result<[u8; 5]> {
        let mut bytes = [0; 5];
        from.read_exact(&mut bytes).await.map(|_| bytes)
    }

    #[tokio::test]
    async fn bytes_pass_wait_or_break_as_the_line_says() {
        let proxy = Proxy::start(Some(echo().await)).await.expect("a free port");
        let connect = || async {
            TcpStream::connect(proxy.address()).await.expect("it listens").into_split()
        };
        let (mut from, mut to) = connect().await;
        to.write_all(b"hello").await.expect("it is connected");
        assert_eq!(five(&mut from).await.expect("it is open"), *b"hello");

        proxy.set(Flow::Silent);
        to.write_all(b"again").await.expect("nobody is told");
        {
            let answer = five(&mut from);
            tokio::pin!(answer);
            let silence = Duration::from_millis(50);
            assert!(tokio::time::timeout(silence, &mut answer).await.is_err(), "it is silent");
            proxy.set(Flow::Slow(Duration::from_millis(1)));
            assert_eq!(answer.await.expect("nothing is lost"), *b"again");
        }

        proxy.set(Flow::Cut);
        five(&mut from).await.expect_err("the connection broke");
        let (mut from, _to) = connect().await;
        five(&mut from).await.expect_err("new ones break too");
        proxy.set(Flow::Open);
        proxy.lead(None);
        let (mut from, _to) = connect().await;
        five(&mut from).await.expect_err("it leads nowhere");
        proxy.lead(Some(echo().await));
        let (mut from, mut to) = connect().await;
        to.write_all(b"there").await.expect("it is connected");
        assert_eq!(five(&mut from).await.expect("it leads elsewhere"), *b"there");
    }
}
