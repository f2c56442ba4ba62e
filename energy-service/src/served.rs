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
}

/// The served set, in the order the scorer knows it by.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Served {
    pub(crate) concepts: Vec<ServedConcept>,
    /// Name of the energy model.
    pub(crate) energy: String,
    /// Content hash of the energy model.
    pub(crate) energy_model: String,
    pub(crate) preprocessing_version: u32,
    /// Hash of the whole set.
    pub(crate) concept_set: String,
}

impl Served {
    pub(crate) fn new(set: &ConceptSet, scorer: &ScorerDescription) -> Self {
        let version =
            |c: &Concept| c.version(scorer.kind, &scorer.model_hash, PREPROCESSING_VERSION);
        let concepts = set
            .concepts()
            .iter()
            .map(|info| ServedConcept { info: info.clone(), version: version(info) })
            .collect::<Vec<_>>();
        Self {
            concept_set: set_hash(
                concepts.iter().map(|c| (c.info.name.as_str(), c.version.as_str())),
            ),
            concepts,
            energy: scorer.model_name.clone(),
            energy_model: scorer.model_hash.clone(),
            preprocessing_version: PREPROCESSING_VERSION,
        }
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
        let set = ConceptSet::parse(Path::new("c.toml"), text).expect("it parses");
        let scorer = ScorerDescription {
            kind: "contrastive",
            model_name: "m".into(),
            model_hash: "h".into(),
            height: 8,
            width: 8,
            steepness: 50.0,
        };
        Served::new(&set, &scorer)
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
}
