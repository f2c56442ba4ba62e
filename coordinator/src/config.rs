//! Options of the coordinator, from the command line and the environment.

use std::{convert::Infallible, fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::Args;
use fairlead_common::{door::ServerArgs, ids::process_name, signature::PublicKey, tls::Tls};

use crate::{
    clock::{FARTHEST_MS, millis},
    error::{Error, Result},
    policy::Policies,
    store::{self, RedisStore},
};

/// Arguments of `fairlead coordinator`. Every flag is also an environment variable.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Coordinator")]
pub struct CoordinatorArgs {
    /// Address to serve gRPC on; port 0 takes a free one.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_LISTEN",
        default_value = "127.0.0.1:7100",
        value_name = "ADDR"
    )]
    pub listen: SocketAddr,

    /// Listen where other machines can connect without TLS, or without tenants: anybody may then send
    /// jobs and read images.
    #[arg(long, env = "FAIRLEAD_COORDINATOR_INSECURE")]
    pub insecure: bool,

    /// Directory for jobs, images and safety records; kept between runs, created if absent. With
    /// --redis it holds images and records only, and all coordinators must have the same one, e.g. on
    /// a network file system.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_DATA_DIR",
        default_value = "fairlead-data",
        value_name = "DIR"
    )]
    pub data_dir: PathBuf,

    /// Redis that keeps the jobs, for any number of coordinators: redis://HOST:PORT[/DB], rediss:// for
    /// TLS, redis+unix:///SOCKET or redis-sentinel://HOST:PORT[,HOST:PORT]/MASTER[/DB]. Without it one
    /// coordinator keeps them in --data-dir.
    #[arg(long, env = "FAIRLEAD_COORDINATOR_REDIS", value_name = "URL", hide_env_values = true)]
    pub redis: Option<RedisUrl>,

    /// Begins every key in Redis; tells clusters apart that share one.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_REDIS_PREFIX",
        default_value = "fairlead",
        value_name = "NAME",
        value_parser = parse_prefix
    )]
    pub redis_prefix: String,

    /// Use a Redis even if it may lose jobs: one that evicts keys when its memory is full, or that keeps no
    /// append-only file. Without this flag such a Redis is refused.
    #[arg(long, env = "FAIRLEAD_COORDINATOR_REDIS_MAY_LOSE_JOBS", requires = "redis")]
    pub redis_may_lose_jobs: bool,

    /// TOML file of policies: `[policies.default] concepts = ["*"]` and so on. Without it there is
    /// one policy, `default`, over every concept that an energy node serves. With `[tenants.NAME]` in it,
    /// clients need a key. It is read again when it changes.
    #[arg(long, env = "FAIRLEAD_COORDINATOR_POLICIES", value_name = "FILE")]
    pub policies: Option<PathBuf>,

    /// PEM file of the Ed25519 key that signs safety records. Default: signing-key.pem in --data-dir, made
    /// if absent, with signing-key.pub.pem for `fairlead verify`.
    #[arg(long, env = "FAIRLEAD_COORDINATOR_SIGNING_KEY", value_name = "FILE")]
    pub signing_key: Option<PathBuf>,

    /// PEM file of a public key whose records and images are handed out beside those of --signing-key, e.g.
    /// the key that was used before; repeatable.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_TRUSTED_SIGNER",
        value_name = "FILE",
        value_delimiter = ','
    )]
    pub trusted_signer: Vec<PathBuf>,

    /// Most shards that may wait for a worker; further jobs are refused with RESOURCE_EXHAUSTED.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_MAX_QUEUED",
        default_value_t = 1024,
        value_name = "SHARDS"
    )]
    pub max_queued: usize,

    /// How long a worker keeps a shard without renewing; it renews at a third of this.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_LEASE_TTL",
        default_value = "15s",
        value_parser = parse_duration,
        value_name = "TIME"
    )]
    pub lease_ttl: Duration,

    /// How long an energy node counts as live without renewing.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_NODE_TTL",
        default_value = "10s",
        value_parser = parse_duration,
        value_name = "TIME"
    )]
    pub node_ttl: Duration,

    /// How long an energy node may take over the final check of one image.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_CHECK_TIMEOUT",
        default_value = "20s",
        value_parser = parse_duration,
        value_name = "TIME"
    )]
    pub check_timeout: Duration,

    /// Wait before a failed shard is tried again; it doubles with each further failure. A shard is
    /// given up after five.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_RETRY_DELAY",
        default_value = "1s",
        value_parser = parse_duration,
        value_name = "TIME"
    )]
    pub retry_delay: Duration,

    /// How long a job may wait while no attached worker has its generator, or no live energy node
    /// one of its concepts; then it fails with that reason.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_MAX_WAIT",
        default_value = "10m",
        value_parser = parse_duration,
        value_name = "TIME"
    )]
    pub max_wait: Duration,

    /// How long running shards may go on after the signal to stop.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_DRAIN_TIMEOUT",
        default_value = "10s",
        value_parser = parse_duration,
        value_name = "TIME"
    )]
    pub drain_timeout: Duration,

    /// How long jobs, images and records are kept after a job's end. Only time in which a coordinator
    /// runs counts, by its steady clock: a clock that is set deletes nothing.
    #[arg(
        long,
        env = "FAIRLEAD_COORDINATOR_RETENTION",
        default_value = "30d",
        value_parser = parse_duration,
        value_name = "TIME"
    )]
    pub retention: Duration,

    /// Who may connect, and what is shown to them.
    #[command(flatten)]
    pub server: ServerArgs,
}

