//! TLS between the services of a cluster. Every service has a certificate of the cluster's own authority
//! and asks its peers for theirs; clients have keys instead. On loopback all of it may be left out.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Args;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, ServerTlsConfig};

/// What a service proves itself with and whom it believes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// PEM file with the certificate of this service, then those between it and the authority's.
    /// `fairlead keys tls` makes one.
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
}

impl TlsArgs {
    /// Reads the files.
    pub fn load(&self) -> Result<Tls, TlsError> {
        let ca = self.tls_ca.as_deref().map(|path| certificates("--tls-ca", path)).transpose()?;
        let identity = match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => {
                let (cert, key) = (certificates("--tls-cert", cert)?, private_key(key)?);
                Some(Identity::from_pem(cert, key))
            }
            _ => None,
        };
        Ok(Tls { ca: ca.map(Certificate::from_pem), identity })
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

/// Certificates and key, read. The default has none: nothing is encrypted.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    ca: Option<Certificate>,
    identity: Option<Identity>,
}

impl Tls {
    /// Whether a server with these speaks TLS.
    pub fn is_on(&self) -> bool {
        self.identity.is_some()
    }

    /// "https" or "http": how a server with these is addressed.
    pub fn scheme(&self) -> &'static str {
        if self.is_on() { "https" } else { "http" }
    }

    /// Refuses to listen in the clear where other machines can connect, unless `insecure`.
    pub fn may_listen(&self, address: SocketAddr, insecure: bool) -> Result<(), TlsError> {
        match self.is_on() || insecure || address.ip().is_loopback() {
            true => Ok(()),
            false => Err(TlsError::Clear(address)),
        }
    }

    /// A server's configuration; `None` without a certificate.
    pub fn server(&self, peers: Peers) -> Option<ServerTlsConfig> {
        let config = ServerTlsConfig::new().identity(self.identity.clone()?);
        Some(match &self.ca {
            Some(ca) => {
                config.client_ca_root(ca.clone()).client_auth_optional(peers == Peers::Anybody)
            }
            None => config,
        })
    }

    /// `endpoint` with the certificates that its scheme asks for. Servers must show a certificate of the
    /// cluster's authority, or without one, of an authority that the system trusts.
    pub(crate) fn connect(&self, endpoint: Endpoint) -> Result<Endpoint, tonic::transport::Error> {
        if endpoint.uri().scheme_str() != Some("https") {
            return Ok(endpoint);
        }
        let mut config = match &self.ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(ca.clone()),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some(identity) = &self.identity {
            config = config.identity(identity.clone());
        }
        endpoint.tls_config(config)
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
    /// A server would be open to other machines.
    #[error(
        "will not listen in the clear on {0}, where other machines can connect: give --tls-cert, --tls-key and \
         --tls-ca (`fairlead keys tls` makes them), or say --insecure"
    )]
    Clear(SocketAddr),
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { flag, path: path.to_owned(), source })
}

/// The text of a file that holds certificates.
fn certificates(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let pem = read(flag, path)?;
    let mut certificates = CertificateDer::pem_slice_iter(&pem).peekable();
    match certificates.peek().is_some() && certificates.all(|certificate| certificate.is_ok()) {
        true => Ok(pem),
        false => Err(TlsError::Pem { flag, path: path.to_owned(), what: "certificate" }),
    }
}

/// The text of a file that holds a private key. Nothing of it is ever in a message.
fn private_key(path: &Path) -> Result<Vec<u8>, TlsError> {
    let flag = "--tls-key";
    let pem = read(flag, path)?;
    match PrivateKeyDer::from_pem_slice(&pem) {
        Ok(_) => Ok(pem),
        Err(_) => Err(TlsError::Pem { flag, path: path.to_owned(), what: "private key" }),
    }
}
