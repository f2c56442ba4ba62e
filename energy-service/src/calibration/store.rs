//! The calibrations of one node, and which of them an evaluation may use.

use std::{fs, io, path::Path, sync::Arc};

use fairlead_common::envelope;
use fairlead_proto::v1::{CalibrationInfo, CalibrationKey};

use super::{Bin, Calibration, FINISHED_BIN, FileError, TIME_BINS, maker::HYSTERESIS, time_bin};
use crate::{
    error::RequestError,
    gate::Level,
    served::{Served, ServedConcept},
};

/// Calibrations that fit what the node serves.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Calibrations {
    list: Vec<Arc<Calibration>>,
}

impl Calibrations {
    /// Reads every `*.json` of `directory` and keeps those made with this energy model,
    /// preprocessing and one of its concept sets; a directory may be shared by several nodes. A directory that
    /// is not there holds none.
    pub(crate) fn load(directory: &Path, served: &Served) -> Result<Self, FileError> {
        let io = |source| FileError::Io { path: directory.to_owned(), source };
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            entries => entries.map_err(io)?,
        };
        let mut paths = entries
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>, io::Error>>()
            .map_err(io)?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        let mut list: Vec<Arc<Calibration>> = Vec::new();
        for path in paths {
            let calibration = Calibration::load(&path)?;
            if !fits(&calibration, served) {
                tracing::debug!(
                    file = %path.display(),
                    "calibration of another energy model or concept set, not used"
                );
                continue;
            }
            if let Some(other) = list.iter().find(|other| other.setup == calibration.setup) {
                let problem = format!("same setup as calibration {}; remove one", other.id());
                return Err(FileError::Invalid { path, problem });
            }
            list.push(Arc::new(calibration));
        }
        Ok(Self { list })
    }

    /// Those of the set with this hash, for others to see.
    pub(crate) fn infos(&self, concept_set: &str) -> Vec<CalibrationInfo> {
        self.of_set(concept_set).map(|calibration| calibration.info()).collect()
    }

    fn of_set(&self, concept_set: &str) -> impl Iterator<Item = &Arc<Calibration>> {
        self.list.iter().filter(move |c| c.setup.concept_set == concept_set)
    }

    /// The calibration of the concept set with this hash for `key` and `crops`, or with `allow_fallback` the
    /// next best: the nearest step count of the same generator, sampler and crops, else the concepts'
    /// thresholds. Outside of its envelope a calibration is used where the job's policy lets the job leave
    /// it, and as a fallback where that is allowed.
    pub(crate) fn choose(
        &self,
        concept_set: &str,
        key: &CalibrationKey,
        crops: u32,
        allow_fallback: bool,
    ) -> Result<Choice, RequestError> {
        let similar = self.of_set(concept_set).filter(|c| {
            c.setup.generator == key.generator
                && c.setup.sampler == key.sampler
                && c.setup.crops == crops
        });
        let nearest = similar.min_by_key(|c| (c.setup.steps.abs_diff(key.steps), c.setup.steps));
        match nearest {
            Some(found) if found.setup.steps == key.steps => {
                let ways = ways_outside(found, key);
                let may_leave = key.conditions.is_some_and(|run| run.may_leave_envelope);
                let calibration = found.clone();
                if ways.is_empty() || may_leave {
                    Ok(Choice::Exact { calibration, allow_fallback })
                } else if allow_fallback {
                    Ok(Choice::Outside { calibration, ways: ways.join("; ") })
                } else {
                    Err(RequestError::OutsideEnvelope {
                        id: calibration.id().to_owned(),
                        ways: ways.join("; "),
                        command: extending(&calibration, key),
                    })
                }
            }
            Some(found) if allow_fallback => Ok(Choice::NearestSteps(found.clone())),
            None if allow_fallback => Ok(Choice::Thresholds),
            _ => Err(RequestError::NoCalibration {
                setup: describe(key, crops),
                present: self.present(concept_set),
                command: command(key, self.name_of(&key.generator), crops),
            }),
        }
    }

    /// Name of a generator that some calibration knows.
    fn name_of(&self, generator: &str) -> Option<&str> {
        let known = self.list.iter().find(|c| c.setup.generator == generator);
        known.map(|c| c.setup.generator_name.as_str())
    }

    /// The setups at hand for a set, for the error that one is missing.
    fn present(&self, concept_set: &str) -> String {
        let setup = |c: &Arc<Calibration>| {
            let setup = &c.setup;
            format!(
                "{} {}, {} steps, {} crops",
                setup.generator_name, setup.sampler, setup.steps, setup.crops
            )
        };
        let setups: Vec<String> = self.of_set(concept_set).map(setup).collect();
        if setups.is_empty() { "none".to_owned() } else { setups.join("; ") }
    }
}

