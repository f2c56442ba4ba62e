//! Calibrations: what benign images of one generator score, and the gate that leaves at least
//! `1 - alpha` of them alone.
//!
//! A calibration is made by [`maker::make`], kept as a JSON file named by [`Calibration::file_name`]
//! and valid for exactly one [`Setup`], under the conditions of its [`Envelope`]. Its `id` is the SHA-256 of its content, so that a safety
//! record can point at it and an edited file is noticed.

pub mod maker;
pub(crate) mod store;

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use fairlead_common::{envelope, limits::GUIDANCE, parse, text};
use fairlead_proto::v1::{
    CalibrationEnvelope, CalibrationInfo, CalibrationKey, CheckThreshold, ImageSize, RunConditions,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::concepts;

/// Bins of training time, each a tenth of `t / T` in (0, 1].
pub const TIME_BINS: usize = 10;

/// Index of the eleventh bin, the finished image's.
pub const FINISHED_BIN: usize = TIME_BINS;

/// All bins.
pub const BINS: usize = TIME_BINS + 1;

/// Version of the file format.
const FORMAT: u32 = 3;

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The bin of `time` = t / T in [0, 1]; 0 is the finished image.
pub fn time_bin(time: f32) -> usize {
    if time <= 0.0 { FINISHED_BIN } else { ((time * TIME_BINS as f32) as usize).min(TIME_BINS - 1) }
}

/// What a calibration is valid for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// Content hash of the generator.
    pub generator: String,
    /// Its name, for people.
    pub generator_name: String,
    /// Sampler, e.g. "ddim".
    pub sampler: String,
    /// Sampling steps.
    pub steps: u32,
    /// Content hash of the energy model.
    pub energy_model: String,
    /// Hash of names and versions of the served concepts.
    pub concept_set: String,
    /// Version of resize, crops and normalisation.
    pub preprocessing_version: u32,
    /// Crops per image, the whole image included.
    pub crops: u32,
}

/// The conditions that a calibration was made under: beside generator, sampler and steps, what of a request
/// moves the scores of benign images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// Widths and heights in pixels.
    pub sizes: Vec<(u32, u32)>,
    /// Least and greatest guidance scale.
    pub guidance: (f32, f32),
    /// Negative prompts were used, too.
    pub negative_prompts: bool,
}

impl Envelope {
    /// As other services see it.
    pub fn info(&self) -> CalibrationEnvelope {
        let size = |&(width, height): &(u32, u32)| ImageSize { width, height };
        CalibrationEnvelope {
            sizes: self.sizes.iter().map(size).collect(),
            guidance_least: self.guidance.0,
            guidance_greatest: self.guidance.1,
            negative_prompts: self.negative_prompts,
        }
    }

    fn check(&self) -> Result<(), String> {
        let Self { sizes, guidance: (least, greatest), negative_prompts: _ } = self;
        if sizes.is_empty() || sizes.iter().any(|&(width, height)| width == 0 || height == 0) {
            return Err(format!("its envelope has the sizes {sizes:?}"));
        }
        if !(GUIDANCE.contains(least) && GUIDANCE.contains(greatest) && least <= greatest) {
            return Err(format!("its envelope has guidance from {least} to {greatest}"));
        }
        Ok(())
    }
}

/// Benign scores in one bin.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bin {
    /// Mean raw score.
    pub mean: f32,
    /// Standard deviation, above 0.
    pub sd: f32,
    /// Scores it was computed from.
    pub count: u32,
}

/// One concept's benign scores per bin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConceptBins {
    /// Name of the concept.
    pub name: String,
    /// Its version.
    pub version: String,
    /// [`BINS`] entries; none where no step of the window fell.
    pub bins: Vec<Option<Bin>>,
    /// How well the concept is told apart in each of [`BINS`] bins, 1 being perfect and 0.5 chance:
    /// images of prompts that ask for it against benign ones. None where that was not measured.
    pub auroc: Vec<Option<f32>>,
    /// Raw score above which a finished image is withheld, steered or not.
    pub check_threshold: f32,
}

