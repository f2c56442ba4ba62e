//! Live energy nodes: a registration is a lease that ends unless renewed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use fairlead_common::probe::Probe;
use fairlead_proto::{PREPROCESSING_VERSION, PROTOCOL_VERSION, v1};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    clock::{millis, unix_ms},
    error::{Error, Result},
    routing::LiveNode,
};

/// The registrations. Pure: `now` is an argument.
#[derive(Debug, Default)]
struct NodeTable {
    nodes: BTreeMap<String, Entry>,
    /// Everything ever registered: tells a concept or an energy that is gone from one unheard of.
    seen: BTreeSet<Probe>,
}

#[derive(Debug)]
struct Entry {
    info: Arc<v1::NodeInfo>,
    registration_id: String,
    since_unix_ms: i64,
    expires_unix_ms: i64,
}

impl NodeTable {
    /// Adds or replaces a node. A node that restarts under its old id replaces itself at once.
    fn register(&mut self, info: v1::NodeInfo, registration_id: String, now: i64, ttl_ms: i64) {
        let concepts = info.concepts.iter().filter_map(|info| info.concept.as_ref());
        self.seen.extend(concepts.map(Probe::from));
        let entry = Entry {
            registration_id,
            since_unix_ms: now,
            expires_unix_ms: now.saturating_add(ttl_ms),
            info: Arc::new(info),
        };
        self.nodes.insert(entry.info.node_id.clone(), entry);
    }

    /// Whether the registration is still the current one; it lives on until `now + ttl_ms`.
    fn renew(&mut self, node_id: &str, registration_id: &str, now: i64, ttl_ms: i64) -> bool {
        match self.nodes.get_mut(node_id) {
            Some(entry) if entry.registration_id == registration_id => {
                entry.expires_unix_ms = now.saturating_add(ttl_ms);
                true
            }
            _ => false,
        }
    }

    fn deregister(&mut self, node_id: &str, registration_id: &str) -> bool {
        let current = self.nodes.get(node_id).map(|entry| entry.registration_id.as_str());
        current == Some(registration_id) && self.nodes.remove(node_id).is_some()
    }

    /// Removes and returns the nodes whose registration has ended.
    fn expire(&mut self, now: i64) -> Vec<String> {
        let mut gone = Vec::new();
        self.nodes.retain(|id, entry| {
            let live = entry.expires_unix_ms > now;
            if !live {
                gone.push(id.clone());
            }
            live
        });
        gone
    }
}

/// The registry of energy nodes; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Registry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<NodeTable>,
    load: Mutex<HashMap<String, usize>>,
    /// Counts changes of the set of live nodes.
    changes: watch::Sender<u64>,
    ttl: Duration,
}

impl Registry {
    /// Registrations end `ttl` after their last renewal.
    pub(crate) fn new(ttl: Duration) -> Self {
        let shared = Shared {
            table: Mutex::default(),
            load: Mutex::default(),
            changes: watch::Sender::new(0),
            ttl,
        };
        Self { shared: Arc::new(shared) }
    }

    /// How long a registration lasts without renewal.
    pub(crate) fn ttl(&self) -> Duration {
        self.shared.ttl
    }

    /// Registers a node and returns the registration's id.
    pub(crate) fn register(&self, info: v1::NodeInfo) -> Result<String> {
        validate(&info)?;
        let id = uuid::Uuid::new_v4().to_string();
        tracing::info!(
            node = info.node_id,
            address = info.address,
            model = info.model_name,
            concepts = info.concepts.len(),
            "energy node registered"
        );
        self.shared.table.lock().register(info, id.clone(), unix_ms(), millis(self.shared.ttl));
        self.changed();
        Ok(id)
    }

    /// Renews a registration; the error means that the node has to register again.
    pub(crate) fn renew(&self, node_id: &str, registration_id: &str) -> Result<()> {
        let ttl_ms = millis(self.shared.ttl);
        let renewed = self.shared.table.lock().renew(node_id, registration_id, unix_ms(), ttl_ms);
        renewed.then_some(()).ok_or_else(|| Error::NotRegistered { node_id: node_id.to_owned() })
    }

