//! Which node to ask for which concepts: a pure function of the live nodes and those that failed.

use std::collections::BTreeMap;

use fairlead_proto::v1::{ConceptRef, EnergyEndpoint, NodeInfo};

/// Nodes that failed, and whether their trouble may pass.
pub(crate) type Failed = BTreeMap<String, bool>;

/// A node and what to ask it for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Route {
    pub(crate) node: NodeInfo,
    pub(crate) concepts: Vec<ConceptRef>,
}

impl Route {
    /// "id (address)".
    pub(crate) fn label(&self) -> String {
        format!("{} ({})", self.node.node_id, self.node.address)
    }
}

pub(crate) fn names(concepts: &[ConceptRef]) -> Vec<String> {
    concepts.iter().map(|concept| concept.name.clone()).collect()
}

/// Assigns each concept to the first endpoint that serves it at its version and is not in
/// `failed`. Routes come in the order of their first concept.
///
/// # Errors
/// The concepts that no endpoint is left for.
pub(crate) fn route(
    concepts: &[ConceptRef],
    endpoints: &[EnergyEndpoint],
    failed: &Failed,
) -> Result<Vec<Route>, Vec<ConceptRef>> {
    let (mut routes, mut missing): (Vec<Route>, Vec<ConceptRef>) = (Vec::new(), Vec::new());
    for concept in concepts {
        let node = endpoints
            .iter()
            .filter(|endpoint| endpoint.concepts.contains(concept))
            .filter_map(|endpoint| endpoint.node.as_ref())
            .find(|node| !failed.contains_key(&node.node_id));
        let Some(node) = node else {
            missing.push(concept.clone());
            continue;
        };
        match routes.iter_mut().find(|route| route.node.node_id == node.node_id) {
            Some(route) => route.concepts.push(concept.clone()),
            None => routes.push(Route { node: node.clone(), concepts: vec![concept.clone()] }),
        }
    }
    if missing.is_empty() { Ok(routes) } else { Err(missing) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn concept(name: &str) -> ConceptRef {
        ConceptRef { name: name.into(), version: "v1".into(), ..Default::default() }
    }

    fn endpoint(id: &str, concepts: &[&str]) -> EnergyEndpoint {
        EnergyEndpoint {
            node: Some(NodeInfo { node_id: id.into(), ..Default::default() }),
            concepts: concepts.iter().map(|name| concept(name)).collect(),
        }
    }

    fn failed(ids: &[&str]) -> Failed {
        ids.iter().map(|id| ((*id).to_owned(), false)).collect()
    }

    #[test]
    fn one_question_per_node_and_replicas_only_when_needed() {
        let endpoints =
            [endpoint("a", &["knife", "axe"]), endpoint("b", &["axe", "beer"]), endpoint("c", &[])];
        let concepts = ["beer", "knife", "axe"].map(concept);
        let routes = route(&concepts, &endpoints, &failed(&[])).expect("all are served");
        assert_eq!(routes.len(), 2);
        assert_eq!(names(&routes[0].concepts), ["beer"]);
        assert_eq!(names(&routes[1].concepts), ["knife", "axe"]);
        let missing = route(&concepts, &endpoints, &failed(&["a"])).expect_err("knife is alone");
        assert_eq!(names(&missing), ["knife"]);
        let rest = route(&concepts[..1], &endpoints, &failed(&["a"])).expect("b serves beer");
        assert_eq!(rest[0].node.node_id, "b");
    }

    #[test]
    fn another_version_does_not_count() {
        let asked = ConceptRef { name: "knife".into(), version: "v2".into(), ..Default::default() };
        assert!(route(&[asked], &[endpoint("a", &["knife"])], &failed(&[])).is_err());
    }

    proptest! {
        #[test]
        fn every_concept_is_asked_once_or_reported(
            served in prop::collection::vec(prop::collection::vec(0usize..6, 0..6), 0..5),
            down in prop::collection::vec(0usize..5, 0..3),
        ) {
            let all = ["c0", "c1", "c2", "c3", "c4", "c5"];
            let endpoints: Vec<_> = served.iter().enumerate().map(|(i, list)| {
                let list: Vec<&str> = list.iter().map(|&c| all[c]).collect();
                endpoint(&format!("n{i}"), &list)
            }).collect();
            let down: Failed = down.iter().map(|i| (format!("n{i}"), false)).collect();
            let concepts = all.map(concept);
            match route(&concepts, &endpoints, &down) {
                Ok(routes) => {
                    let mut asked: Vec<String> =
                        routes.iter().flat_map(|route| names(&route.concepts)).collect();
                    asked.sort();
                    prop_assert_eq!(asked, all);
                    prop_assert!(routes.iter().all(|r| !down.contains_key(&r.node.node_id)));
                }
                Err(missing) => prop_assert!(!missing.is_empty()),
            }
        }
    }
}
