//! The connection to Redis: one that all calls share, made anew when it breaks, to whoever is the
//! master then.

use std::{fmt, future::Future, time::Duration};

use ::redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, RedisError, RedisResult,
    ServerErrorKind, TlsMode,
    aio::{MultiplexedConnection, PubSub},
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};
use fairlead_common::backoff::Backoff;
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
    /// The connection in use and how many there were before it.
    current: Mutex<(u64, Option<MultiplexedConnection>)>,
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
        let source = match scheme {
            "redis-sentinel" | "rediss-sentinel" => {
                let sentinel = sentinel(rest, scheme == "rediss-sentinel");
                let client = sentinel.map_err(|problem| wrong(&problem))?.build();
                Source::Sentinel(Box::new(Mutex::new(client.map_err(|error| wrong(&error))?)))
            }
            _ => Source::Direct(Box::new(Client::open(url).map_err(|error| wrong(&error))?)),
        };
        Ok(Self { source, name, current: Mutex::new((0, None)) })
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
            let error = match self.connection().await {
                Ok((number, connection)) => match call(connection).await {
                    Ok(value) => return Ok(value),
                    Err(error) => {
                        if is_away(&error) {
                            self.drop_connection(number).await;
                        }
                        error
                    }
                },
                Err(error) => error,
            };
            if !is_away(&error) {
                return Err(StoreError::Backend {
                    what,
                    problem: format!("{}: {error}", self.name),
                });
            }
            let delay = backoff.next_delay();
            if Instant::now() + delay >= end {
                let problem = format!("{} does not answer: {error}", self.name);
                return Err(StoreError::Away { what, problem });
            }
            tracing::debug!(what, redis = self.name, %error, "redis is away; trying again");
            tokio::time::sleep(delay).await;
        }
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
        let mut current = self.current.lock().await;
        if let (number, Some(connection)) = &*current {
            return Ok((*number, connection.clone()));
        }
        let connection = self.connect(ANSWER).await?;
        *current = (current.0 + 1, Some(connection.clone()));
        Ok((current.0, connection))
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
        if current.0 == number {
            current.1 = None;
        }
    }
}

/// The URL of a Redis as it may be shown.
pub(crate) fn without_password(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, place)| place))
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
                | ServerErrorKind::ReadOnly
        ),
        _ => false,
    };
    by_kind || error.is_timeout() || error.is_connection_dropped()
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
    let mut builder = builder.map_err(|error| error.to_string())?.set_client_to_redis_db(database);
    if tls {
        builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
    }
    if let Some((user, password)) =
        credentials.map(|text| text.split_once(':').unwrap_or(("", text)))
    {
        if !user.is_empty() {
            builder = builder.set_client_to_redis_username(user);
        }
        builder = builder.set_client_to_redis_password(password);
    }
    Ok(builder)
}