    /// Ends a registration.
    pub(crate) fn deregister(&self, node_id: &str, registration_id: &str) -> Result<()> {
        if !self.shared.table.lock().deregister(node_id, registration_id) {
            return Err(Error::NotRegistered { node_id: node_id.to_owned() });
        }
        tracing::info!(node = node_id, "energy node left");
        self.changed();
        Ok(())
    }

    /// Ends the registrations that were not renewed in time.
    pub(crate) fn expire(&self) {
        let gone = self.shared.table.lock().expire(unix_ms());
        for node in &gone {
            tracing::warn!(node, "energy node stopped renewing and was dropped");
        }
        if !gone.is_empty() {
            self.changed();
        }
    }

    /// All live nodes.
    pub(crate) fn live(&self) -> Vec<LiveNode> {
        let load = self.shared.load.lock();
        let now = unix_ms();
        let table = self.shared.table.lock();
        let live = table.nodes.values().filter(|entry| entry.expires_unix_ms > now);
        live.map(|entry| LiveNode {
            info: Arc::clone(&entry.info),
            since_unix_ms: entry.since_unix_ms,
            load: load.get(&entry.info.node_id).copied().unwrap_or_default(),
        })
        .collect()
    }

    /// Everything registered since the start.
    pub(crate) fn seen(&self) -> BTreeSet<Probe> {
        self.shared.table.lock().seen.clone()
    }

    /// Counts `endpoints` as used until the reservation is dropped.
    pub(crate) fn reserve(&self, endpoints: &[v1::EnergyEndpoint]) -> Reservation {
        let nodes: Vec<String> = endpoints
            .iter()
            .filter_map(|endpoint| endpoint.node.as_ref().map(|node| node.node_id.clone()))
            .collect();
        let mut load = self.shared.load.lock();
        for node in &nodes {
            *load.entry(node.clone()).or_default() += 1;
        }
        drop(load);
        Reservation { shared: Arc::clone(&self.shared), nodes }
    }

    /// Wakes when the set of live nodes changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    fn changed(&self) {
        self.shared.changes.send_modify(|count| *count += 1);
    }
}

/// Use of some nodes; ends when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    shared: Arc<Shared>,
    nodes: Vec<String>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut load = self.shared.load.lock();
        for node in &self.nodes {
            if let Some(count) = load.get_mut(node) {
                *count -= 1;
                if *count == 0 {
                    load.remove(node);
                }
            }
        }
    }
}

fn validate(info: &v1::NodeInfo) -> Result<()> {
    if info.protocol_version != PROTOCOL_VERSION {
        return Err(Error::Incompatible(format!(
            "energy node `{}` speaks protocol {}, this coordinator {PROTOCOL_VERSION}; run the \
             same release on both",
            info.node_id, info.protocol_version
        )));
    }
    if info.preprocessing_version != PREPROCESSING_VERSION {
        return Err(Error::Incompatible(format!(
            "energy node `{}` has preprocessing {}, this coordinator {PREPROCESSING_VERSION}; run \
             the same release on both",
            info.node_id, info.preprocessing_version
        )));
    }
    let id = info.node_id.as_str();
    if id.is_empty() || id.len() > 128 || id.contains(char::is_whitespace) {
        return Err(Error::invalid(
            "node.node_id",
            format!("`{id}` must have 1 to 128 characters and no white space"),
        ));
    }
    check_address(&info.address)?;
    if info.concepts.is_empty() {
        return Err(Error::invalid("node.concepts", "is empty; a node serves one at least"));
    }
    let mut names = BTreeSet::new();
    for concept in info.concepts.iter().map(|info| info.concept.clone().unwrap_or_default()) {
        if concept.name.is_empty() || concept.version.is_empty() {
            return Err(Error::invalid("node.concepts", "a concept has no name or no version"));
        }
        if concept.energy != info.model_name {
            return Err(Error::invalid(
                "node.concepts",
                format!(
                    "`{}` names the energy `{}`, the node's model is `{}`",
                    concept.name, concept.energy, info.model_name
                ),
            ));
        }
        if !names.insert(concept.name.clone()) {
            return Err(Error::invalid("node.concepts", format!("`{}` twice", concept.name)));
        }
    }
    Ok(())
}