fn fits(calibration: &Calibration, served: &Served) -> bool {
    calibration.setup.energy_model == served.energy_model
        && calibration.setup.preprocessing_version == served.preprocessing_version
        && served.sets.contains(&calibration.setup.concept_set)
}

fn ways_outside(calibration: &Calibration, key: &CalibrationKey) -> Vec<String> {
    let run = key.conditions.unwrap_or_default();
    envelope::ways_outside(&calibration.envelope.info(), &run)
}

/// The command that makes `calibration` anew so that it is for the run of `key` as well.
fn extending(calibration: &Calibration, key: &CalibrationKey) -> String {
    let flags = calibration.flags(&key.conditions.unwrap_or_default());
    format!("fairlead calibrate --model-name {} {flags}", calibration.setup.generator_name)
}

fn describe(key: &CalibrationKey, crops: u32) -> String {
    let generator = key.generator.chars().take(12).collect::<String>();
    format!("generator {generator}, sampler {}, {} steps, {crops} crops", key.sampler, key.steps)
}

/// The command that makes a missing calibration.
fn command(key: &CalibrationKey, name: Option<&str>, crops: u32) -> String {
    let generator = match name {
        Some(name) => format!("--model-name {name}"),
        None => "--model <folder of the generator>".to_owned(),
    };
    let conditions =
        key.conditions.map(|run| format!(" {}", envelope::flags(&envelope::around(&run))));
    let conditions = conditions.unwrap_or_default();
    format!("fairlead calibrate {generator} --steps {} --crops {crops}{conditions}", key.steps)
}

/// What an evaluation is read against.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Choice {
    /// The calibration of exactly this setup.
    Exact { calibration: Arc<Calibration>, allow_fallback: bool },
    /// That of this setup, for other conditions: in these ways the run lies outside.
    Outside { calibration: Arc<Calibration>, ways: String },
    /// That of another step count.
    NearestSteps(Arc<Calibration>),
    /// None: the concepts' own raw thresholds.
    Thresholds,
}

/// Levels of the asked concepts at several times, and where they come from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Levels {
    /// `[times][concepts]`.
    pub(crate) levels: Vec<Vec<Level>>,
    /// Ids of the calibrations; none for a fallback.
    pub(crate) calibration_ids: Vec<String>,
    /// What was used in place of missing calibrations.
    pub(crate) fallbacks: Vec<String>,
}

impl Levels {
    fn calibrated(levels: Vec<Vec<Level>>, id: String) -> Self {
        Self { levels, calibration_ids: vec![id], fallbacks: Vec::new() }
    }

    fn fallen_back(levels: Vec<Vec<Level>>, to: String) -> Self {
        Self { levels, calibration_ids: Vec::new(), fallbacks: vec![to] }
    }
}

