//! Who a certificate is for: a role and a name, as the URI `fairlead://ROLE/NAME` among its subject
//! alternative names, beside the hosts that it is reached at.

use std::{fmt, str::FromStr, sync::Arc};

use clap::ValueEnum;
use rustls_pki_types::{CertificateDer, ServerName};
use tonic::{Code, Request, Status};
use webpki::EndEntityCert;

use crate::bounds::{self, shown};

/// Begins the URI that says who a certificate is for.
const SCHEME: &str = "fairlead://";

/// What a member of a cluster is there for, and with that which calls it may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub enum Role {
    /// Splits jobs, checks images and releases them.
    Coordinator,
    /// Makes images.
    Worker,
    /// Scores images.
    Energy,
    /// A person, who gives concepts to nodes and measures.
    Operator,
}

impl Role {
    /// Its name in certificates.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Energy => "energy",
            Self::Operator => "operator",
        }
    }

    /// Whether others connect to it, so that its certificate needs their name for its host.
    pub fn is_reached(self) -> bool {
        matches!(self, Self::Coordinator | Self::Energy)
    }

    /// The command that makes a certificate for it.
    pub fn command(self, name: &str) -> String {
        let host = if self.is_reached() { " --host HOST" } else { "" };
        format!("`fairlead keys tls --role {self} --name {name}{host}`")
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::value_variants().iter().copied().find(|role| role.as_str() == text).ok_or(())
    }
}

/// Whom a certificate is for. That it is the cluster's, the handshake has checked.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// What it is there for.
    pub role: Role,
    /// Its name; with the role, one member of the cluster.
    pub name: String,
    /// Serial number, lower-case hex without leading zeros.
    pub serial: String,
    certificate: CertificateDer<'static>,
}

impl Identity {
    /// Reads the certificate of a peer, the first of its chain.
    ///
    /// # Errors
    /// If it is not for exactly one role and name.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let parsed = EndEntityCert::try_from(certificate).map_err(|_| IdentityError::Unreadable)?;
        let mut uris = parsed.valid_uri_names().filter_map(|uri| uri.strip_prefix(SCHEME));
        let who = uris.next().ok_or(IdentityError::NoRole)?;
        if uris.next().is_some() {
            return Err(IdentityError::Several);
        }
        let malformed = || IdentityError::Malformed(shown(who).to_string());
        let (role, name) = who.split_once('/').ok_or_else(malformed)?;
        let role = role.parse().map_err(|()| malformed())?;
        bounds::name(name).map_err(|_| malformed())?;
        let serial = plain_serial(&hex::encode(parsed.serial()));
        let certificate = certificate.clone().into_owned();
        Ok(Self { role, name: name.to_owned(), serial, certificate })
    }

    /// Whether the certificate is for this host too, a name or an address, as in a URL.
    pub fn is_at(&self, host: &str) -> bool {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let Ok(host) = ServerName::try_from(host) else { return false };
        let parsed = EndEntityCert::try_from(&self.certificate);
        parsed.is_ok_and(|parsed| parsed.verify_is_valid_for_subject_name(&host).is_ok())
    }

    /// Whether a process with this certificate may call itself `id`: its name, or its name, `/` and more
    /// where one machine runs several.
    pub fn may_be(&self, id: &str) -> bool {
        id == self.name || id.strip_prefix(&self.name).is_some_and(|rest| rest.starts_with('/'))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.role, self.name)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({self}, serial {})", self.serial)
    }
}

/// A serial number as it is compared: lower-case hex without colons and leading zeros.
pub(crate) fn plain_serial(text: &str) -> String {
    let plain = text.replace(':', "").to_ascii_lowercase();
    plain.trim_start_matches('0').to_owned()
}

/// A certificate that is for nobody in particular.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It is no certificate.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// It has no role.
    #[error(
        "the certificate says for no role ({SCHEME}ROLE/NAME) that it is; make one with `fairlead keys tls \
         --role ROLE --name NAME`"
    )]
    NoRole,
    /// It has more than one.
    #[error("the certificate is for several roles or names; each process has one of its own")]
    Several,
    /// What it is for is not understood.
    #[error(
        "the certificate is for {0}, which is no ROLE/NAME; make one with `fairlead keys tls --role ROLE \
         --name NAME`"
    )]
    Malformed(String),
}

/// Whom somebody wants to talk to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Expected {
    role: Role,
    /// `None` for anybody of the role.
    name: Option<String>,
}

impl Expected {
    /// Any coordinator.
    pub fn coordinator() -> Self {
        Self { role: Role::Coordinator, name: None }
    }

    /// The energy node of this name.
    pub fn node(id: &str) -> Self {
        Self { role: Role::Energy, name: Some(id.to_owned()) }
    }

    /// Refuses a peer that is another one.
    pub(crate) fn check(&self, peer: &Identity) -> Result<(), String> {
        match peer.role == self.role && self.name.as_ref().is_none_or(|name| *name == peer.name) {
            true => Ok(()),
            false => Err(format!("{peer} answers there, not {self}")),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{} `{name}`", self.role),
            None => write!(f, "a {}", self.role),
        }
    }
}

/// What the other end of a connection has shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Shown {
    /// No certificate.
    #[default]
    Nothing,
    /// One of the cluster's authority that is for nobody in particular.
    Unusable(IdentityError),
    /// Who it is.
    Identity(Arc<Identity>),
}

