//! Who is in the cluster: energy nodes and workers. A membership ends unless it is renewed. The store
//! holds them, so that every coordinator knows all; here is the view that decisions read.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use fairlead_common::{bounds::MAX_KNOWN_CONCEPTS, probe::Probe};
use fairlead_proto::v1;
use parking_lot::Mutex;
use prost::Message;
use tokio::{sync::watch, time::Instant};

use crate::{
    clock::{Clock, millis},
    contact::Contact,
    error::{Error, Result},
    routing::LiveNode,
    state::QueueName,
    store::{Member, MemberKey, MemberKind, Roster, Seen, Store, StoreError},
};

/// The members; clones share the view.
#[derive(Debug, Clone)]
pub(crate) struct Registry {
    shared: Arc<Shared>,
}

/// The members as they were last read.
#[derive(Debug, Default)]
struct View {
    roster: Roster,
    nodes: Vec<LiveNode>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<dyn Store>,
    clock: Clock,
    contact: Mutex<Contact>,
    view: Mutex<Arc<View>>,
    /// When the newest read of the members began that has ended; one reads at a time.
    read: tokio::sync::Mutex<Option<Instant>>,
    /// What any member ever had, as far as this process knows: the store may lose it.
    known: Mutex<Seen>,
    load: Mutex<HashMap<String, usize>>,
    /// Counts changes of the energy nodes.
    changes: watch::Sender<u64>,
    ttl: Duration,
}

impl Registry {
    /// Members of `store`; a membership ends `ttl` after its last renewal. When the store did not answer
    /// for longer than `pause`, nobody could renew.
    pub(crate) fn new(store: Arc<dyn Store>, clock: Clock, ttl: Duration, pause: Duration) -> Self {
        let is_shared = store.is_shared();
        let shared = Shared {
            store,
            clock,
            contact: Mutex::new(Contact::new(Instant::now(), pause, is_shared)),
            view: Mutex::default(),
            read: tokio::sync::Mutex::default(),
            known: Mutex::default(),
            load: Mutex::default(),
            changes: watch::Sender::new(0),
            ttl,
        };
        Self { shared: Arc::new(shared) }
    }

    /// How long a membership lasts without renewal.
    pub(crate) fn ttl(&self) -> Duration {
        self.shared.ttl
    }

    /// Reads the members again, if they have changed. Callers that come together share a read that began
    /// after they came.
    pub(crate) async fn refresh(&self) -> Result<(), StoreError> {
        let asked = Instant::now();
        let mut read = self.shared.read.lock().await;
        if read.is_some_and(|began| began > asked) {
            return Ok(());
        }
        let began = Instant::now();
        self.read().await?;
        *read = Some(began);
        Ok(())
    }

    /// Times of others cannot be compared with those from before: all get the time to renew again.
    pub(crate) fn interrupted(&self) {
        self.shared.contact.lock().interrupted(Instant::now());
    }