impl Choice {
    /// The levels of `concepts` at each of `times`; 0 is the finished image.
    pub(crate) fn levels(
        &self,
        concepts: &[&ServedConcept],
        times: &[f32],
        key: &CalibrationKey,
        steepness: f32,
    ) -> Result<Levels, RequestError> {
        match self {
            Self::Thresholds => thresholds(concepts, times.len(), key, steepness),
            Self::Outside { calibration, ways } => {
                let (levels, _) = read(calibration, concepts, times);
                let fallback =
                    format!("calibration {} outside its envelope: {ways}", calibration.id());
                Ok(Levels::fallen_back(levels, fallback))
            }
            Self::NearestSteps(calibration) => {
                let (levels, _) = read(calibration, concepts, times);
                let mut fallback = format!(
                    "calibration {} for {} steps in place of {}",
                    calibration.id(),
                    calibration.setup.steps,
                    key.steps
                );
                let ways = ways_outside(calibration, key);
                if !ways.is_empty() {
                    fallback.push_str(&format!(", outside its envelope: {}", ways.join("; ")));
                }
                Ok(Levels::fallen_back(levels, fallback))
            }
            Self::Exact { calibration, allow_fallback } => {
                let (levels, outside) = read(calibration, concepts, times);
                let id = calibration.id().to_owned();
                match outside {
                    None => Ok(Levels::calibrated(levels, id)),
                    Some(time) if *allow_fallback => {
                        let fallback = format!(
                            "calibration {id} at the nearest time it covers in place of {time:.3}"
                        );
                        Ok(Levels::fallen_back(levels, fallback))
                    }
                    Some(time) => Err(RequestError::OutsideCalibration {
                        id,
                        time,
                        window: calibration.window,
                        command: command(
                            key,
                            Some(&calibration.setup.generator_name),
                            calibration.setup.crops,
                        ),
                    }),
                }
            }
        }
    }
}

/// Levels from a calibration, and the first time that falls into none of its bins, for which the
/// nearest bin stands in.
fn read(
    calibration: &Calibration,
    concepts: &[&ServedConcept],
    times: &[f32],
) -> (Vec<Vec<Level>>, Option<f32>) {
    let (start, end) = calibration.window;
    // The finished image, at time 0, is scored whatever the window.
    let mut outside =
        times.iter().copied().find(|&time| time > 0.0 && !(end..=start).contains(&time));
    let mut level = |concept: &ServedConcept, time: f32| {
        let bins = calibration
            .concepts
            .iter()
            .find(|bins| bins.name == concept.info.name)
            .expect("a calibration of this concept set holds every concept");
        let wanted = time_bin(time);
        let Bin { mean, sd, .. } = bins.bins[wanted].unwrap_or_else(|| {
            outside.get_or_insert(time);
            nearest(&bins.bins, wanted)
        });
        Level {
            mean,
            sd,
            gate: calibration.gate,
            hysteresis: calibration.hysteresis,
            check_threshold: bins.check_threshold,
        }
    };
    let levels = times
        .iter()
        .map(|&time| concepts.iter().map(|concept| level(concept, time)).collect())
        .collect();
    (levels, outside)
}

/// The filled time bin closest to `wanted`; the finished image's if there is no other.
fn nearest(bins: &[Option<Bin>], wanted: usize) -> Bin {
    // The finished image comes after time bin 0.
    let position = |bin: usize| if bin == FINISHED_BIN { -1 } else { bin as i64 };
    (0..TIME_BINS)
        .chain([FINISHED_BIN])
        .filter_map(|bin| Some((position(bin).abs_diff(position(wanted)), bins[bin]?)))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, bin)| bin)
        .expect("a calibration fills the bin of the finished image")
}