impl CoordinatorArgs {
    fn data(&self) -> Data {
        let dir = self.data_dir.clone();
        match self.redis.clone() {
            Some(url) => Data::Redis {
                url,
                prefix: self.redis_prefix.clone(),
                may_lose_jobs: self.redis_may_lose_jobs,
                outputs: dir,
            },
            None => Data::Dir(dir),
        }
    }

    /// The options these arguments ask for; reads the policies file.
    pub fn options(&self) -> Result<CoordinatorOptions> {
        if let Some(url) = &self.redis {
            RedisStore::check(url.reveal())?;
        }
        for (flag, time) in [
            ("--lease-ttl", self.lease_ttl),
            ("--node-ttl", self.node_ttl),
            ("--retry-delay", self.retry_delay),
        ] {
            if millis(time) > FARTHEST_MS / 2 {
                return Err(Error::invalid(flag, "is more than 12 h; take less"));
            }
        }
        let policies = match &self.policies {
            Some(path) => Policies::load(path)?,
            None => Policies::default(),
        };
        Ok(CoordinatorOptions {
            data: self.data(),
            policies,
            policies_file: self.policies.clone(),
            signing_key: self.signing_key.clone(),
            trusted_signers: self
                .trusted_signer
                .iter()
                .map(|path| PublicKey::load(path))
                .collect::<std::result::Result<_, _>>()?,
            max_queued: self.max_queued,
            lease_ttl: self.lease_ttl,
            node_ttl: self.node_ttl,
            check_timeout: self.check_timeout,
            retry_delay: self.retry_delay,
            max_wait: self.max_wait,
            drain_timeout: self.drain_timeout,
            retention: self.retention,
            server: self.server.clone(),
            ..CoordinatorOptions::default()
        })
    }
}

/// Where a Redis is. The password is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(String);

impl RedisUrl {
    /// The URL as it was given, with its password.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl FromStr for RedisUrl {
    type Err = Infallible;

    /// Takes anything: who parses arguments shows what it refuses, with the password.
    fn from_str(url: &str) -> std::result::Result<Self, Infallible> {
        Ok(Self(url.to_owned()))
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&store::without_password(&self.0))
    }
}

fn parse_prefix(text: &str) -> std::result::Result<String, String> {
    match !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        true => Ok(text.to_owned()),
        false => Err(format!("`{text}` must be letters, digits, `-`, `_` or `.`")),
    }
}

/// Where a coordinator keeps jobs, images and records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// In memory: a temporary cluster, tests.
    Memory,
    /// In a directory that one coordinator holds at a time; created if absent.
    Dir(PathBuf),
    /// Jobs in a Redis, images and records in a directory; any number of coordinators share both.
    Redis {
        /// The Redis.
        url: RedisUrl,
        /// Begins every key.
        prefix: String,
        /// Whether one is used that its settings let lose jobs.
        may_lose_jobs: bool,
        /// The directory; created if absent.
        outputs: PathBuf,
    },
}

/// How a coordinator runs.
#[derive(Debug, Clone)]
pub struct CoordinatorOptions {
    /// Its name, told to workers.
    pub coordinator_id: String,
    /// Where state is kept.
    pub data: Data,
    /// What is forbidden, and to whom.
    pub policies: Policies,
    /// Where they are read again from when it changes.
    pub policies_file: Option<PathBuf>,
    /// The key that signs records; `None` for the data's own.
    pub signing_key: Option<PathBuf>,
    /// Keys whose signatures count beside its own when records and images are handed out.
    pub trusted_signers: Vec<PublicKey>,
    /// With a certificate, services must show theirs.
    pub tls: Tls,
    /// Who may connect, and what is shown to them.
    pub server: ServerArgs,
    /// Most queued shards.
    pub max_queued: usize,
    /// Length of a shard's lease.
    pub lease_ttl: Duration,
    /// Length of a node's registration.
    pub node_ttl: Duration,
    /// Deadline of one node's final check of one image.
    pub check_timeout: Duration,
    /// Wait after a shard's first failure; doubles.
    pub retry_delay: Duration,
    /// Longest wait for a worker with the generator, or nodes with the concepts.
    pub max_wait: Duration,
    /// Grace of running shards at shutdown.
    pub drain_timeout: Duration,
    /// How long ended jobs are kept.
    pub retention: Duration,
    /// Workers run in the coordinator's process, so that what kills one kills the other: a shard that was
    /// in work then counts as delivered.
    pub has_own_workers: bool,
}

