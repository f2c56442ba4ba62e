//! All that a node serves at one time: sets of concepts and the calibrations of each.

use std::collections::BTreeMap;

use fairlead_proto::v1;

use crate::{
    calibration::store::{Calibrations, Levels},
    error::RequestError,
    gate::Level,
    served::{Served, ServedConcept},
};

/// See the module. It is replaced as a whole, so that a request sees one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Offer {
    pub(crate) served: Served,
    pub(crate) calibrations: Calibrations,
}

impl Offer {
    /// The concepts as others see them.
    pub(crate) fn concepts(&self) -> Vec<v1::ConceptInfo> {
        self.served.concepts.iter().map(|concept| self.info(concept)).collect()
    }

    /// The calibrations as others see them.
    pub(crate) fn calibrations(&self) -> Vec<v1::CalibrationInfo> {
        self.served.sets.iter().flat_map(|set| self.calibrations.infos(set)).collect()
    }

    /// One set's concepts and calibrations.
    pub(crate) fn set(&self, set: usize) -> v1::AddConceptsResponse {
        v1::AddConceptsResponse {
            concepts: self.served.of_set(set).map(|concept| self.info(concept)).collect(),
            calibrations: self.calibrations.infos(&self.served.sets[set]),
        }
    }

    fn info(&self, concept: &ServedConcept) -> v1::ConceptInfo {
        let ServedConcept { info, version, since_unix_ms, .. } = concept;
        v1::ConceptInfo {
            concept: Some(v1::ConceptRef {
                name: info.name.clone(),
                version: version.clone(),
                energy: self.served.energy.clone(),
            }),
            group: info.group.clone(),
            phrases: info.targets.clone(),
            weight: info.weight,
            since_unix_ms: *since_unix_ms,
        }
    }

    /// Levels of the concepts with these `indices` at each of `times` in a run of `key`: every set's from
    /// its own calibration.
    pub(crate) fn levels(
        &self,
        indices: &[usize],
        times: &[f32],
        run: &Run<'_>,
    ) -> Result<Levels, RequestError> {
        let Run { key, crops, allow_fallback, steepness } = *run;
        // By the place in `indices`, each at every time.
        let mut columns: BTreeMap<usize, Vec<Level>> = BTreeMap::new();
        let (mut calibration_ids, mut fallbacks) = (Vec::new(), Vec::new());
        for (set, hash) in self.served.sets.iter().enumerate() {
            let concept = |place: usize| &self.served.concepts[indices[place]];
            let places: Vec<usize> =
                (0..indices.len()).filter(|&place| concept(place).set == set).collect();
            if places.is_empty() {
                continue;
            }
            let concepts: Vec<&ServedConcept> =
                places.iter().map(|&place| concept(place)).collect();
            let choice = self.calibrations.choose(hash, key, crops, allow_fallback)?;
            let of_set = choice.levels(&concepts, times, key, steepness)?;
            for (column, &place) in places.iter().enumerate() {
                columns.insert(place, of_set.levels.iter().map(|row| row[column]).collect());
            }
            calibration_ids.extend(of_set.calibration_ids);
            fallbacks.extend(of_set.fallbacks);
        }
        let row = |time: usize| columns.values().map(|column| column[time]).collect();
        Ok(Levels { levels: (0..times.len()).map(row).collect(), calibration_ids, fallbacks })
    }

    /// The same for every concept by itself: none where its set has no level in this run.
    pub(crate) fn standing(&self, indices: &[usize], times: &[f32], run: &Run<'_>) -> Standing {
        let column = |&index: &usize| self.levels(&[index], times, run).ok();
        let columns: Vec<Option<Levels>> = indices.iter().map(column).collect();
        let level = |column: &Option<Levels>, time: usize| {
            column.as_ref().map(|levels| levels.levels[time][0])
        };
        let row = |time| columns.iter().map(|column| level(column, time)).collect();
        (0..times.len()).map(row).collect()
    }
}

/// Levels `[times][concepts]` that scores are set beside, where there are some.
pub(crate) type Standing = Vec<Vec<Option<Level>>>;

/// What levels are asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run<'a> {
    /// Generator, sampler and steps.
    pub(crate) key: &'a v1::CalibrationKey,
    /// Crops per image.
    pub(crate) crops: u32,
    /// Whether something else may stand in for a missing calibration.
    pub(crate) allow_fallback: bool,
    /// `K_s` of the energy.
    pub(crate) steepness: f32,
}