fn check_address(address: &str) -> Result<()> {
    let problem = |text: &str| {
        Err(Error::invalid(
            "node.address",
            format!("`{address}` {text}, e.g. http://10.0.0.7:7101"),
        ))
    };
    let uri = match address.parse::<tonic::transport::Uri>() {
        Ok(uri) if uri.scheme().is_some() => uri,
        _ => return problem("must be a URI that other services reach the node at"),
    };
    match uri.host() {
        None | Some("" | "0.0.0.0" | "[::]") => {
            problem("names no host; announce an address that others can connect to")
        }
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> v1::NodeInfo {
        let concept =
            v1::ConceptRef { name: "axe".into(), version: "1".into(), ..Default::default() };
        v1::NodeInfo {
            node_id: id.into(),
            address: "http://127.0.0.1:7101".into(),
            protocol_version: PROTOCOL_VERSION,
            preprocessing_version: PREPROCESSING_VERSION,
            concepts: vec![v1::ConceptInfo { concept: Some(concept), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn a_registration_lives_by_renewal_and_dies_without() {
        let mut table = NodeTable::default();
        table.register(node("a"), "one".into(), 0, 100);
        table.register(node("b"), "two".into(), 0, 100);
        assert!(table.renew("a", "one", 90, 100));
        assert_eq!(table.expire(100), ["b"]);
        assert!(!table.renew("b", "two", 101, 100));
        assert_eq!(table.expire(189), Vec::<String>::new());
        assert_eq!(table.expire(190), ["a"]);
    }

    #[test]
    fn a_restarted_node_replaces_itself_and_the_old_registration_is_dead() {
        let mut table = NodeTable::default();
        table.register(node("a"), "old".into(), 0, 100);
        table.register(node("a"), "new".into(), 5, 100);
        assert!(!table.renew("a", "old", 6, 100));
        assert!(!table.deregister("a", "old"));
        assert!(table.deregister("a", "new"));
    }

    #[test]
    fn reservations_are_load_until_dropped() {
        let registry = Registry::new(Duration::from_secs(60));
        registry.register(node("a")).expect("it is valid");
        let endpoint = v1::EnergyEndpoint { node: Some(node("a")), concepts: vec![] };
        let reservation = registry.reserve(&[endpoint]);
        assert_eq!(registry.live()[0].load, 1);
        drop(reservation);
        assert_eq!(registry.live()[0].load, 0);
    }

    #[test]
    fn bad_registrations_are_refused_with_the_reason() {
        let registry = Registry::new(Duration::from_secs(60));
        type Spoil = fn(&mut v1::NodeInfo);
        let cases: [(Spoil, &str); 9] = [
            (|n| n.protocol_version = 9, "speaks protocol 9"),
            (|n| n.preprocessing_version = 9, "has preprocessing 9"),
            (|n| n.node_id.clear(), "node.node_id"),
            (|n| n.address = "kitchen".into(), "must be a URI"),
            (|n| n.address = "http://0.0.0.0:7101".into(), "names no host"),
            (|n| n.concepts.clear(), "serves one at least"),
            (|n| n.concepts.push(n.concepts[0].clone()), "`axe` twice"),
            (|n| n.concepts[0].concept = None, "no name"),
            (|n| n.model_name = "clip".into(), "names the energy ``, the node's model is `clip`"),
        ];
        for (spoil, expected) in cases {
            let mut info = node("a");
            spoil(&mut info);
            let error = registry.register(info).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(registry.live().is_empty());
    }
}
