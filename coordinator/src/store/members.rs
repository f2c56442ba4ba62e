//! Who is in the cluster, for a store that one process holds. Pure: `now` is an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use fairlead_common::probe::Probe;

use crate::clock::is_beyond;

use super::{Member, MemberKey, Roster, Seen};

#[derive(Debug, Default)]
pub(super) struct Members {
    /// Members by kind and id, with the end of their membership.
    all: BTreeMap<(i32, String), (Arc<Member>, i64)>,
    version: u64,
    seen: Seen,
    retired: Seen,
}

impl Members {
    /// Nobody yet, in a cluster that has seen this before.
    pub(super) fn new(seen: Seen) -> Self {
        Self { seen, ..Self::default() }
    }

    /// Adds a member or replaces the one of its name. Says whether it brought something never seen.
    pub(super) fn join(&mut self, member: Member, until: i64) -> bool {
        let before = self.seen.len();
        let mut own = Seen::default();
        own.add(&member);
        self.seen.extend(&own);
        self.retired = self.retired.without(&own);
        self.version += 1;
        self.all.insert((member.kind, member.id.clone()), (Arc::new(member), until));
        self.seen.len() > before
    }

    /// Extends memberships and returns those that have ended.
    pub(super) fn keep(&mut self, keys: &[MemberKey], until: i64) -> Vec<MemberKey> {
        let lost = keys.iter().filter(|key| match self.find(key) {
            Some((_, end)) => {
                *end = until.max(*end);
                false
            }
            None => true,
        });
        lost.cloned().collect()
    }

    /// Ends a membership; `false` if it had ended before.
    pub(super) fn leave(&mut self, key: &MemberKey) -> bool {
        let found = self.find(key).is_some();
        if found {
            self.all.remove(&(key.kind.into(), key.id.clone()));
            self.version += 1;
        }
        found
    }

    /// Forgets that a concept was ever served.
    pub(super) fn retire(&mut self, concept: &str) -> BTreeSet<Probe> {
        let gone = self.seen.retire(concept);
        self.retired.probes.extend(gone.iter().cloned());
        self.version += u64::from(!gone.is_empty());
        gone
    }

    /// Everyone whose membership has not ended, if that is not what `known` was.
    pub(super) fn roster(&mut self, known: Option<u64>, now: i64) -> Option<Roster> {
        let before = self.all.len();
        // At 0 nobody is found to be gone.
        self.all.retain(|_, (_, until)| *until > now && (now == 0 || !is_beyond(*until, now)));
        self.version += u64::from(self.all.len() < before);
        (known != Some(self.version)).then(|| Roster {
            version: self.version,
            members: self.all.values().map(|(member, _)| Arc::clone(member)).collect(),
            seen: self.seen.clone(),
            retired: self.retired.clone(),
        })
    }

    fn find(&mut self, key: &MemberKey) -> Option<&mut (Arc<Member>, i64)> {
        let found = self.all.get_mut(&(key.kind.into(), key.id.clone()))?;
        (found.0.registration == key.registration).then_some(found)
    }
}
