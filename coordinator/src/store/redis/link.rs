//! The connection to Redis: one that all calls share, made anew when it breaks, to whoever is the
//! master then.

use std::{fmt, future::Future, time::Duration};

use ::redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, IntoConnectionInfo, RedisError,
    RedisResult, ServerErrorKind, TlsMode,
    aio::{MultiplexedConnection, PubSub},
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};
use fairlead_common::backoff::Backoff;
use percent_encoding::percent_decode_str;
use tokio::{sync::Mutex, time::Instant};

use crate::store::StoreError;

/// Longest wait for a connection, and for one answer.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a call goes on trying while Redis is away, e.g. during a failover.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whom to connect to.
enum Source {
    /// This server.
    Direct(Box<Client>),
    /// Whoever the sentinels call the master.
    Sentinel(Box<Mutex<SentinelClient>>),
}

/// A connection that outlives the server's restarts.
pub(super) struct Link {
    source: Source,
    /// Shown in errors; without the password.
    name: String,
    current: Mutex<Current>,
}

/// The connection in use.
#[derive(Default)]
struct Current {
    /// How many there were before it.
    number: u64,
    connection: Option<MultiplexedConnection>,
    /// When the last attempt to connect failed, and why.
    failed: Option<(Instant, String)>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({})", self.name)
    }
}

impl Link {
    /// Reads where Redis is; connects when it is first needed.
    pub(super) fn new(url: &str) -> Result<Self, StoreError> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
        let name = without_password(url);
        let wrong = |problem: &dyn fmt::Display| StoreError::Backend {
            what: "redis",
            problem: format!(
                "`{name}`: {problem}; write redis://HOST:PORT[/DB], rediss:// for TLS, \
                 redis+unix:///SOCKET or redis-sentinel://HOST:PORT[,HOST:PORT]/MASTER[/DB]"
            ),
        };
        if let Some(problem) = unescaped(scheme, rest) {
            return Err(wrong(&problem));
        }
        let source = match scheme {
            "redis-sentinel" | "rediss-sentinel" => {
                let sentinel = sentinel(rest, scheme == "rediss-sentinel");
                let client = sentinel.map_err(|problem| wrong(&problem))?.build();
                Source::Sentinel(Box::new(Mutex::new(client.map_err(|error| wrong(&error))?)))
            }
            _ => {
                let info = url.into_connection_info().map_err(|error| wrong(&error))?;
                let client = Client::open(info.set_tcp_settings(tcp_settings()));
                Source::Direct(Box::new(client.map_err(|error| wrong(&error))?))
            }
        };
        Ok(Self { source, name, current: Mutex::default() })
    }

    /// Where it leads, without the password.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `call` on the connection. While Redis is away it is tried again for [`PATIENCE`]; whatever
    /// it does must bear to be done twice, because an answer may be lost.
    pub(super) async fn run<T, F>(
        &self,
        what: &'static str,
        call: impl Fn(MultiplexedConnection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let end = Instant::now() + PATIENCE;
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
        loop {
            let error = match self.attempt(&call).await {
                Ok(value) => return Ok(value),
                Err(error) if is_away(&error) || is_busy(&error) => error,
                Err(error) => {
                    let problem = format!("{}: {error}", self.name);
                    return Err(StoreError::Backend { what, problem });
                }
            };
            let delay = backoff.next_delay();
            if Instant::now() + delay >= end {
                let problem = format!("{} does not answer: {error}", self.name);
                return Err(StoreError::Away { what, problem });
            }
            tracing::debug!(what, redis = self.name, %error, "redis is away; trying again");
            tokio::time::sleep(delay).await;
        }
    }

    /// Runs `call` once on the connection, for what is worth something only at once.
    pub(super) async fn once<T, F>(
        &self,
        what: &'static str,
        call: impl FnOnce(MultiplexedConnection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let problem = |error| format!("{}: {error}", self.name);
        let answer = self.attempt(call).await;
        answer.map_err(|error| StoreError::Away { what, problem: problem(error) })
    }

    /// Runs `call` on the connection, which is forgotten if it broke.
    async fn attempt<T, F>(&self, call: impl FnOnce(MultiplexedConnection) -> F) -> RedisResult<T>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let (number, connection) = self.connection().await?;
        let answer = call(connection).await;
        if answer.as_ref().is_err_and(is_away) {
            self.drop_connection(number).await;
        }
        answer
    }

    /// A connection of its own, for reads that block for up to `block`.
    pub(super) async fn own(&self, block: Duration) -> RedisResult<MultiplexedConnection> {
        self.connect(block + ANSWER).await
    }

    /// The connection in use, for a call that is not repeated.
    pub(super) async fn shared(&self) -> RedisResult<MultiplexedConnection> {
        Ok(self.connection().await?.1)
    }

    /// A connection that hears messages.
    pub(super) async fn pubsub(&self) -> RedisResult<PubSub> {
        let connecting = async {
            match &self.source {
                Source::Direct(client) => client.get_async_pubsub().await,
                Source::Sentinel(client) => {
                    let client = client.lock().await.async_get_client().await?;
                    client.get_async_pubsub().await
                }
            }
        };
        let connected = tokio::time::timeout(ANSWER, connecting).await;
        connected.unwrap_or_else(|_| Err((ErrorKind::Io, "no connection in time").into()))
    }

    async fn connection(&self) -> RedisResult<(u64, MultiplexedConnection)> {
        let asked = Instant::now();
        let mut current = self.current.lock().await;
        if let Some(connection) = &current.connection {
            return Ok((current.number, connection.clone()));
        }
        // Of all that wait here one tries for all: a host that is gone costs each the same time.
        if let Some((_, problem)) = current.failed.as_ref().filter(|(at, _)| *at >= asked) {
            return Err((ErrorKind::Io, "no connection", problem.clone()).into());
        }
        match self.connect(ANSWER).await {
            Ok(connection) => {
                current.number += 1;
                current.connection = Some(connection.clone());
                Ok((current.number, connection))
            }
            Err(error) => {
                current.failed = Some((Instant::now(), error.to_string()));
                Err(error)
            }
        }
    }

    async fn connect(&self, answer: Duration) -> RedisResult<MultiplexedConnection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER))
            .set_response_timeout(Some(answer));
        match &self.source {
            Source::Direct(client) => {
                client.get_multiplexed_async_connection_with_config(&config).await
            }
            Source::Sentinel(client) => {
                client.lock().await.get_async_connection_with_config(&config).await
            }
        }
    }

    /// Forgets the connection `number`, unless there is a newer one already.
    async fn drop_connection(&self, number: u64) {
        let mut current = self.current.lock().await;
        if current.number == number {
            current.connection = None;
        }
    }
}

