//! The door of a server: how many may be inside, and how long a stranger may stand in it. Limits hold before
//! anybody has proved who it is.

use std::{
    collections::HashMap,
    hash::Hash,
    io,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use clap::{Args, ValueEnum};
use metrics::counter;
use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
    time::Instant,
};
use tokio_stream::{Stream, wrappers::ReceiverStream};

use crate::{
    connection::Connection,
    identity::Shown,
    tls::{HandshakeError, Peers, Tls},
};

/// What strangers may take unless it is said otherwise.
const MAX_CONNECTIONS: u32 = 512;
const MAX_CONNECTIONS_PER_PEER: u32 = 128;
const HANDSHAKE_SECONDS: u32 = 10;

/// Connections that one certificate may have beside those of strangers.
const MOST_OF_A_MEMBER: usize = 64;

/// Connections that are through the door and that the server has not taken yet.
const READY: usize = 16;

/// Pause after the system could not give a connection, e.g. because there are too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// How often it is said that connections are turned away.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// Whether something is there for everybody who can connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is.
    On,
    /// It is not.
    Off,
}

impl Switch {
    /// `service` if it is on.
    pub fn then<T>(self, service: T) -> Option<T> {
        (self == Self::On).then_some(service)
    }
}

/// What a server shows to everybody who can connect, and how many of them it bears.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(next_help_heading = "Connections")]
pub struct ServerArgs {
    /// Whether gRPC reflection tells everybody who can connect which calls there are.
    #[arg(
        long,
        value_enum,
        env = "FAIRLEAD_REFLECTION",
        default_value = "on",
        value_name = "ON|OFF"
    )]
    pub reflection: Switch,

    /// Whether gRPC health tells everybody who can connect what is served.
    #[arg(long, value_enum, env = "FAIRLEAD_HEALTH", default_value = "on", value_name = "ON|OFF")]
    pub health: Switch,

    /// Most connections. Those with a certificate of the cluster are not counted.
    #[arg(
        long,
        env = "FAIRLEAD_MAX_CONNECTIONS",
        default_value_t = MAX_CONNECTIONS,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub max_connections: u32,

    /// Most connections from one address (IPv6: one /64); raise it behind a proxy. Those with a certificate
    /// of the cluster are not counted.
    #[arg(
        long,
        env = "FAIRLEAD_MAX_CONNECTIONS_PER_PEER",
        default_value_t = MAX_CONNECTIONS_PER_PEER,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub max_connections_per_peer: u32,

    /// Seconds until a new connection must have proved who it is and begun to speak HTTP/2.
    #[arg(
        long,
        env = "FAIRLEAD_HANDSHAKE_TIMEOUT",
        default_value_t = HANDSHAKE_SECONDS,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(1..=600)
    )]
    pub handshake_timeout: u32,
}

impl Default for ServerArgs {
    fn default() -> Self {
        Self {
            reflection: Switch::On,
            health: Switch::On,
            max_connections: MAX_CONNECTIONS,
            max_connections_per_peer: MAX_CONNECTIONS_PER_PEER,
            handshake_timeout: HANDSHAKE_SECONDS,
        }
    }
}

/// The connections of `listener` whose other end has shown who it is, if `tls` has a certificate, and has
/// begun to speak HTTP/2; for `serve_with_incoming`. Call it inside a tokio runtime; it listens until the
/// stream is dropped.
pub fn open(
    listener: TcpListener,
    tls: Tls,
    peers: Peers,
    args: &ServerArgs,
) -> impl Stream<Item = io::Result<Connection>> + use<> {
    let (ready, incoming) = mpsc::channel(READY);
    let door = Door {
        tls,
        peers,
        timeout: Duration::from_secs(args.handshake_timeout.into()),
        slots: Slots::new(args),
        told: Mutex::default(),
    };
    tokio::spawn(Arc::new(door).stand(listener, ready));
    ReceiverStream::new(incoming)
}

struct Door {
    tls: Tls,
    peers: Peers,
    timeout: Duration,
    slots: Slots,
    /// When somebody was last told.
    told: Mutex<Option<Instant>>,
}