impl Default for CoordinatorOptions {
    fn default() -> Self {
        Self {
            coordinator_id: process_name("coordinator"),
            data: Data::Memory,
            policies: Policies::default(),
            policies_file: None,
            signing_key: None,
            trusted_signers: Vec::new(),
            tls: Tls::default(),
            server: ServerArgs::default(),
            max_queued: 1024,
            lease_ttl: Duration::from_secs(15),
            node_ttl: Duration::from_secs(10),
            check_timeout: Duration::from_secs(20),
            retry_delay: Duration::from_secs(1),
            max_wait: Duration::from_secs(600),
            drain_timeout: Duration::from_secs(10),
            retention: Duration::from_secs(30 * 24 * 3600),
            has_own_workers: false,
        }
    }
}

/// Reads "500ms", "15s", "2m", "1h" or "30d"; zero is refused.
///
/// # Errors
/// If it is anything else: what to write.
pub fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    let problem =
        || format!("`{text}` is no time above zero; write e.g. 500ms, 15s, 2m, 1h or 30d");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(problem()),
    };
    let number: u64 = number.parse().map_err(|_| problem())?;
    match number.checked_mul(unit_ms) {
        Some(ms) if ms > 0 => Ok(Duration::from_millis(ms)),
        _ => Err(problem()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: CoordinatorArgs,
    }

    #[test]
    fn flags_and_library_have_the_same_defaults() {
        let args = Cli::try_parse_from(["fairlead"]).expect("no flag is needed").args;
        let options = args.options().expect("no file is read");
        // A process keeps its state, a library's caller says where.
        assert_eq!(options.data, Data::Dir("fairlead-data".into()));
        let CoordinatorOptions { coordinator_id, data, .. } = options.clone();
        let default = CoordinatorOptions { coordinator_id, data, ..Default::default() };
        assert_eq!(format!("{options:?}"), format!("{default:?}"));
    }

    #[test]
    fn a_redis_is_read_checked_and_shown_without_its_password() {
        let parse = |url| Cli::try_parse_from(["fairlead", "--redis", url]);
        for url in [
            "redis://127.0.0.1:6379",
            "rediss://user:secret@redis.local:6380/2",
            "redis+unix:///run/redis.sock?user=a&pass=secret",
            "redis-sentinel://:secret@one:26379,two/main/1",
            "rediss-sentinel://[::1]:26379/main",
        ] {
            let args = parse(url).unwrap_or_else(|error| panic!("{url}: {error}")).args;
            let data = args.options().expect("no file is read").data;
            assert!(!format!("{data:?}").contains("secret"), "{data:?}");
        }
        for (url, expected) in [
            ("http://127.0.0.1", "write redis://HOST"),
            ("redis://:sec@ret-secret@one:6379", "unescaped `@`; write it as `%40`"),
            ("redis://:sec#ret-secret@one:6379", "unescaped `#`; write it as `%23`"),
            ("rediss://user:secret/secret@one:6379", "unescaped `/`; write it as `%2F`"),
            ("redis://:secret?secret@one:6379", "unescaped `?`; write it as `%3F`"),
            ("redis://:secret%zz@one:6379", "unescaped `%`; write it as `%25`"),
            ("redis-sentinel://:secret#secret@one:26379/main", "unescaped `#`"),
            ("redis+unix:///run/redis.sock?pass=secret#secret", "unescaped `#`"),
            ("redis-sentinel://:secret@one:26379", "names no master"),
            ("redis-sentinel://:secret@one:x/main", "`x` is no port"),
            ("redis-sentinel://one/main/x", "`x` is no database number"),
        ] {
            let args = parse(url).unwrap_or_else(|error| panic!("{url}: {error}")).args;
            let error = args.options().expect_err(url).to_string();
            assert!(error.contains(expected) && !error.contains("secret"), "{error}");
        }
        let error = Cli::try_parse_from(["fairlead", "--redis-prefix", "a{b"]).err();
        assert!(error.expect("braces are ours").to_string().contains("must be letters"));
    }

    #[test]
    fn times_are_read_with_their_unit() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "5", "s", "0s", "-1s", "1.5s", "99999999999999999999d", "1w"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
