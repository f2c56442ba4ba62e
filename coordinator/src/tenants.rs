//! Tenants: who may ask, for what and how much. They stand in the policies file:
//!
//! ```toml
//! [tenants.acme]
//! keys = ["sha256:9f86d081884c7d65..."]  # `fairlead keys client` makes a key and this line
//! policies = ["default", "strict"]       # those it may name, the first where it names none; the default
//!                                        # policy alone if this is left out, ["*"] for all
//! concepts = ["kitchen-knife"]           # optional: forbidden to it on top of every policy
//! max_queued = 200                       # optional: shards of its that may wait
//! images_per_minute = 120                # optional: admitted; a minute's worth at once
//! withheld_per_minute = 20               # its images that may be withheld; beyond, it has to wait: each
//!                                        # answer tells somebody who searches for a way around a gate
//! highest_priority = "normal"            # of its jobs
//! sees_scores = false                    # sees how near its images came to a gate; an admin does if this
//!                                        # is left out
//! admin = false                          # sees every tenant's jobs, may retire concepts and name policies
//!                                        # that only observe
//! ```
//!
//! Without any there is one tenant without a name, which may do everything and needs no key.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use fairlead_proto::v1::Priority;
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Begins the line of a key.
const SHA256: &str = "sha256:";
/// Stands for every policy.
const ALL: &str = "*";
/// Images of a tenant that may be withheld in a minute where its section does not say.
const WITHHELD_PER_MINUTE: u32 = 20;
/// Most characters of a name.
const MAX_NAME: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TenantFile {
    keys: Vec<String>,
    policies: Option<Vec<String>>,
    #[serde(default)]
    concepts: BTreeSet<String>,
    max_queued: Option<usize>,
    images_per_minute: Option<u32>,
    withheld_per_minute: Option<u32>,
    #[serde(default)]
    highest_priority: Highest,
    sees_scores: Option<bool>,
    #[serde(default)]
    admin: bool,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Highest {
    High,
    #[default]
    Normal,
    Low,
}

/// Who asks, and what it may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its name; empty where there are no tenants.
    pub name: String,
    /// Policies it may name, the first where it names none; `None` for all.
    pub policies: Option<Vec<String>>,
    /// Concepts that are mandatory on top of every policy.
    pub concepts: BTreeSet<String>,
    /// Its bounds.
    pub quota: Quota,
    /// Highest priority of its jobs.
    pub highest_priority: Priority,
    /// Sees scores, and how far they lie from their gates.
    pub sees_scores: bool,
    /// Sees every tenant's jobs and may change what all share.
    pub admin: bool,
}

/// How much a tenant may ask for; no bound where it is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quota {
    /// Shards that may wait, at least 1.
    pub max_queued: Option<usize>,
    /// Images admitted in a minute, at least 1; a minute's worth at once.
    pub images_per_minute: Option<u32>,
    /// Its images that may be withheld in a minute, at least 1. What goes beyond keeps its next jobs out for
    /// as long as it takes to make up for it.
    pub withheld_per_minute: Option<u32>,
}

impl Tenant {
    /// The one of a cluster without tenants.
    pub fn everyone() -> Self {
        Self {
            name: String::new(),
            policies: None,
            concepts: BTreeSet::new(),
            quota: Quota::default(),
            highest_priority: Priority::High,
            sees_scores: true,
            admin: true,
        }
    }

    /// Whether it may see and cancel the jobs of the tenant `name`.
    pub(crate) fn sees(&self, name: &str) -> bool {
        self.admin || self.name == name
    }

    /// The policy it gets where it asks for `asked`, empty for none in particular; `None` if it may not
    /// have that.
    pub(crate) fn policy<'a>(&'a self, asked: &'a str) -> Option<&'a str> {
        match &self.policies {
            None => Some(asked),
            Some(own) if asked.is_empty() => own.first().map(String::as_str),
            Some(own) => own.iter().any(|name| name == asked).then_some(asked),
        }
    }
}

/// All tenants by the hashes of their keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tenants {
    by_key: BTreeMap<[u8; 32], Arc<Tenant>>,
}

impl Tenants {
    /// Checks what a file says; the error names the tenant and says what is wrong.
    pub(crate) fn from_file(
        file: BTreeMap<String, TenantFile>,
        default: &str,
        policies: &[&str],
    ) -> Result<Self, (String, String)> {
        let mut tenants = Self::default();
        for (name, file) in file {
            tenants.add(&name, file, default, policies).map_err(|problem| (name, problem))?;
        }
        Ok(tenants)
    }