impl Door {
    async fn stand(
        self: Arc<Self>,
        listener: TcpListener,
        ready: mpsc::Sender<io::Result<Connection>>,
    ) {
        let mut greeting = JoinSet::new();
        loop {
            tokio::select! {
                () = ready.closed() => return,
                Some(_) = greeting.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, from)) => match self.slots.stranger(from.ip()) {
                        Ok(slot) => {
                            let (door, ready) = (Arc::clone(&self), ready.clone());
                            greeting.spawn(async move { door.greet(stream, slot, &ready).await });
                        }
                        Err(full) => self.refused(full, from.ip()),
                    },
                    Err(error) => {
                        tracing::warn!(%error, "cannot take a connection");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
    }

    async fn greet(
        &self,
        stream: TcpStream,
        slot: Slot,
        ready: &mpsc::Sender<io::Result<Connection>>,
    ) {
        let handshake = Connection::accept(stream, &self.tls, self.peers);
        let connection = match tokio::time::timeout(self.timeout, handshake).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                match &error {
                    HandshakeError::Revoked(_) => tracing::warn!(%error, "connection refused"),
                    _ => tracing::debug!(%error, "connection refused"),
                }
                return count("handshake");
            }
            Err(_) => {
                tracing::debug!(timeout = ?self.timeout, "no handshake in time");
                return count("silent");
            }
        };
        // A member does not take a stranger's place.
        let slot = match &connection.peer().shown {
            Shown::Identity(who) => {
                self.slots.member(format!("{}/{}", who.role, who.name)).unwrap_or(slot)
            }
            _ => slot,
        };
        // Nobody takes it any longer: the server stops.
        let _ = ready.send(Ok(connection.counted(slot))).await;
    }

    fn refused(&self, full: Full, from: IpAddr) {
        let (reason, flag) = match full {
            Full::Peer => ("peer", "--max-connections-per-peer"),
            Full::All => ("all", "--max-connections"),
        };
        count(reason);
        let now = Instant::now();
        let mut told = self.told.lock();
        if told.is_none_or(|told| now.duration_since(told) >= TELL_EVERY) {
            *told = Some(now);
            tracing::warn!(%from, "too many connections: some are turned away ({flag})");
        }
    }
}

fn count(reason: &'static str) {
    counter!("fairlead_connections_refused_total", "reason" => reason).increment(1);
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Full {
    Peer,
    All,
}

/// Who is inside.
#[derive(Debug, Clone)]
struct Slots {
    inside: Arc<Mutex<Inside>>,
    most: usize,
    most_of_peer: usize,
}

#[derive(Debug, Default)]
struct Inside {
    strangers: usize,
    /// Connections of each, none of them 0.
    by: HashMap<Holder, usize>,
}

/// Whose place it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Holder {
    Stranger(IpAddr),
    Member(String),
}

/// A place inside; it is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    inside: Arc<Mutex<Inside>>,
    holder: Holder,
}

impl Slots {
    fn new(args: &ServerArgs) -> Self {
        Self {
            inside: Arc::default(),
            most: args.max_connections as usize,
            most_of_peer: args.max_connections_per_peer as usize,
        }
    }

    fn stranger(&self, from: IpAddr) -> Result<Slot, Full> {
        let holder = Holder::Stranger(peer(from));
        let mut inside = self.inside.lock();
        if inside.strangers >= self.most {
            return Err(Full::All);
        }
        let slot = self.take(&mut inside, holder, self.most_of_peer).ok_or(Full::Peer)?;
        inside.strangers += 1;
        Ok(slot)
    }

    fn member(&self, name: String) -> Option<Slot> {
        self.take(&mut self.inside.lock(), Holder::Member(name), MOST_OF_A_MEMBER)
    }

    fn take(&self, inside: &mut Inside, holder: Holder, most: usize) -> Option<Slot> {
        let count = inside.by.entry(holder.clone()).or_default();
        // It is 0 only just now.
        if *count >= most.max(1) {
            return None;
        }
        *count += 1;
        Some(Slot { inside: Arc::clone(&self.inside), holder })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut inside = self.inside.lock();
        if let Some(count) = inside.by.get_mut(&self.holder) {
            *count -= 1;
            if *count == 0 {
                inside.by.remove(&self.holder);
            }
        }
        if matches!(self.holder, Holder::Stranger(_)) {
            inside.strangers -= 1;
        }
    }
}

/// Who counts as one: an IPv4 address, or a network that one customer of a provider gets.
fn peer(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> IpAddr {
        address.parse().expect("an address")
    }

    #[test]
    fn places_are_counted_by_peer_and_in_all_and_come_free() {
        let args =
            ServerArgs { max_connections: 3, max_connections_per_peer: 2, ..Default::default() };
        let slots = Slots::new(&args);
        let one = slots.stranger(at("10.0.0.1")).expect("room");
        let two = slots.stranger(at("::ffff:10.0.0.1")).expect("room");
        assert_eq!(slots.stranger(at("10.0.0.1")).err(), Some(Full::Peer));
        let three = slots.stranger(at("2001:db8::1")).expect("room");
        assert_eq!(slots.stranger(at("10.0.0.2")).err(), Some(Full::All));
        // A member has its own place and leaves the stranger's.
        let member = slots.member("worker/w".into()).expect("room");
        drop(three);
        let three = slots.stranger(at("2001:db8::2")).expect("room");
        drop([one, two]);
        let four = slots.stranger(at("2001:db8::ffff:1")).expect("the same network");
        assert_eq!(slots.stranger(at("2001:db8::3")).err(), Some(Full::Peer));
        drop([three, four, member]);
        let inside = slots.inside.lock();
        assert!(inside.by.is_empty() && inside.strangers == 0, "{inside:?}");
    }

    #[test]
    fn one_certificate_does_not_take_all_places() {
        let slots = Slots::new(&ServerArgs::default());
        let taken: Vec<Slot> =
            (0..MOST_OF_A_MEMBER).filter_map(|_| slots.member("worker/w".into())).collect();
        assert_eq!(taken.len(), MOST_OF_A_MEMBER);
        assert!(slots.member("worker/w".into()).is_none());
        assert!(slots.member("worker/v".into()).is_some());
    }
}
