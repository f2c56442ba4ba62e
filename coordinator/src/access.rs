//! Who may call: clients by the key of their tenant, services by a certificate of the cluster. Holds the
//! policies that are valid now and reads their file again when it changes.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use fairlead_common::text;
use parking_lot::RwLock;
use tonic::{Request, metadata::MetadataMap};

use crate::{
    error::{Error, Result},
    metrics,
    policy::{Policies, PolicyError},
    tenants::Tenant,
};

/// How often the file is looked at.
const RELOAD_PERIOD: Duration = Duration::from_secs(2);

/// The policies in force; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    policies: Arc<RwLock<Arc<Policies>>>,
    /// Services must show a certificate.
    mutual: bool,
}

impl Access {
    /// Begins with `policies`. With `mutual` TLS, calls of services need a certificate.
    pub(crate) fn new(policies: Policies, mutual: bool) -> Self {
        Self { policies: Arc::new(RwLock::new(Arc::new(policies))), mutual }
    }

    /// The policies in force.
    pub(crate) fn policies(&self) -> Arc<Policies> {
        Arc::clone(&self.policies.read())
    }

    /// Whose call this is, by its `authorization: Bearer KEY`.
    pub(crate) fn client(&self, metadata: &MetadataMap) -> Result<Arc<Tenant>> {
        let policies = self.policies();
        if policies.tenants().is_empty() {
            return Ok(Arc::new(Tenant::everyone()));
        }
        let refused = |problem| Error::Unauthenticated { problem };
        let header = metadata.get("authorization").ok_or_else(|| {
            refused("no key: send `authorization: Bearer KEY` (fairlead: --key-file, FAIRLEAD_KEY)")
        })?;
        let key = header.to_str().ok().and_then(|header| {
            let (scheme, key) = header.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        });
        let key = key.ok_or_else(|| refused("`authorization` is not `Bearer KEY`"))?;
        let tenant = policies.tenants().find(key);
        tenant.cloned().ok_or_else(|| refused("the key is no tenant's; ask the operator for one"))
    }

    /// Refuses a call of a tenant that may not change what all tenants share.
    pub(crate) fn admin(&self, metadata: &MetadataMap) -> Result<()> {
        let tenant = self.client(metadata)?;
        match tenant.admin {
            true => Ok(()),
            false => Err(Error::Forbidden(format!(
                "tenant `{}` is no admin; this changes what all tenants share",
                tenant.name
            ))),
        }
    }

    /// Refuses a call that only services may make. The handshake has checked a certificate that is there.
    pub(crate) fn service<T>(&self, request: &Request<T>) -> Result<()> {
        let known = request.peer_certs().is_some_and(|certificates| !certificates.is_empty());
        match known || !self.mutual {
            true => Ok(()),
            false => Err(Error::Unauthenticated {
                problem: "this call is for the cluster's services; give yours --tls-cert and --tls-key",
            }),
        }
    }

    /// Reads `file` whenever it changes. One that cannot be used changes nothing.
    pub(crate) async fn follow(&self, file: PathBuf) {
        let mut seen = read(&file).await.ok();
        let mut told = String::new();
        loop {
            tokio::time::sleep(RELOAD_PERIOD).await;
            let text = read(&file).await;
            if text.as_ref().ok() == seen.as_ref() && text.is_ok() {
                continue;
            }
            match text.and_then(|text| self.replace(&file, &text).map(|()| text)) {
                Ok(text) => {
                    seen = Some(text);
                    told.clear();
                    tracing::info!(file = %file.display(), "policies read again");
                }
                Err(error) if error.to_string() != told => {
                    told = error.to_string();
                    metrics::reload_failed();
                    tracing::error!(%error, "the policies stay as they were");
                }
                Err(_) => {}
            }
        }
    }

    fn replace(&self, file: &Path, text: &str) -> Result<(), PolicyError> {
        let policies = Policies::parse_at(text, format!(" {}", file.display()))?;
        let mut current = self.policies.write();
        // Nobody opens the cluster to everybody by a slip of the editor.
        if policies.tenants().is_empty() && !current.tenants().is_empty() {
            return Err(PolicyError::TenantsGone(file.to_owned()));
        }
        *current = Arc::new(policies);
        Ok(())
    }
}

async fn read(file: &Path) -> Result<String, PolicyError> {
    let failed = |source| PolicyError::Read { path: file.to_owned(), source };
    let text = tokio::fs::read(file).await.map_err(failed)?;
    text::decode(text)
        .map_err(|problem| failed(io::Error::new(io::ErrorKind::InvalidData, problem)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_used_changes_nothing() {
        let tenants = |name: &str| {
            let key = format!("sha256:{}", "ab".repeat(32));
            format!("[policies.default]\nconcepts = ['*']\n[tenants.{name}]\nkeys = ['{key}']")
        };
        let access = Access::new(Policies::parse(&tenants("a")).expect("it is right"), false);
        let before = access.policies();
        let file = Path::new("policies.toml");
        for (text, problem) in [
            ("[policies.default", "policies file policies.toml"),
            ("[policies.default]\nconcepts = ['*']", "names no tenants any longer"),
        ] {
            let error = access.replace(file, text).expect_err(text).to_string();
            assert!(error.contains(problem), "{error}");
            assert_eq!(access.policies(), before);
        }
        access.replace(file, &tenants("b")).expect("it is right");
        assert_ne!(access.policies(), before);
    }
}
