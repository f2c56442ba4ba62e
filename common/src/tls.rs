//! TLS between the services of a cluster. Every service has a certificate of the cluster's own authority,
//! which says its role and name ([`crate::identity`]), and asks its peers for theirs; clients have keys
//! instead. Files are read again when they change. On loopback all of it may be left out.

use std::{
    collections::BTreeSet,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use metrics::counter;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use sha2::{Digest, Sha256};
use tokio::{net::TcpStream, sync::watch};
use tokio_rustls::{
    TlsAcceptor, TlsConnector, TlsStream,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        client::Resumption,
        crypto::{CryptoProvider, ring},
        server::{NoServerSessionStorage, WebPkiClientVerifier},
    },
};

use crate::{
    bounds,
    follow::follow,
    identity::{Expected, Identity, IdentityError, Role, Shown, plain_serial},
};

/// What a service proves itself with and whom it believes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// PEM file with the certificate of this service, then those between it and the authority's.
    /// `fairlead keys tls` makes one. It is read again when it changes, as are the other three.
    #[arg(
        long,
        env = "FAIRLEAD_TLS_CERT",
        value_name = "FILE",
        requires_all = ["tls_key", "tls_ca"]
    )]
    pub tls_cert: Option<PathBuf>,

    /// PEM file with the private key of --tls-cert.
    #[arg(long, env = "FAIRLEAD_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// PEM file with the authority that the certificates of the cluster's other services are from.
    #[arg(long, env = "FAIRLEAD_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// File of certificates that are no longer believed, by name or serial number, one a line; `#` begins
    /// a comment. Connections with them end.
    #[arg(long, env = "FAIRLEAD_TLS_REVOKED", value_name = "FILE", requires = "tls_ca")]
    pub tls_revoked: Option<PathBuf>,
}

impl TlsArgs {
    /// Reads the files.
    ///
    /// # Errors
    /// If one cannot be used, or the certificate says for nobody that it is.
    pub fn load(&self) -> Result<Tls, TlsError> {
        let live = |loaded| Live { args: self.clone(), now: watch::Sender::new(Arc::new(loaded)) };
        Ok(Tls { live: Loaded::read(self)?.map(live).map(Arc::new) })
    }

    /// Reads the files of a service, whose certificate must be for `role` if there is one.
    ///
    /// # Errors
    /// As [`Self::load`], or if the certificate is for another role.
    pub fn load_for(&self, role: Role) -> Result<Tls, TlsError> {
        let tls = self.load()?;
        match tls.identity() {
            Some(own) if own.role != role => {
                Err(TlsError::Role { own: own.to_string(), role, command: role.command(&own.name) })
            }
            _ => Ok(tls),
        }
    }
}

/// Whom a server lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peers {
    /// Services of the cluster alone: who has no certificate cannot connect.
    Services,
    /// Anybody; a certificate, where there is one, must be the cluster's. The calls that are for services
    /// ask for it.
    Anybody,
}

/// Certificates, key and revoked list, as they were last read; clones share them. The default has none:
/// nothing is encrypted, or by the authorities that the system trusts.
#[derive(Clone, Default)]
pub struct Tls {
    live: Option<Arc<Live>>,
}

struct Live {
    args: TlsArgs,
    now: watch::Sender<Arc<Loaded>>,
}

/// What the files held at one time.
struct Loaded {
    /// Hash of everything that was read: says whether it changed without keeping a key's text.
    digest: [u8; 32],
    own: Option<Own>,
    client: Arc<ClientConfig>,
    revoked: BTreeSet<String>,
}

/// With a certificate of its own.
struct Own {
    identity: Arc<Identity>,
    services: Arc<ServerConfig>,
    anybody: Arc<ServerConfig>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = self.identity();
        f.debug_struct("Tls").field("believes", &self.live.is_some()).field("own", &own).finish()
    }
}

impl Tls {
    /// Whether a server with these speaks TLS, and who calls with them proves who it is.
    pub fn is_on(&self) -> bool {
        self.identity().is_some()
    }