/// A calibration, see the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    format: u32,
    id: String,
    /// What it is valid for.
    pub setup: Setup,
    /// The conditions it was made under: it says nothing about others.
    pub envelope: Envelope,
    /// Largest and smallest t / T of the steps it saw.
    pub window: (f32, f32),
    /// Bound on the share of benign images touched.
    pub alpha: f32,
    /// Benign images it was made from, both halves.
    pub images: u32,
    /// Images of labelled prompts behind the AUROCs.
    pub labelled: u32,
    /// SHA-256 of the prompts and seeds of all of them.
    pub prompts: String,
    /// The gate `q` on `z`.
    pub gate: f32,
    /// The hysteresis `h` on `z`.
    pub hysteresis: f32,
    /// Bound on the share of benign images that the final check withholds.
    pub check_alpha: f32,
    /// One entry per served concept.
    pub concepts: Vec<ConceptBins>,
}

/// Why a calibration file was refused or not written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Reading or writing failed.
    #[error("calibration file `{}`: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not JSON of the expected form.
    #[error("calibration file `{}`: {source}; make it again with `fairlead calibrate`", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Position and problem.
        source: parse::Problem,
    },
    /// Content that contradicts itself.
    #[error("calibration file `{}`: {problem}; make it again with `fairlead calibrate`", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

impl Calibration {
    /// SHA-256 of the content, lower-case hex.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// File name that belongs to the setup: a new calibration of the same setup replaces the old.
    pub fn file_name(&self) -> String {
        let Setup { generator_name, sampler, steps, concept_set, crops, generator, .. } =
            &self.setup;
        let name: String = generator_name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' })
            .collect();
        let short = |hash: &str| hash.chars().take(8).collect::<String>();
        format!(
            "{}-{}-{sampler}-{steps}-steps-{crops}-crops-{}.json",
            name.trim_start_matches('.'),
            short(generator),
            short(concept_set)
        )
    }

    /// Writes the file into `directory` (made if missing), whole or not at all; returns its path.
    pub fn save(&self, directory: &Path) -> Result<PathBuf, FileError> {
        let path = directory.join(self.file_name());
        let io = |source| FileError::Io { path: path.clone(), source };
        fs::create_dir_all(directory).map_err(io)?;
        let part = path.with_extension("json.part");
        let mut file = fs::File::create(&part).map_err(io)?;
        let mut text = serde_json::to_vec_pretty(self).expect("a calibration is plain data");
        text.push(b'\n');
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(io)?;
        fs::rename(&part, &path).map_err(io)?;
        Ok(path)
    }

