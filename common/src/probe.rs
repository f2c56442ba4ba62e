//! Which energy asks about which concept.

use std::{collections::BTreeSet, fmt};

use fairlead_proto::v1::{ConceptRef, ConceptScore};

/// One energy's question about one concept: what scores and gates belong to. Ordered by concept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Probe {
    /// Name of the concept.
    pub concept: String,
    /// Name of the energy model.
    pub energy: String,
}

/// The names, among `probes`, of what a node asked for `concepts` is to be told about.
pub fn names_asked(concepts: &[ConceptRef], probes: &BTreeSet<Probe>) -> Vec<String> {
    let asked = |probe: &&Probe| concepts.iter().any(|concept| Probe::from(concept) == **probe);
    probes.iter().filter(asked).map(|probe| probe.concept.clone()).collect()
}

impl From<&ConceptRef> for Probe {
    fn from(concept: &ConceptRef) -> Self {
        Self { concept: concept.name.clone(), energy: concept.energy.clone() }
    }
}

impl From<&ConceptScore> for Probe {
    fn from(score: &ConceptScore) -> Self {
        Self { concept: score.concept.clone(), energy: score.energy.clone() }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.concept, self.energy)
    }
}
