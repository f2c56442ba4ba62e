//! Processes for tests and benchmarks: services that say where they listen, and a real `redis-server`
//! with a data directory and a socket of its own.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tokio::io::{AsyncBufReadExt, BufReader};

/// What a service says before the address of its metrics.
pub const METRICS: &str = "metrics at ";

/// Where a service listens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announced {
    /// What it said after the words waited for.
    pub address: String,
    /// Where it shows its metrics; empty if it did not say so.
    pub metrics: String,
}

/// Reads what a service says on its standard output, which must be a pipe, up to the line that begins with
/// `words`.
///
/// # Errors
/// If it ends before that.
pub async fn announced(
    process: &mut tokio::process::Child,
    words: &str,
) -> std::io::Result<Announced> {
    let output = process.stdout.take().expect("the caller pipes the service's output");
    let mut lines = BufReader::new(output).lines();
    let mut announced = Announced::default();
    while let Some(line) = lines.next_line().await? {
        if let Some(address) = line.strip_prefix(METRICS) {
            address.clone_into(&mut announced.metrics);
        }
        if let Some(address) = line.strip_prefix(words) {
            address.clone_into(&mut announced.address);
            return Ok(announced);
        }
    }
    Err(std::io::Error::other(format!("the service ended before it said {words:?}")))
}

/// How long a server may take to answer.
const START: Duration = Duration::from_secs(20);

/// A running `redis-server`; it ends when dropped.
#[derive(Debug)]
pub struct RedisServer {
    child: Option<Child>,
    dir: PathBuf,
    fsync: &'static str,
}

impl RedisServer {
    /// Starts a server that keeps an append-only file in `dir` and returns once it answers.
    ///
    /// # Panics
    /// Where `redis-server` is not installed or does not start.
    pub fn start(dir: &Path) -> Self {
        Self::start_with(dir, "always")
    }

    /// As [`Self::start`], with another `appendfsync`.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_with(dir: &Path, fsync: &'static str) -> Self {
        let mut server = Self { child: None, dir: dir.to_owned(), fsync };
        server.restart();
        server
    }

    /// Its process.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// The socket it listens on, before and after restarts.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("redis.sock")
    }

    /// Sends it a signal. STOP, and CONT later, is what `DEBUG SLEEP` does, without Redis 7's leave.
    ///
    /// # Panics
    /// If it does not run.
    pub fn signal(&self, signal: &str) {
        let id = self.child.as_ref().expect("it runs").id().to_string();
        let kill = Command::new("kill").args(["-s", signal, &id]).status();
        assert!(kill.expect("`kill` is installed").success(), "kill -s {signal} {id}");
    }

    /// Kills it without a chance to write anything.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }

    /// Starts it again over the same data.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn restart(&mut self) {
        self.kill();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("redis.log"))
            .expect("the directory exists");
        let child = Command::new("redis-server")
            .current_dir(&self.dir)
            .args(["--port", "0", "--unixsocket", "redis.sock", "--appendonly", "yes"])
            .args(["--appendfsync", self.fsync, "--save", ""])
            .stdin(Stdio::null())
            .stdout(log)
            .spawn()
            .expect("redis-server is installed (Debian: apt-get install redis-server)");
        self.child = Some(child);
        let end = Instant::now() + START;
        while !self.answers() {
            assert!(Instant::now() < end, "redis-server does not answer; see redis.log");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends one command, words apart by spaces, and returns the first bytes of the raw answer.
    pub fn command(&self, command: &str) -> std::io::Result<String> {
        let mut stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(START))?;
        stream.write_all(format!("{command}\r\n").as_bytes())?;
        let mut answer = [0; 4096];
        let length = stream.read(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
    }

    fn answers(&self) -> bool {
        self.command("PING").is_ok_and(|answer| answer.starts_with("+PONG"))
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}