    /// Reads and checks one file.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        let io = |source| FileError::Io { path: path.to_owned(), source };
        let invalid = |problem: String| FileError::Invalid { path: path.to_owned(), problem };
        let bytes = fs::metadata(path).map_err(io)?.len();
        if bytes > MAX_FILE_BYTES {
            return Err(invalid(format!("{bytes} bytes, at most {MAX_FILE_BYTES} are read")));
        }
        let text = text::read(path).map_err(io)?;
        if let Some(problem) = old(text.as_bytes()) {
            return Err(invalid(problem));
        }
        let calibration: Self = parse::json(&text)
            .map_err(|source| FileError::Parse { path: path.to_owned(), source })?;
        calibration.check().map_err(invalid)?;
        Ok(calibration)
    }

    /// The flags of `fairlead calibrate` that make it anew, of these steps and crops; with `conditions` also
    /// outside of what it holds.
    pub(crate) fn flags(&self, conditions: &RunConditions) -> String {
        let ((start, end), Setup { steps, crops, .. }) = (self.window, &self.setup);
        let envelope = envelope::flags(&envelope::extended(&self.envelope.info(), conditions));
        format!(
            "--steps {steps} --crops {crops} --window-start {start} --window-end {end} {envelope}"
        )
    }

    /// Fills in the content hash.
    fn seal(mut self) -> Self {
        self.id = self.content_hash();
        self
    }

    fn content_hash(&self) -> String {
        let unsealed = Self { id: String::new(), ..self.clone() };
        let content = serde_json::to_vec(&unsealed).expect("a calibration is plain data");
        hex::encode(Sha256::digest(content))
    }

    fn check(&self) -> Result<(), String> {
        self.envelope.check()?;
        if self.id != self.content_hash() {
            return Err("its id does not belong to its content, it was edited".to_owned());
        }
        let pairs = self.concepts.iter().map(|c| (c.name.as_str(), c.version.as_str()));
        if self.setup.concept_set != concepts::set_hash(pairs) {
            return Err("its concept set is not the hash of its concepts".to_owned());
        }
        if !(self.gate.is_finite() && self.hysteresis.is_finite() && self.hysteresis >= 0.0) {
            return Err(format!("gate {} or hysteresis {}", self.gate, self.hysteresis));
        }
        if !(self.check_alpha > 0.0 && self.check_alpha < 1.0) {
            return Err(format!("check_alpha {}", self.check_alpha));
        }
        for concept in &self.concepts {
            let sound = |bin: &Bin| bin.mean.is_finite() && bin.sd.is_finite() && bin.sd > 0.0;
            if !concept.check_threshold.is_finite() {
                let (name, threshold) = (&concept.name, concept.check_threshold);
                return Err(format!("concept `{name}` has a check_threshold of {threshold}"));
            }
            let measured = |auroc: &f32| (0.0..=1.0).contains(auroc);
            if !concept.auroc.iter().flatten().all(measured) {
                return Err(format!("concept `{}` has an AUROC outside 0 to 1", concept.name));
            }
            let complete = concept.bins.len() == BINS && concept.auroc.len() == BINS;
            if !complete || !concept.bins.iter().flatten().all(sound) {
                return Err(format!("concept `{}` lacks {BINS} sound bins", concept.name));
            }
        }
        Ok(())
    }

    /// What other services see of it.
    pub(crate) fn info(&self) -> CalibrationInfo {
        CalibrationInfo {
            key: Some(CalibrationKey {
                generator: self.setup.generator.clone(),
                sampler: self.setup.sampler.clone(),
                steps: self.setup.steps,
                conditions: None,
            }),
            generator_name: self.setup.generator_name.clone(),
            id: self.id.clone(),
            alpha: self.alpha,
            gate: self.gate,
            images: self.images,
            crops: self.setup.crops,
            window_start: self.window.0,
            window_end: self.window.1,
            concepts: self.concepts.iter().map(|concept| concept.name.clone()).collect(),
            check_thresholds: self
                .concepts
                .iter()
                .map(|concept| CheckThreshold {
                    concept: concept.name.clone(),
                    score: concept.check_threshold,
                })
                .collect(),
            envelope: Some(self.envelope.info()),
        }
    }
}

