//! Which energy node answers for which concept. Pure.

use std::{collections::BTreeSet, fmt, sync::Arc};

use fairlead_proto::v1::{CalibrationKey, ConceptRef, EnergyEndpoint, NodeInfo, SteeringParams};

/// A registered node as decisions see it.
#[derive(Debug, Clone)]
pub(crate) struct LiveNode {
    /// What it registered.
    pub(crate) info: Arc<NodeInfo>,
    /// When it registered, Unix milliseconds.
    pub(crate) since_unix_ms: i64,
    /// Shards and checks that use it now.
    pub(crate) load: usize,
}

impl LiveNode {
    /// Whether it serves `concept` at that very version.
    pub(crate) fn serves(&self, concept: &ConceptRef) -> bool {
        self.info.concepts.iter().any(|served| served.concept.as_ref() == Some(concept))
    }

    /// Whether it has a calibration for `run`.
    pub(crate) fn is_calibrated(&self, run: &Run) -> bool {
        self.info.calibrations.iter().any(|calibration| {
            calibration.key.as_ref() == Some(&run.key)
                && calibration.crops == run.crops
                && calibration.window_start >= run.window.0
                && calibration.window_end <= run.window.1
        })
    }
}

/// What of a job a calibration must be for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Run {
    /// Generator, sampler and steps.
    pub(crate) key: CalibrationKey,
    /// Crops per image.
    pub(crate) crops: u32,
    /// Start and end of the steering window, which the calibration must cover.
    pub(crate) window: (f32, f32),
}

impl Run {
    /// A run of `key` steered by `steering`, of which every knob is set.
    pub(crate) fn new(key: CalibrationKey, steering: &SteeringParams) -> Self {
        let window = (steering.window_start(), steering.window_end());
        Self { key, crops: steering.crops(), window }
    }

    /// The flags of `fairlead calibrate` that make a calibration for it.
    pub(crate) fn flags(&self) -> String {
        let Self { key, crops, window: (start, end) } = self;
        let steps = key.steps;
        format!("--steps {steps} --crops {crops} --window-start {start} --window-end {end}")
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key: CalibrationKey { sampler, steps, .. }, crops, window: (start, end) } = self;
        write!(f, "{sampler}, {steps} steps, {crops} crops, window {start} to {end}")
    }
}

/// How much calibration a job needs from its nodes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Calibration<'a> {
    /// Only nodes calibrated for the run will do.
    Required(&'a Run),
    /// Calibrated nodes are asked first.
    Preferred(&'a Run),
    /// Raw scores are enough.
    Unneeded,
}

/// A concept that no node can answer for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unserved {
    /// The concept.
    pub(crate) concept: ConceptRef,
    /// A live node serves it, but without the calibration.
    pub(crate) uncalibrated: bool,
}

impl fmt::Display for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ConceptRef { name, version, energy } = &self.concept;
        match self.uncalibrated {
            false => write!(
                f,
                "concept `{name}`: no live energy node with {energy} serves version {version}"
            ),
            true => write!(
                f,
                "concept `{name}`: no live energy node with {energy} has its calibration any longer; run \
                 `fairlead calibrate` again"
            ),
        }
    }
}

/// Nodes to ask, and concepts left over.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Assignment {
    /// Each served concept under exactly one node.
    pub(crate) endpoints: Vec<EnergyEndpoint>,
    /// Further nodes that serve some of them, to be asked if one of those fails.
    pub(crate) replicas: Vec<EnergyEndpoint>,
    /// Concepts without a node.
    pub(crate) unserved: Vec<Unserved>,
}

impl Assignment {
    /// What a worker is told: whom to ask first, then the replicas.
    pub(crate) fn told(&self) -> Vec<EnergyEndpoint> {
        [&self.endpoints[..], &self.replicas].concat()
    }
}

/// Assigns each of `concepts` to exactly one of `nodes`. Calibrated nodes come first, then the
/// least loaded; a node takes everything it can, so that few nodes are asked per step.
pub(crate) fn assign(
    concepts: &[ConceptRef],
    nodes: &[LiveNode],
    calibration: Calibration<'_>,
) -> Assignment {
    let uncalibrated = |node: &LiveNode| match calibration {
        Calibration::Required(run) | Calibration::Preferred(run) => !node.is_calibrated(run),
        Calibration::Unneeded => false,
    };
    let mut order: Vec<&LiveNode> = match calibration {
        Calibration::Required(_) => nodes.iter().filter(|node| !uncalibrated(node)).collect(),
        Calibration::Preferred(_) | Calibration::Unneeded => nodes.iter().collect(),
    };
    order.sort_by_key(|node| (uncalibrated(node), node.load, node.info.node_id.clone()));
    let mut left: Vec<ConceptRef> = concepts.to_vec();
    let (mut endpoints, mut replicas) = (Vec::new(), Vec::new());
    for node in order {
        let (taken, rest): (Vec<_>, Vec<_>) = left.into_iter().partition(|c| node.serves(c));
        left = rest;
        let is_taken = |concept: &ConceptRef| taken.contains(concept);
        let spare = concepts.iter().filter(|c| node.serves(c) && !is_taken(c));
        let spare: Vec<ConceptRef> = spare.cloned().collect();
        for (list, concepts) in [(&mut replicas, spare), (&mut endpoints, taken)] {
            if !concepts.is_empty() {
                list.push(EnergyEndpoint { node: Some(NodeInfo::clone(&node.info)), concepts });
            }
        }
    }
    let unserved = left.into_iter().map(|concept| {
        let uncalibrated = nodes.iter().any(|node| node.serves(&concept));
        Unserved { concept, uncalibrated }
    });
    Assignment { endpoints, replicas, unserved: unserved.collect() }
}