/// The other end of a connection; requests carry it.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    /// What it has shown.
    pub shown: Shown,
}

/// Who makes a call, if `roles` may make it. `None` where the server does not speak TLS (`is_on`), which
/// only happens where its operator lets everybody in.
///
/// # Errors
/// If the caller has no certificate, one without a role, or another role.
pub fn authorize<T>(
    request: &Request<T>,
    is_on: bool,
    roles: &[Role],
) -> Result<Option<Arc<Identity>>, Refusal> {
    if !is_on {
        return Ok(None);
    }
    let nobody = Shown::Nothing;
    let shown = request.extensions().get::<Peer>().map_or(&nobody, |peer| &peer.shown);
    let missing = |problem: String| Err(Refusal { code: Code::Unauthenticated, problem });
    match shown {
        Shown::Nothing => missing(format!(
            "this call is for the cluster's services, with the role {}; give yours --tls-cert and --tls-key ({} \
             makes them)",
            list(roles),
            roles.first().map_or_else(String::new, |role| role.command("NAME"))
        )),
        Shown::Unusable(error) => missing(error.to_string()),
        Shown::Identity(who) if roles.contains(&who.role) => Ok(Some(Arc::clone(who))),
        Shown::Identity(who) => Err(Refusal::forbidden(format!(
            "this call is for the role {}, the certificate is for {who}",
            list(roles)
        ))),
    }
}

fn list(roles: &[Role]) -> String {
    roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ")
}

/// A call that its caller may not make.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct Refusal {
    code: Code,
    problem: String,
}

impl Refusal {
    /// A call of somebody who is known, and may not.
    pub fn forbidden(problem: impl Into<String>) -> Self {
        Self { code: Code::PermissionDenied, problem: problem.into() }
    }

    /// The gRPC code: UNAUTHENTICATED without a usable certificate, else PERMISSION_DENIED.
    pub fn code(&self) -> Code {
        self.code
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.code, refusal.problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Authority;

    fn identity(uris: &[&str], hosts: &[&str]) -> Result<Identity, IdentityError> {
        let (certificate, _) = Authority::new().certificate(uris, hosts);
        Identity::of(&certificate)
    }

    #[test]
    fn a_certificate_says_role_name_hosts_and_serial() {
        let who = identity(&["fairlead://energy/energy-1"], &["10.0.0.2", "gpu.local", "::1"]);
        let who = who.expect("it is right");
        assert_eq!((who.role, who.name.as_str()), (Role::Energy, "energy-1"));
        assert!(!who.serial.is_empty() && who.serial == plain_serial(&who.serial));
        assert!(["10.0.0.2", "gpu.local", "GPU.local", "[::1]"].iter().all(|host| who.is_at(host)));
        let others = ["10.0.0.3", "gpu", "", "energy-1", "gpu.local."];
        assert!(!others[..4].iter().any(|host| who.is_at(host)));
        assert_eq!(who.to_string(), "energy `energy-1`");
    }

    #[test]
    fn a_certificate_for_nobody_says_which_command_makes_the_right_one() {
        type Case<'a> = (&'a [&'a str], &'a str);
        let cases: [Case<'_>; 9] = [
            (&[], "for no role"),
            (&["spiffe://cluster/energy/a"], "for no role"),
            (&["fairlead://energy/a", "fairlead://worker/a"], "several roles"),
            (&["fairlead://energy/a", "fairlead://energy/a"], "several roles"),
            (&["fairlead://energy"], "no ROLE/NAME"),
            (&["fairlead://energy/"], "no ROLE/NAME"),
            (&["fairlead://energy/a/b"], "no ROLE/NAME"),
            (&["fairlead://Energy/a"], "no ROLE/NAME"),
            (&["fairlead://root/a"], "no ROLE/NAME"),
        ];
        for (uris, part) in cases {
            let error = identity(uris, &["a"]).expect_err(part).to_string();
            assert!(error.contains(part), "{uris:?}: {error}");
        }
        let none = identity(&[], &["a"]).expect_err("no role").to_string();
        assert!(none.contains("fairlead keys tls --role ROLE --name NAME"), "{none}");
        let garbage = CertificateDer::from(vec![1, 2, 3]);
        assert_eq!(Identity::of(&garbage), Err(IdentityError::Unreadable));
    }

    #[test]
    fn a_process_is_called_as_its_certificate_or_a_part_of_it() {
        let who = identity(&["fairlead://worker/worker-1"], &[]).expect("it is right");
        assert!(who.may_be("worker-1") && who.may_be("worker-1/2"));
        for other in ["worker", "worker-10", "worker-2", "", "/", "other/worker-1"] {
            assert!(!who.may_be(other), "{other}");
        }
    }

    #[test]
    fn whom_one_expects_is_one_member_or_anybody_of_a_role() {
        let node = identity(&["fairlead://energy/energy-1"], &[]).expect("it is right");
        Expected::node("energy-1").check(&node).expect("the very one");
        let other = Expected::node("energy-2").check(&node).expect_err("another");
        assert_eq!(other, "energy `energy-1` answers there, not energy `energy-2`");
        Expected::coordinator().check(&node).expect_err("another role");
        let coordinator = identity(&["fairlead://coordinator/energy-1"], &[]).expect("right");
        Expected::node("energy-1").check(&coordinator).expect_err("another role of that name");
        Expected::coordinator().check(&coordinator).expect("any of them");
    }
}