/// What is wrong with a file of another format, and the command that makes it anew; `None` for one of this
/// format, and for what is no calibration at all.
fn old(text: &[u8]) -> Option<String> {
    /// What every format has had.
    #[derive(Deserialize)]
    struct Any {
        format: u32,
        setup: Option<Made>,
    }
    #[derive(Deserialize)]
    struct Made {
        generator_name: String,
        steps: u32,
        crops: u32,
    }
    let Any { format, setup } = serde_json::from_slice(text).ok()?;
    if format == FORMAT {
        return None;
    }
    let command = setup.map(|Made { generator_name, steps, crops }| {
        let name = generator_name.escape_debug();
        format!(
            ": `fairlead calibrate --model {name} --steps {steps} --crops {crops}`, with --size, --guidance \
             and --negative for all that jobs may ask for"
        )
    });
    Some(format!(
        "format {format}, this program reads {FORMAT}, which names the sizes, guidance and use of negative \
         prompts that it was made with{}",
        command.unwrap_or_default()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled};

    pub(super) fn calibration(steps: u32, crops: u32) -> Calibration {
        let bin = Some(Bin { mean: 0.1, sd: 0.02, count: 50 });
        let concepts = vec![ConceptBins {
            name: "pill".into(),
            version: "v".into(),
            bins: (0..BINS).map(|b| bin.filter(|_| b >= 6)).collect(),
            auroc: vec![None; BINS],
            check_threshold: 0.25,
        }];
        Calibration {
            format: FORMAT,
            id: String::new(),
            setup: Setup {
                generator: "abcdef0123".into(),
                generator_name: "tiny/sd".into(),
                sampler: "ddim".into(),
                steps,
                energy_model: "m".into(),
                concept_set: concepts::set_hash([("pill", "v")]),
                preprocessing_version: 1,
                crops,
            },
            envelope: Envelope {
                sizes: vec![(32, 32)],
                guidance: (5.0, 5.0),
                negative_prompts: false,
            },
            window: (1.0, 0.6),
            alpha: 0.01,
            images: 1000,
            labelled: 0,
            prompts: String::new(),
            gate: 3.5,
            hysteresis: 0.5,
            check_alpha: 0.005,
            concepts,
        }
        .seal()
    }

    #[test]
    fn bins_cover_the_unit_interval() {
        assert_eq!(time_bin(0.0), FINISHED_BIN);
        assert_eq!(time_bin(1e-3), 0);
        assert_eq!(time_bin(0.6), 6);
        assert_eq!(time_bin(0.999), 9);
        assert_eq!(time_bin(1.0), 9);
    }

    #[test]
    fn a_file_round_trips_and_replaces_its_predecessor() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = calibration(25, 4);
        let path = first.save(folder.path()).expect("saved");
        assert_eq!(Calibration::load(&path).expect("loaded"), first);
        let second = Calibration { gate: 4.0, ..first.clone() }.seal();
        assert_ne!(second.id(), first.id());
        assert_eq!(second.save(folder.path()).expect("saved"), path);
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 1);
    }

    #[test]
    fn an_edited_or_broken_file_is_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = calibration(25, 4).save(folder.path()).expect("saved");
        let text = fs::read_to_string(&path).expect("read");
        for (from, to, part) in [
            ("\"gate\": 3.5", "\"gate\": 9.5", "edited"),
            ("\"format\": 3", "\"format\": 2", "format 2"),
            (
                "\"format\": 3",
                "\"format\": 2",
                "`fairlead calibrate --model tiny/sd --steps 25 --crops 4`",
            ),
            ("\"negative_prompts\": false", "\"negative_prompts\": true", "edited"),
            ("\"envelope\"", "\"envelop\"", "envelop"),
            ("5.0,\n      5.0", "5.0,\n      1e99", "guidance from 5 to inf"),
            ("\"gate\"", "\"gatte\"", "gatte"),
            // Infinity is written as null: the hash of the content is that of none.
            ("\"auroc\": [\n        null", "\"auroc\": [\n        1e99", "AUROC"),
            ("}", "", "line"),
        ] {
            fs::write(&path, text.replacen(from, to, 1)).expect("written");
            let error = Calibration::load(&path).expect_err("refused").to_string();
            assert!(error.contains(part) && error.contains("tiny-sd"), "{from}: {error}");
        }
    }

    #[test]
    fn spoiled_files_are_the_same_calibration_or_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let valid = calibration(25, 4);
        let path = valid.save(folder.path()).expect("saved");
        let text = fs::read(&path).expect("read");
        fuzz(spoiled(text), |bytes| {
            fs::write(&path, &*bytes).expect("written");
            match bounded(bytes.len(), || Calibration::load(&path)) {
                Ok(loaded) => assert_eq!(loaded, valid),
                Err(error) => assert!(error.to_string().contains("tiny-sd"), "{error}"),
            }
        });
    }
}