/// Small packets go out at once, and a host that vanishes is noticed in less time than a lease.
fn tcp_settings() -> TcpSettings {
    let (idle, probe) = (Duration::from_secs(5), Duration::from_secs(2));
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(probe);
    TcpSettings::default().set_nodelay(true).set_keepalive(keepalive)
}

/// The URL of a Redis as it may be shown: without user, password and options, which may hold them too.
/// What comes before the last `@` may all be a password that somebody has not escaped.
pub(crate) fn without_password(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let rest = match scheme {
        SOCKET => rest,
        _ => rest.rsplit_once('@').map_or(rest, |(_, place)| place),
    };
    format!("{scheme}://{}", rest.split(['?', '#']).next().unwrap_or_default())
}

/// A socket of this machine: user and password are among the options.
const SOCKET: &str = "redis+unix";

/// What of a user or password ends it before its time.
fn unescaped(scheme: &str, rest: &str) -> Option<String> {
    let (secret, special) = match scheme {
        SOCKET => (rest.split_once('?')?.1, &['#'][..]),
        _ => (rest.rsplit_once('@')?.0, &['@', '#', '/', '?'][..]),
    };
    let is_escape = |at: usize| {
        let digits = secret.as_bytes().get(at + 1..at + 3);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    let mut wrong = secret.char_indices();
    let (_, found) = wrong.find(|&(at, c)| special.contains(&c) || (c == '%' && !is_escape(at)))?;
    let escape = u32::from(found);
    Some(format!("the user or password has an unescaped `{found}`; write it as `%{escape:02X}`"))
}

/// Whether the server answers, and cannot do it now: a script runs for too long, replicas are behind
/// (`min-replicas-to-write`), or memory or disk are full.
fn is_busy(error: &RedisError) -> bool {
    ["NOREPLICAS", "BUSY", "UNKILLABLE", "MISCONF", "OOM"].iter().any(|code| has_code(error, code))
}

/// Whether the server answered with this code; older ones wrap that of an error in a script in words.
fn has_code(error: &RedisError, code: &str) -> bool {
    error.code() == Some(code) || error.to_string().contains(&format!("-{code} "))
}

/// Whether another try, maybe with another server, can go better.
fn is_away(error: &RedisError) -> bool {
    let by_kind = match error.kind() {
        ErrorKind::Io | ErrorKind::MasterNameNotFoundBySentinel => true,
        ErrorKind::Server(kind) => matches!(
            kind,
            ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
        ),
        _ => false,
    };
    by_kind || has_code(error, "READONLY") || error.is_timeout() || error.is_connection_dropped()
}

/// Reads `[USER:PASSWORD@]HOST:PORT[,HOST:PORT...]/MASTER[/DB]`. User, password and database are those of
/// Redis itself.
fn sentinel(text: &str, tls: bool) -> Result<SentinelClientBuilder, String> {
    let (credentials, place) = match text.rsplit_once('@') {
        Some((credentials, place)) => (Some(credentials), place),
        None => (None, text),
    };
    let (hosts, path) = place.split_once('/').ok_or("names no master")?;
    let (master, database) = path.split_once('/').unwrap_or((path, "0"));
    if master.is_empty() {
        return Err("names no master".to_owned());
    }
    let database: i64 =
        database.parse().map_err(|_| format!("`{database}` is no database number"))?;
    let sentinels = hosts.split(',').map(|host| {
        let (name, port) = host.rsplit_once(':').unwrap_or((host, "26379"));
        let port = port.parse().map_err(|_| format!("`{port}` is no port"))?;
        let host = name.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(match tls {
            false => ConnectionAddr::Tcp(host, port),
            true => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
        })
    });
    let sentinels = sentinels.collect::<Result<Vec<_>, String>>()?;
    let builder = SentinelClientBuilder::new(sentinels, master, SentinelServerType::Master);
    let mut builder = builder
        .map_err(|error| error.to_string())?
        .set_client_to_redis_db(database)
        .set_client_to_redis_tcp_settings(tcp_settings());
    if tls {
        builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
    }
    if let Some((user, password)) =
        credentials.map(|text| text.split_once(':').unwrap_or(("", text)))
    {
        let decoded = |text| percent_decode_str(text).decode_utf8().map_err(|_| "is no UTF-8");
        if !user.is_empty() {
            builder = builder.set_client_to_redis_username(&*decoded(user)?);
        }
        builder = builder.set_client_to_redis_password(&*decoded(password)?);
    }
    Ok(builder)
}