    /// Whom the own certificate is for, if there is one.
    pub fn identity(&self) -> Option<Arc<Identity>> {
        let own = self.loaded()?;
        own.own.as_ref().map(|own| Arc::clone(&own.identity))
    }

    /// Whether peers must be of the cluster's own authority: then none is called in the clear.
    pub(crate) fn has_authority(&self) -> bool {
        self.live.is_some()
    }

    /// "https" or "http": how a server with these is addressed.
    pub fn scheme(&self) -> &'static str {
        if self.is_on() { "https" } else { "http" }
    }

    /// Refuses to listen in the clear where other machines can connect, unless `insecure`.
    ///
    /// # Errors
    /// If other machines could connect in the clear.
    pub fn may_listen(&self, address: SocketAddr, insecure: bool) -> Result<(), TlsError> {
        match self.is_on() || insecure || address.ip().is_loopback() {
            true => Ok(()),
            false => Err(TlsError::Clear(address)),
        }
    }

    /// Reads the files again whenever they change. What cannot be used, or is for another service, changes
    /// nothing. It never ends.
    pub async fn follow(self) {
        let Some(live) = self.live else { return std::future::pending().await };
        let failed = || counter!("fairlead_tls_reload_failures_total").increment(1);
        follow("certificates", move || live.look(), failed).await;
    }

    /// Reads the files again now; says whether they changed.
    ///
    /// # Errors
    /// As [`TlsArgs::load`]; then everything stays as it was.
    pub fn reload(&self) -> Result<bool, TlsError> {
        self.live.as_ref().map_or(Ok(false), |live| live.look())
    }

    fn loaded(&self) -> Option<Arc<Loaded>> {
        self.live.as_ref().map(|live| Arc::clone(&live.now.borrow()))
    }

    /// The handshake of a server; `None` where it does not speak TLS.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        peers: Peers,
    ) -> Result<(TlsStream<TcpStream>, Shown), HandshakeError> {
        let loaded = self.loaded();
        let own = loaded.as_ref().and_then(|loaded| loaded.own.as_ref());
        let own = own.ok_or(HandshakeError::NoCertificate)?;
        let config = match peers {
            Peers::Services => &own.services,
            Peers::Anybody => &own.anybody,
        };
        let stream = TlsAcceptor::from(Arc::clone(config)).accept(stream).await?;
        let shown = self.who(stream.get_ref().1.peer_certificates())?;
        Ok((stream.into(), shown))
    }

    /// The handshake of a client, which must find whom it expects at `host`.
    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        host: &str,
        expected: &Expected,
    ) -> Result<(TlsStream<TcpStream>, Shown), HandshakeError> {
        let loaded = self.loaded().ok_or(HandshakeError::NoCertificate)?;
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned());
        let name = name.map_err(|_| HandshakeError::Peer(format!("`{host}` is no host")))?;
        let connector = TlsConnector::from(Arc::clone(&loaded.client));
        let stream = connector.connect(name, stream).await?;
        let shown = self.who(stream.get_ref().1.peer_certificates())?;
        match &shown {
            Shown::Identity(peer) => expected.check(peer).map_err(HandshakeError::Peer)?,
            Shown::Nothing => return Err(HandshakeError::NoCertificate),
            Shown::Unusable(error) => return Err(HandshakeError::Peer(error.to_string())),
        }
        Ok((stream.into(), shown))
    }

    fn who(&self, chain: Option<&[CertificateDer<'_>]>) -> Result<Shown, HandshakeError> {
        let Some(certificate) = chain.and_then(<[_]>::first) else { return Ok(Shown::Nothing) };
        match Identity::of(certificate) {
            Ok(who) if self.is_revoked(&who) => Err(HandshakeError::Revoked(who.to_string())),
            Ok(who) => Ok(Shown::Identity(Arc::new(who))),
            Err(error) => Ok(Shown::Unusable(error)),
        }
    }

    fn is_revoked(&self, who: &Identity) -> bool {
        self.loaded().is_some_and(|loaded| loaded.revokes(who))
    }

    /// Ends once `who` is revoked.
    pub(crate) async fn revoked(self, who: Arc<Identity>) {
        let Some(live) = &self.live else { return std::future::pending().await };
        let mut now = live.now.subscribe();
        if now.wait_for(|loaded| loaded.revokes(&who)).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Live {
    fn look(&self) -> Result<bool, TlsError> {
        let before = Arc::clone(&self.now.borrow());
        let Some(fresh) = Loaded::read(&self.args)? else { return Ok(false) };
        if fresh.digest == before.digest {
            return Ok(false);
        }
        let who = |loaded: &Loaded| {
            let own = loaded.own.as_ref()?;
            Some((own.identity.role, own.identity.name.clone()))
        };
        if who(&fresh) != who(&before) {
            let name = |own: &Own| own.identity.to_string();
            return Err(TlsError::Another {
                old: before.own.as_ref().map(name).unwrap_or_default(),
                new: fresh.own.as_ref().map(name).unwrap_or_default(),
            });
        }
        self.now.send_replace(Arc::new(fresh));
        Ok(true)
    }
}

impl Loaded {
    /// `None` where no file is named.
    fn read(args: &TlsArgs) -> Result<Option<Self>, TlsError> {
        let Some(ca) = &args.tls_ca else {
            // Never in the clear by mistake.
            let half = || TlsError::Rustls("--tls-ca is missing".to_owned());
            return args.tls_cert.is_none().then_some(None).ok_or_else(half);
        };
        let mut hash = Sha256::new();
        let mut text = |flag, path: &Path| {
            let text = read(flag, path)?;
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(&text);
            Ok(text)
        };
        let roots = roots(&text("--tls-ca", ca)?, ca)?;
        let revoked = match &args.tls_revoked {
            Some(path) => revoked(&text("--tls-revoked", path)?, path)?,
            None => BTreeSet::new(),
        };
        let provider = Arc::new(ring::default_provider());
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::Rustls(error.to_string()))?
            .with_root_certificates(Arc::clone(&roots));
        let (own, mut client) = match (&args.tls_cert, &args.tls_key) {
            (Some(cert), Some(key)) => {
                let chain = certificates(&text("--tls-cert", cert)?, "--tls-cert", cert)?;
                let key = private_key(&text("--tls-key", key)?, key)?;
                let own = Own::new(&chain, &key, cert, roots, &provider)?;
                let client = client.with_client_auth_cert(chain, key);
                (Some(own), client.map_err(|error| TlsError::Rustls(error.to_string()))?)
            }
            _ => (None, client.with_no_client_auth()),
        };
        client.alpn_protocols = vec![b"h2".to_vec()];
        // Every connection proves anew who is there.
        client.resumption = Resumption::disabled();
        let digest = hash.finalize().into();
        Ok(Some(Self { digest, own, client: Arc::new(client), revoked }))
    }

    fn revokes(&self, who: &Identity) -> bool {
        let Identity { role, name, serial, .. } = who;
        [name, serial, &format!("{role}/{name}")]
            .into_iter()
            .any(|word| self.revoked.contains(word))
    }
}

impl Own {
    fn new(
        chain: &[CertificateDer<'static>],
        key: &PrivateKeyDer<'static>,
        path: &Path,
        roots: Arc<RootCertStore>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::Unusable { path: path.to_owned(), source };
        let first = chain.first().ok_or(IdentityError::Unreadable).map_err(unusable)?;
        let identity = Arc::new(Identity::of(first).map_err(unusable)?);
        let server = |anybody: bool| {
            let verifier = WebPkiClientVerifier::builder_with_provider(
                Arc::clone(&roots),
                Arc::clone(provider),
            );
            let verifier = if anybody { verifier.allow_unauthenticated() } else { verifier };
            let verifier = verifier.build().map_err(|e| TlsError::Rustls(e.to_string()))?;
            let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
                .with_safe_default_protocol_versions()
                .and_then(|builder| {
                    let builder = builder.with_client_cert_verifier(verifier);
                    builder.with_single_cert(chain.to_vec(), key.clone_key())
                })
                .map_err(|error| TlsError::Rustls(error.to_string()))?;
            config.alpn_protocols = vec![b"h2".to_vec()];
            // Every connection proves anew who is there.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Ok(Arc::new(config))
        };
        Ok(Self { identity, services: server(false)?, anybody: server(true)? })
    }
}

/// Certificates or keys that cannot be used, or an address that needs some.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{flag}: cannot read {path}: {source}")]
    Read {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{flag}: {path} holds no {what} in PEM form")]
    Pem {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// A certificate that is for nobody in particular.
    #[error("--tls-cert: {path}: {source}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: IdentityError,
    },
    /// A certificate that is for another kind of service.
    #[error(
        "--tls-cert: the certificate is for {own}, but this service has the role {role}; {command} makes one"
    )]
    Role {
        /// Whom it is for.
        own: String,
        /// Who has it.
        role: Role,
        /// The command that makes the right one.
        command: String,
    },
    /// A certificate that was replaced by one of another service.
    #[error(
        "--tls-cert: the new certificate is for {new}, this is {old}; restart if that is meant"
    )]
    Another {
        /// Whom the one before was for.
        old: String,
        /// Whom the new one is for.
        new: String,
    },
    /// A line of the revoked list that is neither a name nor a number.
    #[error(
        "--tls-revoked: {path}: line {line} is no name, ROLE/NAME or serial number in hex: {text}"
    )]
    Revoked {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What stands there.
        text: String,
    },
    /// Certificate, key and authority do not fit together.
    #[error("--tls-cert, --tls-key and --tls-ca do not fit together: {0}")]
    Rustls(String),
    /// A server would be open to other machines.
    #[error(
        "will not listen in the clear on {0}, where other machines can connect: give --tls-cert, --tls-key and \
         --tls-ca (`fairlead keys tls` makes them), or say --insecure"
    )]
    Clear(SocketAddr),
}