    fn add(
        &mut self,
        name: &str,
        file: TenantFile,
        default: &str,
        policies: &[&str],
    ) -> Result<(), String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
            return Err(format!(
                "its name must be 1 to {MAX_NAME} letters, digits, `-`, `_` or `.`"
            ));
        }
        if file.keys.is_empty() {
            return Err("keys is empty; make one with `fairlead keys client`".to_owned());
        }
        let own = file.policies.unwrap_or_else(|| vec![default.to_owned()]);
        if own.is_empty() {
            return Err("policies is empty; leave it out for the default policy".to_owned());
        }
        let own = (own != [ALL]).then_some(own);
        if let Some(unknown) =
            own.iter().flatten().find(|policy| !policies.contains(&policy.as_str()))
        {
            return Err(format!("policies: `{unknown}` is none of: {}", policies.join(", ")));
        }
        if file.concepts.iter().any(|concept| concept.trim().is_empty() || concept == ALL) {
            return Err("concepts takes the names of concepts".to_owned());
        }
        let limits = [file.images_per_minute, file.withheld_per_minute];
        if file.max_queued == Some(0) || limits.contains(&Some(0)) {
            return Err("a limit is 0; leave it out for none, or remove the tenant".to_owned());
        }
        let tenant = Arc::new(Tenant {
            name: name.to_owned(),
            policies: own,
            concepts: file.concepts,
            quota: Quota {
                max_queued: file.max_queued,
                images_per_minute: file.images_per_minute,
                withheld_per_minute: file.withheld_per_minute.or(Some(WITHHELD_PER_MINUTE)),
            },
            highest_priority: match file.highest_priority {
                Highest::High => Priority::High,
                Highest::Normal => Priority::Normal,
                Highest::Low => Priority::Low,
            },
            sees_scores: file.sees_scores.unwrap_or(file.admin),
            admin: file.admin,
        });
        for key in &file.keys {
            let hash = key.strip_prefix(SHA256).and_then(|hash| hex::decode(hash).ok());
            let hash: Option<[u8; 32]> = hash.and_then(|hash| hash.try_into().ok());
            // What stands there may be the key itself: it stays out of the message.
            let form =
                "a key must be `sha256:` and 64 hex digits, as `fairlead keys client` writes it";
            let hash = hash.ok_or_else(|| form.to_owned())?;
            if self.by_key.insert(hash, Arc::clone(&tenant)).is_some() {
                return Err("one of its keys stands in the file before".to_owned());
            }
        }
        Ok(())
    }

    /// Adds `tenant` with a key.
    pub(crate) fn insert(&mut self, key: &str, tenant: Tenant) {
        self.by_key.insert(hash(key), Arc::new(tenant));
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Whose key this is.
    pub(crate) fn find(&self, key: &str) -> Option<&Arc<Tenant>> {
        // The hash is looked up, never the key: how long it takes tells nothing about the key.
        self.by_key.get(&hash(key))
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Tenants, (String, String)> {
        let file: BTreeMap<String, TenantFile> = toml::from_str(text).expect("it is TOML");
        Tenants::from_file(file, "default", &["default", "strict"])
    }

    fn line(key: &str) -> String {
        format!("\"{SHA256}{}\"", hex::encode(hash(key)))
    }

    #[test]
    fn a_key_leads_to_its_tenant_and_what_it_may() {
        let tenants = parse(&format!(
            "[acme]\nkeys = [{}, {}]\npolicies = ['strict', 'default']\nconcepts = ['axe']\n\
             max_queued = 2\nimages_per_minute = 60\nwithheld_per_minute = 5\nhighest_priority = 'low'\n\
             [ops]\nkeys = [{}]\nadmin = true\npolicies = ['*']\n\
             [plain]\nkeys = [{}]",
            line("one"),
            line("two"),
            line("three"),
            line("five"),
        ))
        .expect("it is right");
        let acme = tenants.find("two").expect("its second key");
        assert_eq!(tenants.find("one"), Some(acme));
        assert_eq!((acme.name.as_str(), acme.quota.max_queued), ("acme", Some(2)));
        assert_eq!((acme.quota.withheld_per_minute, acme.sees_scores), (Some(5), false));
        assert_eq!(acme.highest_priority, Priority::Low);
        assert_eq!(acme.policy(""), Some("strict"));
        assert_eq!(acme.policy("default"), Some("default"));
        assert_eq!(acme.policy("other"), None);
        assert!(acme.sees("acme") && !acme.sees("ops") && !acme.sees(""));
        let ops = tenants.find("three").expect("its key");
        assert!(ops.sees("acme") && ops.policy("anything") == Some("anything"));
        assert!(ops.sees_scores, "an operator reads them");
        let plain = tenants.find("five").expect("its key");
        assert_eq!(plain.quota.withheld_per_minute, Some(WITHHELD_PER_MINUTE));
        assert_eq!((plain.policy(""), plain.policy("strict")), (Some("default"), None));
        assert_eq!(tenants.find("four"), None);
        assert_eq!(tenants.find(""), None);
    }

    #[test]
    fn mistakes_are_named_and_no_key_is_shown() {
        let problem = |text: &str| parse(text).expect_err(text);
        let key = line("one");
        for (body, expected) in [
            ("keys = []".to_owned(), "keys is empty"),
            ("keys = ['hunter2']".to_owned(), "64 hex digits"),
            (format!("keys = [{key}, {key}]"), "in the file before"),
            (format!("keys = [{key}]\npolicies = []"), "policies is empty"),
            (format!("keys = [{key}]\npolicies = ['lax']"), "`lax` is none of: default, strict"),
            (format!("keys = [{key}]\nconcepts = ['*']"), "names of concepts"),
            (format!("keys = [{key}]\nimages_per_minute = 0"), "a limit is 0"),
            (format!("keys = [{key}]\nwithheld_per_minute = 0"), "a limit is 0"),
        ] {
            let (tenant, problem) = problem(&format!("[acme]\n{body}"));
            assert!(tenant == "acme" && problem.contains(expected), "{problem}");
            assert!(!problem.contains("hunter2"), "{problem}");
        }
        assert!(problem(&format!("['a|b']\nkeys = [{key}]")).1.contains("its name must be"));
        let (tenant, _) = problem(&format!("[a]\nkeys = [{key}]\n[b]\nkeys = [{key}]"));
        assert_eq!(tenant, "b", "one key, two tenants");
    }
}