    async fn read(&self) -> Result<(), StoreError> {
        let known = Some(self.view().roster.version).filter(|&version| version > 0);
        // Before everyone was there: then nobody is found to be gone.
        let now = match self.is_settled(self.shared.ttl) {
            true => self.shared.clock.now(),
            false => 0,
        };
        let roster = self.shared.store.roster(known, now).await?;
        self.shared.contact.lock().answered(Instant::now());
        let Some(mut roster) = roster else { return Ok(()) };
        let lost = self.remember(&mut roster);
        if lost.len() > 0 {
            tracing::warn!(
                entries = lost.len(),
                "the store has lost what was seen; it is told again"
            );
            self.shared.store.recall(&lost).await?;
        }
        let view = Arc::new(View::new(roster));
        let old = std::mem::replace(&mut *self.shared.view.lock(), Arc::clone(&view));
        let names: BTreeSet<(i32, &str)> = view.names().collect();
        for gone in old.roster.members.iter().filter(|old| !names.contains(&name(old))) {
            tracing::info!(member = gone.id, kind = ?gone.kind(), "left the cluster");
        }
        let same = |a: &LiveNode, b: &LiveNode| Arc::ptr_eq(&a.info, &b.info) || a.info == b.info;
        let nodes_stay = old.nodes.len() == view.nodes.len()
            && old.nodes.iter().zip(&view.nodes).all(|(a, b)| same(a, b));
        if !nodes_stay {
            self.shared.changes.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// Adds to what the store has seen what this process knows and nobody has retired, and what members
    /// have now; returns what the store lacks. A policy over all concepts must not shrink because a
    /// store was flushed.
    fn remember(&self, roster: &mut Roster) -> Seen {
        let mut served = Seen::default();
        roster.members.iter().for_each(|member| served.add(member));
        let mut known = self.shared.known.lock();
        *known = known.without(&roster.retired);
        known.extend(&served);
        let lost = known.without(&roster.seen);
        known.extend(&roster.seen);
        roster.seen = known.clone();
        lost
    }

    /// Whether everyone has been able to renew something for the length of `ttl`.
    pub(crate) fn is_settled(&self, ttl: Duration) -> bool {
        self.shared.contact.lock().is_settled(Instant::now(), ttl)
    }

    fn view(&self) -> Arc<View> {
        Arc::clone(&self.shared.view.lock())
    }

    /// Adds a member, or replaces the one of its kind and name.
    pub(crate) async fn join(&self, member: Member) -> Result<(), StoreError> {
        let Shared { store, clock, ttl, .. } = &*self.shared;
        store.join(member, clock.now(), millis(*ttl)).await?;
        self.refresh().await
    }

    /// Renews memberships and returns those that have ended.
    pub(crate) async fn keep(&self, members: &[MemberKey]) -> Result<Vec<MemberKey>, StoreError> {
        if members.is_empty() {
            return Ok(Vec::new());
        }
        let Shared { store, clock, ttl, .. } = &*self.shared;
        store.keep(members, clock.now(), millis(*ttl)).await
    }

    /// Ends a membership; `false` if it had ended before.
    pub(crate) async fn leave(&self, member: &MemberKey) -> Result<bool, StoreError> {
        let left = self.shared.store.leave(member).await?;
        self.refresh().await?;
        Ok(left)
    }

    /// Refuses a node whose concepts are more than a cluster remembers. What it has already counts once.
    pub(crate) fn has_room(&self, info: &v1::NodeInfo) -> Result<()> {
        let known = &self.view().roster.seen.probes;
        let own = info.concepts.iter().filter_map(|info| info.concept.as_ref()).map(Probe::from);
        let new = own.filter(|probe| !known.contains(probe)).count();
        match new == 0 || known.len() + new <= MAX_KNOWN_CONCEPTS {
            true => Ok(()),
            false => Err(Error::Forbidden(format!(
                "node.concepts: the cluster remembers {} concepts and {new} more would be above \
                 {MAX_KNOWN_CONCEPTS}; retire those that nobody needs (`fairlead concepts --retire NAME`)",
                known.len()
            ))),
        }
    }

    /// Registers an energy node and returns the registration's id. It replaces the one of that name.
    pub(crate) async fn register(&self, info: v1::NodeInfo) -> Result<String> {
        let registration = uuid::Uuid::new_v4().to_string();
        tracing::info!(
            node = info.node_id,
            address = info.address,
            model = info.model_name,
            concepts = info.concepts.len(),
            "energy node registered"
        );
        self.join(Member {
            kind: MemberKind::EnergyNode.into(),
            id: info.node_id.clone(),
            registration: registration.clone(),
            since_unix_ms: self.shared.clock.now(),
            node: Some(info),
            ..Member::default()
        })
        .await?;
        Ok(registration)
    }

    /// Renews a registration; NOT_REGISTERED means that the node has to register again.
    pub(crate) async fn renew(&self, node_id: &str, registration: &str) -> Result<()> {
        let lost = self.keep(&[node_key(node_id, registration)]).await?;
        match lost.is_empty() {
            true => Ok(()),
            false => Err(Error::NotRegistered { node_id: node_id.to_owned() }),
        }
    }

    /// Ends a registration.
    pub(crate) async fn deregister(&self, node_id: &str, registration: &str) -> Result<()> {
        match self.leave(&node_key(node_id, registration)).await? {
            true => Ok(()),
            false => Err(Error::NotRegistered { node_id: node_id.to_owned() }),
        }
    }

    /// Forgets a concept that no live node serves, and returns the energies that it was known from.
    pub(crate) async fn retire(&self, concept: &str) -> Result<BTreeSet<String>> {
        self.refresh().await?;
        let serves = |node: &LiveNode| {
            let mut served = node.info.concepts.iter().filter_map(|info| info.concept.as_ref());
            served.any(|served| served.name == concept)
        };
        if let Some(node) = self.live().into_iter().find(serves) {
            let (concept, node) = (concept.to_owned(), node.info.node_id.clone());
            return Err(Error::StillServed { concept, node });
        }
        let energies = self.shared.store.retire(concept).await?;
        self.refresh().await?;
        match energies.is_empty() {
            true => Err(Error::NotFound(format!("concept `{concept}`"))),
            false => Ok(energies),
        }
    }

    /// What was served once and by no live node now.
    pub(crate) fn absent(&self) -> Vec<v1::ConceptRef> {
        let view = self.view();
        let infos = view.nodes.iter().flat_map(|node| &node.info.concepts);
        let served: BTreeSet<Probe> =
            infos.filter_map(|info| info.concept.as_ref()).map(Probe::from).collect();
        let absent = view.roster.seen.probes.difference(&served);
        absent
            .map(|Probe { concept, energy }| v1::ConceptRef {
                name: concept.clone(),
                energy: energy.clone(),
                version: String::new(),
            })
            .collect()
    }

    /// All live energy nodes.
    pub(crate) fn live(&self) -> Vec<LiveNode> {
        let (load, view) = (self.shared.load.lock(), self.view());
        let load = |node: &LiveNode| load.get(&node.info.node_id).copied().unwrap_or_default();
        view.nodes.iter().map(|node| LiveNode { load: load(node), ..node.clone() }).collect()
    }

    /// Workers of the whole cluster.
    pub(crate) fn workers(&self) -> Vec<Arc<Member>> {
        let view = self.view();
        let is_worker = |member: &&Arc<Member>| member.kind() == MemberKind::Worker;
        view.roster.members.iter().filter(is_worker).cloned().collect()
    }

    /// The queues that some worker of the cluster has the generator of.
    pub(crate) fn queues(&self) -> BTreeSet<QueueName> {
        self.workers().iter().flat_map(|worker| &worker.models).map(QueueName::of).collect()
    }

    /// Generators of workers that take shards, with the number of workers each; the batch is what each of
    /// them can do. Whoever describes a name otherwise has another generator: of one name, the one that has
    /// been there longest comes first.
    pub(crate) fn models(&self) -> Vec<v1::ModelInfo> {
        let mut models: BTreeMap<ModelKey, (i64, v1::ModelInfo)> = BTreeMap::new();
        for worker in self.workers().iter().filter(|worker| !worker.draining) {
            for model in &worker.models {
                let (since, entry) = models.entry(model_key(model)).or_insert_with(|| {
                    (worker.since_unix_ms, v1::ModelInfo { workers: 0, ..model.clone() })
                });
                *since = worker.since_unix_ms.min(*since);
                entry.workers += 1;
                entry.max_batch = entry.max_batch.min(model.max_batch);
            }
        }
        let mut models: Vec<_> = models.into_values().collect();
        models.sort_by(|(since, one), (other_since, other)| {
            one.name.cmp(&other.name).then(since.cmp(other_since))
        });
        models.into_iter().map(|(_, model)| model).collect()
    }

    /// What any member ever had.
    pub(crate) fn seen(&self) -> Seen {
        self.view().roster.seen.clone()
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

    /// Wakes when the energy nodes change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }
}

impl View {
    fn new(roster: Roster) -> Self {
        let node = |member: &Arc<Member>| {
            let info = Arc::new(member.node.clone()?);
            Some(LiveNode { info, since_unix_ms: member.since_unix_ms, load: 0 })
        };
        Self { nodes: roster.members.iter().filter_map(node).collect(), roster }
    }

    fn names(&self) -> impl Iterator<Item = (i32, &str)> {
        self.roster.members.iter().map(|member| name(member))
    }
}

/// What makes two generators one: the name, and all that their workers say of them but how many of them are
/// made at once.
pub(crate) type ModelKey = (String, Vec<u8>);

/// The key of a worker's generator.
pub(crate) fn model_key(model: &v1::ModelInfo) -> ModelKey {
    let same = v1::ModelInfo { max_batch: 0, workers: 0, ..model.clone() };
    (model.name.clone(), same.encode_to_vec())
}

fn name(member: &Member) -> (i32, &str) {
    (member.kind, &member.id)
}

fn node_key(node_id: &str, registration: &str) -> MemberKey {
    MemberKey {
        kind: MemberKind::EnergyNode,
        id: node_id.to_owned(),
        registration: registration.to_owned(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn node(id: &str) -> v1::NodeInfo {
        let concept =
            v1::ConceptRef { name: "axe".into(), version: "1".into(), ..Default::default() };
        v1::NodeInfo {
            node_id: id.into(),
            address: "http://127.0.0.1:7101".into(),
            concepts: vec![v1::ConceptInfo { concept: Some(concept), ..Default::default() }],
            ..Default::default()
        }
    }

    async fn registry(store: &Arc<dyn Store>) -> Registry {
        let clock = Clock::of(Arc::clone(store)).await.expect("it tells the time");
        let ttl = Duration::from_secs(60);
        Registry::new(Arc::clone(store), clock, ttl, ttl / 2)
    }

    async fn alone() -> Registry {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        registry(&store).await
    }

    #[tokio::test]
    async fn a_restarted_node_replaces_itself_and_the_old_registration_is_dead() {
        let registry = alone().await;
        let old = registry.register(node("a")).await.expect("it is valid");
        let new = registry.register(node("a")).await.expect("it is valid");
        registry.renew("a", &old).await.expect_err("another registration is valid");
        registry.deregister("a", &old).await.expect_err("another registration is valid");
        registry.renew("a", &new).await.expect("it is valid");
        registry.deregister("a", &new).await.expect("it is valid");
        assert!(registry.live().is_empty());
        assert!(registry.seen().probes.iter().any(|probe| probe.concept == "axe"));
        assert_eq!(registry.absent()[0].name, "axe");
    }

    #[tokio::test]
    async fn a_concept_is_retired_once_nobody_serves_it() {
        let registry = alone().await;
        let registration = registry.register(node("a")).await.expect("it is valid");
        let refused = registry.retire("axe").await.expect_err("it is served").to_string();
        assert!(refused.contains("node `a` serves it"), "{refused}");
        registry.deregister("a", &registration).await.expect("it is valid");
        assert_eq!(registry.retire("axe").await.expect("nobody serves it").len(), 1);
        assert!(registry.seen().probes.is_empty());
        registry.retire("axe").await.expect_err("it is gone");
    }

    #[tokio::test]
    async fn coordinators_of_one_store_see_each_others_members() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let (one, other) = (registry(&store).await, registry(&store).await);
        let registration = one.register(node("a")).await.expect("it is valid");
        assert!(other.live().is_empty());
        other.refresh().await.expect("it reads");
        assert_eq!(other.live().len(), 1);
        other.renew("a", &registration).await.expect("any coordinator renews");
    }

    #[tokio::test]
    async fn two_descriptions_under_one_name_are_two_models_the_oldest_first() {
        let registry = alone().await;
        let model = |hash: &str, max_side, max_batch| v1::ModelInfo {
            name: "sd".into(),
            hash: hash.into(),
            max_side,
            max_batch,
            ..Default::default()
        };
        let worker = |id: &str, since_unix_ms, model| Member {
            kind: MemberKind::Worker.into(),
            id: id.into(),
            registration: id.into(),
            since_unix_ms,
            models: vec![model],
            ..Member::default()
        };
        for member in [
            worker("aaa", 7, model("other", 64, 1)),
            worker("bbb", 8, model("sd", 8, 1)),
            worker("w-1", 5, model("sd", 64, 4)),
            worker("w-2", 9, model("sd", 64, 2)),
        ] {
            registry.join(member).await.expect("it joins");
        }
        let models = registry.models();
        let seen: Vec<_> = models
            .iter()
            .map(|model| (model.hash.as_str(), model.max_side, model.max_batch, model.workers))
            .collect();
        assert_eq!(seen, [("sd", 64, 2, 2), ("other", 64, 1, 1), ("sd", 8, 1, 1)]);
    }

    #[tokio::test]
    async fn a_cluster_remembers_so_many_concepts_and_no_more() {
        let registry = alone().await;
        let many = |id: &str, numbers: std::ops::Range<usize>| v1::NodeInfo {
            concepts: numbers
                .map(|number| v1::ConceptInfo {
                    concept: Some(v1::ConceptRef {
                        name: format!("concept-{number}"),
                        ..Default::default()
                    }),
                    ..Default::default()
                })
                .collect(),
            ..node(id)
        };
        registry.has_room(&many("a", 0..MAX_KNOWN_CONCEPTS)).expect("just so many");
        registry.register(many("a", 1..MAX_KNOWN_CONCEPTS)).await.expect("it is valid");
        let refused = registry.has_room(&many("b", 0..MAX_KNOWN_CONCEPTS + 1)).expect_err("two");
        assert!(refused.to_string().contains("2 more would be above"), "{refused}");
        registry.has_room(&many("a", 1..MAX_KNOWN_CONCEPTS)).expect("what it has already");
    }

    #[tokio::test]
    async fn reservations_are_load_until_dropped() {
        let registry = alone().await;
        registry.register(node("a")).await.expect("it is valid");
        let endpoint = v1::EnergyEndpoint { node: Some(node("a")), concepts: vec![] };
        let reservation = registry.reserve(&[endpoint]);
        assert_eq!(registry.live()[0].load, 1);
        drop(reservation);
        assert_eq!(registry.live()[0].load, 0);
    }
}