/// A connection that did not come about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the other end shows no certificate")]
    NoCertificate,
    #[error("the certificate of {0} is revoked")]
    Revoked(String),
    #[error("{0}")]
    Peer(String),
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { flag, path: path.to_owned(), source })
}

/// The certificates in the text of a file; at least one.
fn certificates(
    pem: &[u8],
    flag: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(TlsError::Pem { flag, path: path.to_owned(), what: "certificate" }),
    }
}

fn roots(pem: &[u8], path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem, "--tls-ca", path)? {
        roots.add(certificate).map_err(|error| TlsError::Rustls(error.to_string()))?;
    }
    Ok(Arc::new(roots))
}

/// The private key in the text of a file. Nothing of it is ever in a message.
fn private_key(pem: &[u8], path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (flag, what) = ("--tls-key", "private key");
    let refused = |_| TlsError::Pem { flag, path: path.to_owned(), what };
    PrivateKeyDer::from_pem_slice(pem).map_err(refused)
}

/// The words of a revoked list.
fn revoked(text: &[u8], path: &Path) -> Result<BTreeSet<String>, TlsError> {
    let text = String::from_utf8_lossy(text);
    let mut words = BTreeSet::new();
    for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let word = line.split('#').next().unwrap_or_default().trim();
        if word.is_empty() {
            continue;
        }
        let serial = plain_serial(word);
        let is_serial = !serial.is_empty() && serial.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !bounds::is_path(word) && !is_serial {
            let text = bounds::shown(word).to_string();
            return Err(TlsError::Revoked { path: path.to_owned(), line: number + 1, text });
        }
        words.insert(word.to_owned());
        if is_serial {
            words.insert(serial);
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Authority;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    #[test]
    fn a_service_takes_a_certificate_of_its_role_only() {
        let (folder, authority) = (folder(), Authority::new());
        let args = authority.write(folder.path(), Role::Worker, "worker-1");
        assert_eq!(args.load_for(Role::Worker).expect("it is one").scheme(), "https");
        let error = args.load_for(Role::Energy).expect_err("it is none").to_string();
        assert!(
            error.contains("for worker `worker-1`, but this service has the role energy"),
            "{error}"
        );
        assert!(error.contains("--role energy --name worker-1 --host HOST"), "{error}");
        let args = authority.write_for(folder.path(), "old", &[]);
        let error = args.load().expect_err("no role").to_string();
        assert!(error.contains("old.pem") && error.contains("fairlead keys tls --role"), "{error}");
    }

    #[test]
    fn what_cannot_be_used_changes_nothing() {
        let (folder, authority) = (folder(), Authority::new());
        let list = folder.path().join("revoked");
        std::fs::write(&list, "\u{feff}# nobody\n").expect("written");
        let args = TlsArgs {
            tls_revoked: Some(list.clone()),
            ..authority.write(folder.path(), Role::Energy, "a")
        };
        let tls = args.load().expect("it is right");
        let serial = |tls: &Tls| tls.identity().expect("its own").serial.clone();
        let first = serial(&tls);
        assert!(!tls.reload().expect("nothing changed"));

        let renewed = authority.write(folder.path(), Role::Energy, "a");
        assert!(tls.reload().expect("renewed"));
        let second = serial(&tls);
        assert_ne!(first, second);

        // The certificate of another, its own key: not both were replaced yet.
        let [cert, key] = [&renewed.tls_cert, &renewed.tls_key].map(|p| p.clone().expect("named"));
        let (own, own_key) = (std::fs::read(&cert), std::fs::read(&key));
        authority.write(folder.path(), Role::Energy, "b");
        std::fs::copy(folder.path().join("b.pem"), &cert).expect("copied");
        let error = tls.reload().expect_err("another key's").to_string();
        assert!(error.contains("do not fit together"), "{error}");
        std::fs::copy(folder.path().join("b-key.pem"), &key).expect("copied");
        let error = tls.reload().expect_err("another's").to_string();
        assert!(error.contains("for energy `b`, this is energy `a`"), "{error}");
        std::fs::write(&cert, own.expect("read")).expect("written");
        std::fs::write(&key, own_key.expect("read")).expect("written");

        std::fs::write(&list, "a\nno such thing!\n").expect("written");
        let error = tls.reload().expect_err("line 2").to_string();
        assert!(error.contains("line 2"), "{error}");
        std::fs::remove_file(&list).expect("removed");
        tls.reload().expect_err("gone");
        assert_eq!(serial(&tls), second);
        assert!(!tls.is_revoked(&tls.identity().expect("its own")));
    }

    #[test]
    fn the_revoked_are_named_by_name_role_or_serial() {
        let (certificate, _) = Authority::new().certificate(&["fairlead://worker/w-1"], &[]);
        let who = Identity::of(&certificate).expect("it is right");
        let colons = who
            .serial
            .to_uppercase()
            .as_bytes()
            .chunks(2)
            .fold(String::new(), |all, pair| all + &String::from_utf8_lossy(pair) + ":");
        let folder = folder();
        for (line, expected) in [
            ("w-1 # lost", true),
            ("worker/w-1", true),
            (who.serial.as_str(), true),
            (&format!("00{}", who.serial), true),
            (colons.trim_end_matches(':'), who.serial.len().is_multiple_of(2)),
            ("energy/w-1", false),
            ("w-10", false),
            ("# w-1", false),
        ] {
            let (list, authority) = (folder.path().join("revoked"), Authority::new());
            std::fs::write(&list, line).expect("written");
            let tls_ca = authority.write_ca(folder.path());
            let args = TlsArgs { tls_revoked: Some(list), tls_ca, ..TlsArgs::default() };
            let tls = args.load().expect("it is right");
            assert_eq!(tls.is_revoked(&who), expected, "{line}");
        }
    }
}
