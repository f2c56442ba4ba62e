//! Processes for tests and benchmarks: services that say where they listen, and a real `redis-server`
//! with a data directory and a socket of its own; and an authority that makes certificates.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::{identity::Role, tls::TlsArgs};

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

/// An authority whose certificates say what a test wants.
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    /// Another authority than any before.
    ///
    /// # Panics
    /// If a key cannot be made.
    pub fn new() -> Self {
        let key = KeyPair::generate().expect("a key is made");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).expect("it is sound").pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate with these URIs and hosts, and the PEM of its private key.
    ///
    /// # Panics
    /// If a URI or host is none.
    pub fn certificate(&self, uris: &[&str], hosts: &[&str]) -> (CertificateDer<'static>, String) {
        let (certificate, key) = self.issue(uris, hosts);
        (certificate.der().clone(), key.serialize_pem())
    }

    fn issue(&self, uris: &[&str], hosts: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().expect("a key is made");
        let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let mut params = CertificateParams::new(hosts).expect("hosts are names or addresses");
        let uri = |&uri: &&str| SanType::URI(uri.try_into().expect("a URI is ASCII"));
        params.subject_alt_names.extend(uris.iter().map(uri));
        let certificate = params.signed_by(&key, &self.issuer).expect("it is sound");
        (certificate, key)
    }

    /// Writes a certificate for `role` and `name`, which is reached at 127.0.0.1 and localhost, with its key
    /// and this authority into `folder`; what was there under the name is replaced.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, folder: &Path, role: Role, name: &str) -> TlsArgs {
        self.write_for(folder, name, &[&format!("fairlead://{role}/{name}")])
    }

    /// As [`Self::write`], for these URIs.
    ///
    /// # Panics
    /// As [`Self::write`].
    pub fn write_for(&self, folder: &Path, name: &str, uris: &[&str]) -> TlsArgs {
        let (certificate, key) = self.issue(uris, &["127.0.0.1", "localhost"]);
        let file = |file: String, text: &str| {
            let path = folder.join(file);
            std::fs::write(&path, text).expect("the folder is there");
            Some(path)
        };
        TlsArgs {
            tls_cert: file(format!("{name}.pem"), &certificate.pem()),
            tls_key: file(format!("{name}-key.pem"), &key.serialize_pem()),
            tls_ca: self.write_ca(folder),
            tls_revoked: None,
        }
    }

    /// Writes this authority's certificate into `folder`.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write_ca(&self, folder: &Path) -> Option<PathBuf> {
        let path = folder.join("ca.pem");
        std::fs::write(&path, &self.pem).expect("the folder is there");
        Some(path)
    }
}
