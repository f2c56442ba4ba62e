//! Who may call: clients by the key of their tenant, services by a certificate of the cluster, which says
//! their role and name. Holds the policies that are valid now and reads their file again when it changes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use fairlead_common::{
    bounds::shown,
    follow::follow,
    identity::{Identity, Role, authorize},
    text,
};
use parking_lot::{Mutex, RwLock};
use tonic::{Request, metadata::MetadataMap};

use crate::{
    error::{Error, Result},
    metrics,
    policy::{Policies, PolicyError},
    tenants::Tenant,
};

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

    /// Refuses a call of somebody who may not change what all tenants share: a tenant that is no admin, or
    /// where there are services with certificates and no tenants, whoever is no operator.
    pub(crate) fn admin<T>(&self, request: &Request<T>) -> Result<()> {
        let tenant = self.client(request.metadata())?;
        if self.policies().tenants().is_empty() {
            self.service(request, &[Role::Operator])?;
        }
        match tenant.admin {
            true => Ok(()),
            false => Err(Error::Forbidden(format!(
                "tenant `{}` is no admin; this changes what all tenants share",
                tenant.name
            ))),
        }
    }

    /// Who makes a call that is for services of these roles alone; `None` where services need no
    /// certificate. The handshake has checked one that is there.
    pub(crate) fn service<T>(
        &self,
        request: &Request<T>,
        roles: &[Role],
    ) -> Result<Option<Arc<Identity>>> {
        Ok(authorize(request, self.mutual, roles)?)
    }

    /// Refuses a call of an energy node that is for another one.
    pub(crate) fn node<T>(
        &self,
        request: &Request<T>,
        node_id: &str,
    ) -> Result<Option<Arc<Identity>>> {
        let who = self.service(request, &[Role::Energy])?;
        match &who {
            Some(who) if who.name != node_id => Err(Error::Forbidden(format!(
                "node.node_id: {} is not who the certificate is for, {who}; leave out --node-id",
                shown(node_id)
            ))),
            _ => Ok(who),
        }
    }

    /// Reads `file` whenever it changes. One that cannot be used changes nothing.
    pub(crate) async fn follow(&self, file: PathBuf) {
        let access = self.clone();
        let seen = Mutex::new(read(&file).ok());
        let look = move || {
            let text = read(&file)?;
            if seen.lock().as_ref() == Some(&text) {
                return Ok(false);
            }
            access.replace(&file, &text)?;
            *seen.lock() = Some(text);
            Ok::<_, PolicyError>(true)
        };
        follow("policies", look, metrics::reload_failed).await;
    }

    fn replace(&self, file: &Path, text: &str) -> Result<(), PolicyError> {
        let policies = Policies::parse_at(text, format!(" {}", file.display()))?;
        if self.mutual {
            policies.check_known()?;
        }
        let mut current = self.policies.write();
        // Nobody opens the cluster to everybody by a slip of the editor.
        if policies.tenants().is_empty() && !current.tenants().is_empty() {
            return Err(PolicyError::TenantsGone(file.to_owned()));
        }
        *current = Arc::new(policies);
        Ok(())
    }
}

fn read(file: &Path) -> Result<String, PolicyError> {
    let failed = |source| PolicyError::Read { path: file.to_owned(), source };
    text::read(file).map_err(failed)
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
