//! What one node serves: concepts bound to an energy model, and how requests name them.

use std::collections::BTreeSet;

use fairlead_proto::{PREPROCESSING_VERSION, v1::ConceptRef};

use crate::{
    concepts::{Concept, ConceptSet, set_hash},
    error::RequestError,
    scorer::ScorerDescription,
};

/// A concept and its version at this node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ServedConcept {
    pub(crate) info: Concept,
    pub(crate) version: String,
    /// The set that it belongs to, an index into [`Served::sets`].
    pub(crate) set: usize,
    pub(crate) since_unix_ms: i64,
}

/// What the scorer knows, in its order: sets of concepts, each with gates of its own.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Served {
    pub(crate) concepts: Vec<ServedConcept>,
    /// Hash of each set.
    pub(crate) sets: Vec<String>,
    /// Name of the energy model.
    pub(crate) energy: String,
    /// Kind of the energy model.
    pub(crate) kind: &'static str,
    /// Content hash of the energy model.
    pub(crate) energy_model: String,
    pub(crate) preprocessing_version: u32,
}

impl Served {
    /// Nothing yet.
    pub(crate) fn by(scorer: &ScorerDescription) -> Self {
        Self {
            concepts: Vec::new(),
            sets: Vec::new(),
            energy: scorer.model_name.clone(),
            kind: scorer.kind,
            energy_model: scorer.model_hash.clone(),
            preprocessing_version: PREPROCESSING_VERSION,
        }
    }

    /// The number of `set` among the sets, and what is served with it unless it is served already.
    ///
    /// # Errors
    /// If a concept of that name is served in other words.
    pub(crate) fn with(
        &self,
        set: &ConceptSet,
        since_unix_ms: i64,
    ) -> Result<(usize, Option<Self>), RequestError> {
        let bind = |info: &Concept| ServedConcept {
            version: self.version(info),
            info: info.clone(),
            set: self.sets.len(),
            since_unix_ms,
        };
        let added: Vec<ServedConcept> = set.concepts().iter().map(bind).collect();
        let hash = set_hash(added.iter().map(|c| (c.info.name.as_str(), c.version.as_str())));
        if let Some(known) = self.sets.iter().position(|other| *other == hash)
            && self.of_set(known).all(|concept| set.concepts().contains(&concept.info))
        {
            return Ok((known, None));
        }
        let is_known =
            |new: &&ServedConcept| self.concepts.iter().any(|c| c.info.name == new.info.name);
        if let Some(twice) = added.iter().find(is_known) {
            return Err(RequestError::ServedAlready { concept: twice.info.name.clone() });
        }
        let mut served = self.clone();
        served.concepts.extend(added);
        served.sets.push(hash);
        Ok((self.sets.len(), Some(served)))
    }

    fn version(&self, concept: &Concept) -> String {
        concept.version(self.kind, &self.energy_model, self.preprocessing_version)
    }

    /// Whether all concepts of `set` are served, in whichever sets.
    pub(crate) fn has_all(&self, set: &ConceptSet) -> bool {
        let is_served = |info: &Concept| {
            let version = self.version(info);
            self.concepts.iter().any(|c| c.info.name == info.name && c.version == version)
        };
        set.concepts().iter().all(is_served)
    }

    /// The concepts of one set.
    pub(crate) fn of_set(&self, set: usize) -> impl Iterator<Item = &ServedConcept> {
        self.concepts.iter().filter(move |concept| concept.set == set)
    }

    /// Indices of the concepts a request asks for, in its order. Every one must be served here at
    /// exactly the version asked for.
    pub(crate) fn resolve(&self, refs: &[ConceptRef]) -> Result<Vec<usize>, RequestError> {
        if refs.is_empty() {
            let why = "is empty; name at least one concept with its version".to_owned();
            return Err(RequestError::Invalid { field: "concepts", why });
        }
        let mut seen = BTreeSet::new();
        refs.iter()
            .map(|asked| {
                if !seen.insert(&asked.name) {
                    let why = format!("names `{}` twice", asked.name);
                    return Err(RequestError::Invalid { field: "concepts", why });
                }
                let found = self.concepts.iter().position(|c| c.info.name == asked.name);
                match found.map(|index| (index, &self.concepts[index].version)) {
                    Some((index, version)) if *version == asked.version => Ok(index),
                    Some((_, version)) => Err(RequestError::WrongVersion {
                        concept: asked.name.clone(),
                        asked: asked.version.clone(),
                        served: version.clone(),
                    }),
                    None => Err(RequestError::UnknownConcept {
                        concept: asked.name.clone(),
                        served: self.names(),
                    }),
                }
            })
            .collect()
    }

    fn names(&self) -> String {
        self.concepts.iter().map(|c| c.info.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn served() -> Served {
        let text = r#"
            anchors = ["a picture"]
            concept = [
                { name = "axe", group = "weapons", targets = ["an axe"] },
                { name = "pill", group = "drugs", targets = ["a pill"] },
            ]
        "#;
        let set = parsed(text);
        let scorer = ScorerDescription {
            kind: "contrastive",
            model_name: "m".into(),
            model_hash: "h".into(),
            height: 8,
            width: 8,
            filter: fairlead_models::layers::Filter::BicubicAntialias,
            steepness: 50.0,
        };
        let (_, served) = Served::by(&scorer).with(&set, 0).expect("nothing is served yet");
        served.expect("it is new")
    }

    fn parsed(text: &str) -> ConceptSet {
        ConceptSet::parse(Path::new("c.toml"), text).expect("it parses")
    }

    #[test]
    fn concepts_resolve_by_name_and_exact_version() {
        let served = served();
        let asked = |index: usize| ConceptRef {
            name: served.concepts[index].info.name.clone(),
            version: served.concepts[index].version.clone(),
            ..Default::default()
        };
        assert_eq!(served.resolve(&[asked(1), asked(0)]).expect("served"), [1, 0]);
        let refused = |refs: &[ConceptRef]| served.resolve(refs).expect_err("refused").to_string();
        assert!(refused(&[]).contains("empty"));
        assert!(refused(&[asked(0), asked(0)]).contains("twice"));
        let unknown = ConceptRef { name: "hat".into(), ..asked(0) };
        assert!(refused(&[unknown]).contains("axe, pill"));
        let stale = ConceptRef { version: "0".into(), ..asked(0) };
        assert!(refused(&[stale]).contains(&served.concepts[0].version));
    }

    #[test]
    fn a_set_is_added_once_and_changes_no_other() {
        let served = served();
        let hat = r#"concept = [
            { name = "hat", group = "clothes", targets = ["a hat"], anchors = ["a picture"] },
        ]"#;
        let (set, more) = served.with(&parsed(hat), 7).expect("it is new");
        let more = more.expect("it is new");
        assert_eq!(
            (set, &more.sets[..1], &more.concepts[..2]),
            (1, &*served.sets, &*served.concepts)
        );
        assert_eq!((more.concepts[2].set, more.concepts[2].since_unix_ms), (1, 7));
        assert_eq!(more.with(&parsed(hat), 9).expect("it is known"), (1, None));
        assert!(more.has_all(&parsed(hat)) && !served.has_all(&parsed(hat)));
        assert!(!more.has_all(&parsed(&hat.replace("a hat", "a cap"))));
        for other in [hat.replace("a hat", "a cap"), hat.replace("clothes", "things")] {
            let refused = more.with(&parsed(&other), 9).expect_err("other words").to_string();
            assert!(refused.contains("`hat`"), "{refused}");
        }
    }
}