/// The ids of the endpoints' nodes.
pub(crate) fn node_ids(endpoints: &[EnergyEndpoint]) -> BTreeSet<&str> {
    let nodes = endpoints.iter().filter_map(|endpoint| endpoint.node.as_ref());
    nodes.map(|node| node.node_id.as_str()).collect()
}

/// Whether every endpoint is still live at the same address with the same concepts.
pub(crate) fn still_live(endpoints: &[EnergyEndpoint], nodes: &[LiveNode]) -> bool {
    endpoints.iter().all(|endpoint| {
        nodes.iter().any(|node| {
            endpoint.node.as_ref().is_some_and(|was| {
                was.node_id == node.info.node_id && was.address == node.info.address
            }) && endpoint.concepts.iter().all(|concept| node.serves(concept))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::{CalibrationInfo, ConceptInfo};
    use proptest::prelude::*;

    fn concept(name: &str) -> ConceptRef {
        ConceptRef { name: name.into(), version: "1".into(), ..Default::default() }
    }

    fn run() -> Run {
        let key = CalibrationKey { generator: "g".into(), sampler: "ddim".into(), steps: 25 };
        Run { key, crops: 4, window: (1.0, 0.6) }
    }

    fn node(id: &str, concepts: &[&str], load: usize, calibrated: bool) -> LiveNode {
        let info = |name: &&str| ConceptInfo { concept: Some(concept(name)), ..Default::default() };
        let calibration = CalibrationInfo {
            key: Some(run().key),
            crops: 4,
            window_start: 1.0,
            window_end: 0.4,
            ..Default::default()
        };
        LiveNode {
            info: Arc::new(NodeInfo {
                node_id: id.into(),
                concepts: concepts.iter().map(info).collect(),
                calibrations: calibrated.then_some(calibration).into_iter().collect(),
                ..Default::default()
            }),
            since_unix_ms: 0,
            load,
        }
    }

    fn ids(assignment: &Assignment) -> Vec<String> {
        let nodes = assignment.endpoints.iter().filter_map(|endpoint| endpoint.node.clone());
        nodes.map(|node| node.node_id).collect()
    }

    #[test]
    fn replicas_are_not_both_asked_and_the_idle_one_is_preferred() {
        let nodes = [node("a", &["x", "y"], 3, true), node("b", &["x", "y"], 1, true)];
        let run = run();
        let both = [concept("x"), concept("y")];
        let assignment = assign(&both, &nodes, Calibration::Required(&run));
        assert_eq!(ids(&assignment), ["b"]);
        let told = assignment.told();
        assert_eq!(node_ids(&told), BTreeSet::from(["a", "b"]));
        assert_eq!(told[1].node.as_ref().map(|node| node.node_id.as_str()), Some("a"));
        assert_eq!(told[1].concepts, both, "the replica serves all of them");
    }

    #[test]
    fn calibration_is_required_preferred_or_ignored() {
        let nodes = [node("a", &["x"], 0, false), node("b", &["x"], 9, true)];
        let (run, x) = (run(), [concept("x")]);
        assert_eq!(ids(&assign(&x, &nodes, Calibration::Required(&run))), ["b"]);
        assert_eq!(ids(&assign(&x, &nodes, Calibration::Preferred(&run))), ["b"]);
        assert_eq!(ids(&assign(&x, &nodes, Calibration::Unneeded)), ["a"]);
        let missing = assign(&x, &nodes[..1], Calibration::Required(&run)).unserved;
        assert!(missing[0].uncalibrated);
        assert!(!assign(&[concept("z")], &nodes, Calibration::Unneeded).unserved[0].uncalibrated);
    }

    #[test]
    fn a_calibration_is_for_its_crops_and_inside_its_window() {
        let nodes = [node("a", &["x"], 0, true)];
        let serves = |crops, window| {
            let run = Run { crops, window, ..run() };
            assign(&[concept("x")], &nodes, Calibration::Required(&run)).unserved.is_empty()
        };
        assert!(serves(4, (1.0, 0.4)) && serves(4, (0.9, 0.8)));
        assert!(!serves(2, (1.0, 0.4)));
        assert!(!serves(4, (1.0, 0.3)));
    }

    #[test]
    fn another_version_does_not_serve() {
        let other = ConceptRef { name: "x".into(), version: "2".into(), ..Default::default() };
        let nodes = [node("a", &["x"], 0, true)];
        assert_eq!(assign(&[other], &nodes, Calibration::Unneeded).endpoints, []);
    }

    proptest! {
        #[test]
        fn each_concept_is_asked_once_of_a_node_that_serves_it(
            wanted in prop::collection::btree_set("[a-f]", 0..6),
            served in prop::collection::vec((prop::collection::btree_set("[a-f]", 0..6), 0usize..4), 0..5),
        ) {
            let nodes: Vec<_> = served.iter().enumerate().map(|(i, (names, load))| {
                let names: Vec<_> = names.iter().map(String::as_str).collect();
                node(&format!("n{i}"), &names, *load, true)
            }).collect();
            let concepts: Vec<_> = wanted.iter().map(|name| concept(name)).collect();
            let Assignment { endpoints, unserved, .. } = assign(&concepts, &nodes, Calibration::Unneeded);
            prop_assert!(still_live(&endpoints, &nodes));
            let mut all: Vec<_> = endpoints.iter().flat_map(|e| e.concepts.clone()).collect();
            all.extend(unserved.iter().map(|u| u.concept.clone()));
            all.sort_by(|a, b| a.name.cmp(&b.name));
            prop_assert_eq!(all, concepts);
            for left in unserved {
                prop_assert!(nodes.iter().all(|node| !node.serves(&left.concept)));
            }
        }
    }
}