/// The concepts' raw thresholds as levels with the gate at z = 0 and one softplus width as unit.
fn thresholds(
    concepts: &[&ServedConcept],
    times: usize,
    key: &CalibrationKey,
    steepness: f32,
) -> Result<Levels, RequestError> {
    let level = |concept: &&ServedConcept| match concept.info.fallback_threshold {
        Some(threshold) => Ok(Level {
            mean: threshold,
            sd: 1.0 / steepness,
            gate: 0.0,
            hysteresis: HYSTERESIS,
            check_threshold: threshold,
        }),
        None => Err(RequestError::NoThreshold {
            concept: concept.info.name.clone(),
            generator: key.generator.clone(),
        }),
    };
    let row = concepts.iter().map(level).collect::<Result<Vec<_>, _>>()?;
    let fallback = "fallback_threshold of the concepts file".to_owned();
    Ok(Levels::fallen_back(vec![row; times], fallback))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Before;
    use crate::{calibration::tests::calibration, concepts::Concept};
    use fairlead_proto::v1::{ImageSize, RunConditions};

    fn served() -> Served {
        let info = Concept {
            name: "pill".into(),
            group: "drugs".into(),
            targets: vec!["a pill".into()],
            anchors: vec!["a picture".into()],
            weight: 1.0,
            fallback_threshold: Some(0.2),
        };
        Served {
            energy: "m".into(),
            kind: "test",
            concepts: vec![ServedConcept { info, version: "v".into(), set: 0, since_unix_ms: 0 }],
            energy_model: "m".into(),
            preprocessing_version: 1,
            sets: vec![set()],
        }
    }

    fn set() -> String {
        crate::concepts::set_hash([("pill", "v")])
    }

    fn key(steps: u32) -> CalibrationKey {
        CalibrationKey {
            generator: "abcdef0123".into(),
            sampler: "ddim".into(),
            steps,
            conditions: Some(conditions(32)),
        }
    }

    fn conditions(side: u32) -> RunConditions {
        RunConditions {
            size: Some(ImageSize { width: side, height: side }),
            guidance_scale: 5.0,
            ..Default::default()
        }
    }

    fn store() -> (tempfile::TempDir, Calibrations) {
        let folder = tempfile::tempdir().expect("a folder");
        for (steps, crops) in [(20, 4), (30, 4), (25, 1)] {
            calibration(steps, crops).save(folder.path()).expect("saved");
        }
        let store = Calibrations::load(folder.path(), &served()).expect("loaded");
        (folder, store)
    }

    #[test]
    fn the_exact_setup_is_found() {
        let (_folder, store) = store();
        let choice = store.choose(&set(), &key(20), 4, false).expect("found");
        let Choice::Exact { calibration, .. } = &choice else { panic!("{choice:?}") };
        assert_eq!((calibration.setup.steps, calibration.setup.crops), (20, 4));
        let served = served();
        let concepts = [&served.concepts[0]];
        let levels = choice.levels(&concepts, &[0.9, 0.0], &key(20), 50.0).expect("levels");
        assert_eq!(levels.calibration_ids, [calibration.id()]);
        assert!(levels.fallbacks.is_empty());
        assert_eq!(levels.levels[0][0].gate, 3.5);
        assert_eq!(store.infos(&set()).len(), 3);
        assert!(store.infos("another").is_empty());
    }

    #[test]
    fn outside_its_envelope_a_calibration_needs_the_policys_leave() {
        let (_folder, store) = store();
        let run = |conditions| CalibrationKey { conditions, ..key(20) };
        let large = run(Some(conditions(64)));
        let refused = |key: CalibrationKey| {
            store.choose(&set(), &key, 4, false).expect_err("outside").to_string()
        };
        let text = refused(large.clone());
        let command = "`fairlead calibrate --model-name tiny/sd --steps 20 --crops 4 --window-start 1 \
                       --window-end 0.6 --size 32x32,64x64 --guidance 5`";
        assert!(text.contains("size 64x64, calibrated 32x32") && text.contains(command), "{text}");
        let guided = RunConditions { guidance_scale: 1.0, ..conditions(32) };
        assert!(refused(run(Some(guided))).contains("guidance 1, calibrated 5"));
        let negative = RunConditions { negative_prompt: true, ..conditions(32) };
        assert!(refused(run(Some(negative))).contains("a negative prompt"));
        assert!(refused(run(None)).contains("size 0x0"), "who does not say is outside");

        let lenient = run(Some(RunConditions { may_leave_envelope: true, ..conditions(64) }));
        let choice = store.choose(&set(), &lenient, 4, false).expect("the policy allows it");
        assert!(matches!(choice, Choice::Exact { .. }), "{choice:?}");
        let served = served();
        let choice = store.choose(&set(), &large, 4, true).expect("a fallback");
        let levels = choice.levels(&[&served.concepts[0]], &[0.9], &large, 50.0).expect("levels");
        assert!(levels.calibration_ids.is_empty());
        assert!(levels.fallbacks[0].contains("outside its envelope: size 64x64"), "{levels:?}");
    }

    #[test]
    fn a_missing_one_is_an_error_that_names_the_command() {
        let (_folder, store) = store();
        for (steps, crops) in [(25, 4), (20, 2)] {
            let error =
                store.choose(&set(), &key(steps), crops, false).expect_err("missing").to_string();
            let command =
                format!("fairlead calibrate --model-name tiny/sd --steps {steps} --crops {crops}");
            assert!(error.contains(&command), "{error}");
        }
    }

    #[test]
    fn fallbacks_are_the_nearest_steps_then_thresholds_and_are_named() {
        let (_folder, store) = store();
        let served = served();
        let concepts = [&served.concepts[0]];
        let choice = store.choose(&set(), &key(26), 4, true).expect("found");
        let levels = choice.levels(&concepts, &[0.9], &key(26), 50.0).expect("levels");
        assert!(levels.calibration_ids.is_empty());
        let [fallback] = levels.fallbacks.as_slice() else { panic!("{levels:?}") };
        assert!(fallback.contains("for 30 steps in place of 26"), "{fallback}");

        let choice = store.choose(&set(), &key(26), 8, true).expect("found");
        let levels = choice.levels(&concepts, &[0.9, 0.0], &key(26), 50.0).expect("levels");
        assert!(levels.fallbacks[0].contains("fallback_threshold"));
        let level = levels.levels[1][0];
        assert!(level.is_open(level.z(0.2001), Before::Closed));
        assert!(!level.is_open(level.z(0.1999), Before::Closed));
        assert!((level.tau(Before::Open) - 0.19).abs() < 1e-6);
    }

    #[test]
    fn a_concept_without_threshold_has_no_fallback() {
        let mut served = served();
        served.concepts[0].info.fallback_threshold = None;
        let error = Choice::Thresholds
            .levels(&[&served.concepts[0]], &[0.5], &key(20), 50.0)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("pill") && error.contains("fallback_threshold"), "{error}");
    }

    #[test]
    fn times_outside_the_window_need_a_fallback() {
        let (_folder, store) = store();
        let served = served();
        let concepts = [&served.concepts[0]];
        let levels = |allow| {
            let choice = store.choose(&set(), &key(20), 4, allow).expect("found");
            choice.levels(&concepts, &[0.9, 0.35], &key(20), 50.0)
        };
        let error = levels(false).expect_err("refused").to_string();
        assert!(error.contains("0.35") && error.contains("fairlead calibrate"), "{error}");
        let levels = levels(true).expect("levels");
        assert!(levels.fallbacks[0].contains("0.350") && levels.calibration_ids.is_empty());
    }

    #[test]
    fn calibrations_of_another_set_are_left_aside_and_twins_refused() {
        let (folder, _) = store();
        let mut other = served();
        other.sets = vec!["x".into()];
        let store = Calibrations::load(folder.path(), &other).expect("loaded");
        assert_eq!(store, Calibrations::default());
        let twin = calibration(20, 4).save(folder.path()).expect("saved");
        fs::copy(&twin, folder.path().join("twin.json")).expect("copied");
        let error = Calibrations::load(folder.path(), &served()).expect_err("refused").to_string();
        assert!(error.contains("twin.json") && error.contains("remove one"), "{error}");
    }

    #[test]
    fn no_directory_is_no_calibration() {
        let store = Calibrations::load(Path::new("/nowhere/at/all"), &served()).expect("loaded");
        assert!(store.infos(&set()).is_empty());
        let error = store.choose(&set(), &key(20), 4, false).expect_err("missing").to_string();
        assert!(error.contains("--model <folder of the generator>"), "{error}");
    }
}
