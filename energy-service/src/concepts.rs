//! Concept packs: files that say what a node looks for, in words.
//!
//! ```toml
//! anchors = ["a picture", "nothing"]      # neutral phrases, for concepts without their own
//!
//! [[concept]]
//! name = "kitchen-knife"                  # kebab-case, unique
//! group = "weapons"
//! targets = ["a kitchen knife", "a knife"]
//! anchors = ["a kitchen"]                 # optional, replaces the file's
//! weight = 1.0                            # optional, w_k of the energy
//! fallback_threshold = 0.05               # optional, raw score, used where a calibration is missing
//! ```

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use fairlead_common::{
    bounds::{self, MAX_CONCEPT_NAME, MAX_PHRASE_CHARS, MAX_PHRASES, is_kebab_case},
    parse, text,
};
use fairlead_proto::v1::ConceptDefinition;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Most concepts of a set that comes over the network, and most phrases of all of them: what the text model
/// reads while nobody's images are scored.
const MOST_SENT: usize = 256;
const MOST_PHRASES_IN_ALL: usize = 512;

/// Why a concepts file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConceptsError {
    /// The file cannot be read.
    #[error("cannot read the concepts file `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML of the expected form; the message names the key and the known ones.
    #[error("concepts file `{}`: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Position and problem.
        source: parse::Problem,
    },
    /// A value makes no sense.
    #[error("concepts file `{}`: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Concept, key and what to do.
        problem: String,
    },
}

/// One concept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concept {
    /// Kebab-case name, unique in the file, e.g. "kitchen-knife".
    pub name: String,
    /// Family, e.g. "weapons".
    pub group: String,
    /// Phrases that describe the concept.
    pub targets: Vec<String>,
    /// Neutral phrases the targets are weighed against; after loading never empty.
    #[serde(default)]
    pub anchors: Vec<String>,
    /// Weight `w_k` in the energy, above 0.
    #[serde(default = "default_weight")]
    pub weight: f32,
    /// Raw score above which the gate opens where no calibration is at hand and the policy allows
    /// a fallback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback_threshold: Option<f32>,
}

fn default_weight() -> f32 {
    1.0
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConceptsFile {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    anchors: Vec<String>,
    #[serde(default)]
    concept: Vec<Concept>,
}

impl Concept {
    /// Hash of everything that defines the score: kind and content of the energy model,
    /// preprocessing, targets and anchors. Weight, group and fallback do not enter.
    pub fn version(&self, kind: &str, model_hash: &str, preprocessing_version: u32) -> String {
        let mut hash = Sha256::new();
        let mut field = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        field("fairlead concept");
        field(kind);
        field(model_hash);
        field(&preprocessing_version.to_string());
        for phrases in [&self.targets, &self.anchors] {
            field(&phrases.len().to_string());
            phrases.iter().for_each(|phrase| field(phrase));
        }
        hex::encode(hash.finalize())
    }

    fn check(&self) -> Result<(), String> {
        let Self { name, group, targets, anchors, weight, fallback_threshold } = self;
        if !is_kebab_case(name) {
            return Err(format!(
                "concept `{name}`: `name` must be kebab-case (a-z, 0-9, single hyphens, at most \
                 {MAX_CONCEPT_NAME} characters), e.g. \"kitchen-knife\""
            ));
        }
        if !is_kebab_case(group) {
            return Err(format!("concept `{name}`: `group` is `{group}`, must be kebab-case"));
        }
        if targets.is_empty() {
            return Err(format!("concept `{name}`: `targets` is empty; give at least one phrase"));
        }
        if anchors.is_empty() {
            return Err(format!(
                "concept `{name}`: no anchors; give `anchors` here or at the top of the file"
            ));
        }
        if let Some(phrase) = targets.iter().chain(anchors).find(|phrase| phrase.trim().is_empty())
        {
            return Err(format!("concept `{name}`: the phrase {phrase:?} is empty; remove it"));
        }
        bounds::count("targets", targets.len(), MAX_PHRASES)
            .and_then(|()| bounds::count("anchors", anchors.len(), MAX_PHRASES))
            .and_then(|()| {
                let mut phrases = targets.iter().chain(anchors);
                phrases.try_for_each(|phrase| bounds::line(phrase, MAX_PHRASE_CHARS))
            })
            .map_err(|problem| format!("concept `{name}`: {problem}"))?;
        if !(weight.is_finite() && *weight > 0.0) {
            return Err(format!("concept `{name}`: `weight` is {weight}, must be finite, above 0"));
        }
        match fallback_threshold {
            Some(threshold) if !threshold.is_finite() => Err(format!(
                "concept `{name}`: `fallback_threshold` is {threshold}, must be finite"
            )),
            _ => Ok(()),
        }
    }
}

impl From<ConceptDefinition> for Concept {
    fn from(definition: ConceptDefinition) -> Self {
        let ConceptDefinition { name, group, targets, anchors, weight, fallback_threshold } =
            definition;
        let weight = weight.unwrap_or_else(default_weight);
        Self { name, group, targets, anchors, weight, fallback_threshold }
    }
}

impl From<Concept> for ConceptDefinition {
    fn from(concept: Concept) -> Self {
        let Concept { name, group, targets, anchors, weight, fallback_threshold } = concept;
        Self { name, group, targets, anchors, weight: Some(weight), fallback_threshold }
    }
}

/// The concepts of one file, in its order; at least one.
#[derive(Debug, Clone, PartialEq)]
pub struct ConceptSet {
    concepts: Vec<Concept>,
}

impl ConceptSet {
    /// Reads packs: each path is a file, or a folder of which every `.toml` file is one.
    pub fn load(paths: &[PathBuf]) -> Result<Self, ConceptsError> {
        let mut set = Self { concepts: Vec::new() };
        for path in packs(paths)? {
            let text = text::read(&path)
                .map_err(|source| ConceptsError::Read { path: path.clone(), source })?;
            let pack = Self::parse(&path, &text)?;
            let known = |new: &&Concept| set.concepts.iter().any(|old| old.name == new.name);
            if let Some(twice) = pack.concepts.iter().find(known) {
                let problem = format!("concept `{}` is in another pack, too", twice.name);
                return Err(ConceptsError::Invalid { path, problem });
            }
            set.concepts.extend(pack.concepts);
        }
        Ok(set)
    }

    /// Checks `text`; `path` is what errors call it.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConceptsError> {
        let invalid = |problem| ConceptsError::Invalid { path: path.to_owned(), problem };
        let file: ConceptsFile = parse::toml(text)
            .map_err(|source| ConceptsError::Parse { path: path.to_owned(), source })?;
        if file.concept.is_empty() {
            return Err(invalid("no concept; add a [[concept]] table".to_owned()));
        }
        let mut concepts = file.concept;
        for concept in concepts.iter_mut().filter(|concept| concept.anchors.is_empty()) {
            concept.anchors.clone_from(&file.anchors);
        }
        Self::checked(concepts).map_err(invalid)
    }

    /// A set that came over the network; an error says what is wrong with it.
    pub(crate) fn received(definitions: Vec<ConceptDefinition>) -> Result<Self, String> {
        if !(1..=MOST_SENT).contains(&definitions.len()) {
            let concepts = definitions.len();
            return Err(format!("has {concepts} concepts, must have 1 to {MOST_SENT}"));
        }
        let long = |d: &&ConceptDefinition| d.targets.len().max(d.anchors.len()) > MAX_PHRASES;
        if let Some(ConceptDefinition { name, .. }) = definitions.iter().find(long) {
            return Err(format!("concept `{name}` has more than {MAX_PHRASES} targets or anchors"));
        }
        let phrases: usize = definitions.iter().map(|d| d.targets.len() + d.anchors.len()).sum();
        if phrases > MOST_PHRASES_IN_ALL {
            return Err(format!(
                "has {phrases} phrases, must have at most {MOST_PHRASES_IN_ALL}; add it in parts"
            ));
        }
        Self::checked(definitions.into_iter().map(Concept::from).collect())
    }

    /// The set as others are sent it.
    pub fn definitions(&self) -> Vec<ConceptDefinition> {
        self.concepts.iter().cloned().map(ConceptDefinition::from).collect()
    }

    /// The set as a pack that [`ConceptSet::parse`] reads.
    pub(crate) fn to_toml(&self) -> String {
        let file = ConceptsFile { anchors: Vec::new(), concept: self.concepts.clone() };
        toml::to_string(&file).expect("concepts are plain data")
    }

    fn checked(concepts: Vec<Concept>) -> Result<Self, String> {
        let mut names = BTreeSet::new();
        for concept in &concepts {
            concept.check()?;
            if !names.insert(&concept.name) {
                let name = &concept.name;
                return Err(format!("concept `{name}` is there twice; names must be unique"));
            }
        }
        Ok(Self { concepts })
    }

    /// The concepts in file order.
    pub fn concepts(&self) -> &[Concept] {
        &self.concepts
    }
}

/// The files that `paths` stand for; those of a folder in the order of their names.
fn packs(paths: &[PathBuf]) -> Result<Vec<PathBuf>, ConceptsError> {
    let mut packs = Vec::new();
    for path in paths {
        if !path.is_dir() {
            packs.push(path.clone());
            continue;
        }
        let files =
            files_of(path).map_err(|source| ConceptsError::Read { path: path.clone(), source })?;
        if files.is_empty() {
            let problem = "a folder without a .toml file; name the folder of the packs".to_owned();
            return Err(ConceptsError::Invalid { path: path.clone(), problem });
        }
        packs.extend(files);
    }
    Ok(packs)
}

/// The packs in a folder, in the order of their names.
pub(crate) fn files_of(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    Ok(files)
}

/// Hash of a served set: names and versions, whatever their order. A calibration's gate covers a
/// whole set and is void for another one.
pub(crate) fn set_hash<'a>(concepts: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut pairs = concepts.into_iter().collect::<Vec<_>>();
    pairs.sort_unstable();
    let mut hash = Sha256::new();
    for (name, version) in pairs {
        for text in [name, version] {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
    }
    hex::encode(hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled_text};

    const GOOD: &str = r#"
        anchors = ["a picture", "nothing"]
        [[concept]]
        name = "kitchen-knife"
        group = "weapons"
        targets = ["a kitchen knife"]
        fallback_threshold = 0.05
        [[concept]]
        name = "pill"
        group = "drugs"
        targets = ["a pill", "a capsule"]
        anchors = ["a button"]
        weight = 0.5
    "#;

    fn parse(text: &str) -> Result<ConceptSet, String> {
        ConceptSet::parse(Path::new("c.toml"), text).map_err(|error| error.to_string())
    }

    fn refusal(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from));
        let error = parse(&GOOD.replacen(from, to, 1)).expect_err("refused");
        assert!(error.contains("c.toml"), "{error}");
        error
    }

    #[test]
    fn defaults_come_from_the_file() {
        let set = parse(GOOD).expect("it parses");
        let [knife, pill] = set.concepts() else { panic!("two concepts") };
        assert_eq!(knife.anchors, ["a picture", "nothing"]);
        assert_eq!((knife.weight, knife.fallback_threshold), (1.0, Some(0.05)));
        assert_eq!(pill.anchors, ["a button"]);
        assert_eq!((pill.weight, pill.fallback_threshold), (0.5, None));
    }

    #[test]
    fn a_typo_names_file_key_and_known_keys() {
        let error = refusal("targets =", "tragets =");
        for part in ["c.toml", "line 6", ".tragets` is not known", "targets", "fallback_threshold"]
        {
            assert!(error.contains(part), "{part} in {error}");
        }
        assert!(
            refusal("anchors = [\"a picture", "anchor = [\"a picture")
                .contains("`anchor` is not known")
        );
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (from, to, parts) in [
            ("\"pill\"", "\"kitchen-knife\"", ["kitchen-knife", "twice"]),
            ("\"pill\"", "\"Pill\"", ["Pill", "kebab-case"]),
            ("\"pill\"", "\"a--pill\"", ["a--pill", "kebab-case"]),
            ("\"drugs\"", "\"\"", ["pill", "group"]),
            ("[\"a kitchen knife\"]", "[]", ["kitchen-knife", "targets"]),
            ("\"a capsule\"", "\"  \"", ["pill", "empty"]),
            ("[\"a picture\", \"nothing\"]", "[]", ["kitchen-knife", "anchors"]),
            ("0.5", "nan", ["pill", "weight"]),
            ("0.5", "0.0", ["pill", "weight"]),
            ("0.5", "inf", ["pill", "weight"]),
            ("0.05", "nan", ["kitchen-knife", "fallback_threshold"]),
            ("\"a capsule\"", "\"a \\u001b[2J\"", ["pill", "control characters"]),
            ("\"a capsule\"", &format!("\"{}\"", "x".repeat(600)), ["pill", "512 characters"]),
            ("\"a capsule\"", &"\"x\",".repeat(64), ["pill", "65 targets"]),
        ] {
            let error = refusal(from, to);
            assert!(parts.iter().all(|part| error.contains(part)), "{to}: {error}");
        }
        assert!(parse("anchors = [\"a picture\"]").expect_err("empty").contains("no concept"));
    }

    #[test]
    fn packs_are_files_and_folders_and_share_no_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).expect("written");
            path
        };
        let load = |paths: &[&Path]| {
            let paths: Vec<PathBuf> = paths.iter().map(|path| path.to_path_buf()).collect();
            ConceptSet::load(&paths).map_err(|error| error.to_string())
        };
        assert!(load(&[folder.path()]).expect_err("empty").contains("without a .toml file"));
        let good = write("b.toml", GOOD);
        write("a.toml", &GOOD.replace("kitchen-knife", "axe").replace("pill", "syringe"));
        write("notes.txt", "no pack");
        let names = |set: &ConceptSet| {
            set.concepts().iter().map(|c| c.name.clone()).collect::<Vec<_>>().join(" ")
        };
        let all = load(&[folder.path()]).expect("two packs");
        assert_eq!(names(&all), "axe syringe kitchen-knife pill");
        assert_eq!(names(&load(&[&good]).expect("one pack")), "kitchen-knife pill");
        let twice = load(&[folder.path(), &good]).expect_err("both again");
        assert!(twice.contains("`kitchen-knife` is in another pack"), "{twice}");
        let missing = load(&[Path::new("/nowhere/c.toml")]).expect_err("missing");
        assert!(missing.contains("/nowhere/c.toml"), "{missing}");
    }

    #[test]
    fn the_version_covers_what_defines_the_score_and_nothing_else() {
        let set = parse(GOOD).expect("it parses");
        let knife = &set.concepts()[0];
        let version = knife.version("contrastive", "m", 1);
        assert_eq!(version.len(), 64);
        let changed = |change: fn(&mut Concept)| {
            let mut other = knife.clone();
            change(&mut other);
            other.version("contrastive", "m", 1)
        };
        assert_eq!(changed(|c| c.weight = 2.0), version);
        assert_eq!(changed(|c| c.fallback_threshold = None), version);
        assert_ne!(changed(|c| c.targets.push("a knife".into())), version);
        assert_ne!(changed(|c| c.anchors.push("a knife".into())), version);
        let moved = changed(|c| {
            let phrase = c.anchors.remove(0);
            c.targets.push(phrase);
        });
        assert_ne!(moved, version);
        assert_ne!(knife.version("contrastive", "n", 1), version);
        assert_ne!(knife.version("contrastive", "m", 2), version);
        assert_ne!(knife.version("classifier", "m", 1), version);
    }

    #[test]
    fn a_set_travels_and_is_kept_unchanged() {
        let set = parse(GOOD).expect("it parses");
        assert_eq!(ConceptSet::received(set.definitions()).expect("it is sound"), set);
        assert_eq!(parse(&set.to_toml()).expect("it parses"), set);
    }

    #[test]
    fn a_set_from_the_network_is_checked_and_bounded() {
        let good = parse(GOOD).expect("it parses").definitions();
        let refused = |change: fn(&mut Vec<ConceptDefinition>)| {
            let mut definitions = good.clone();
            change(&mut definitions);
            ConceptSet::received(definitions).expect_err("refused")
        };
        assert!(refused(Vec::clear).contains("0 concepts"));
        assert!(refused(|d| *d = vec![d[0].clone(); 257]).contains("257 concepts"));
        assert!(refused(|d| d[0].name = "A b".into()).contains("kebab-case"));
        assert!(refused(|d| d[1].name = d[0].name.clone()).contains("twice"));
        assert!(refused(|d| d[1].anchors = vec!["x".into(); 65]).contains("`pill`"));
        let many = refused(|d| {
            d[0].targets = vec!["x".into(); 64];
            *d = vec![d[0].clone(); 8];
        });
        assert!(many.contains("528 phrases"), "{many}");
        assert!(refused(|d| d[1].anchors.clear()).contains("anchors"));
        assert!(refused(|d| d[0].weight = Some(f32::NAN)).contains("weight"));
    }

    #[test]
    fn the_set_hash_ignores_order() {
        let pairs = [("a", "1"), ("b", "2")];
        assert_eq!(set_hash(pairs), set_hash([pairs[1], pairs[0]]));
        assert_ne!(set_hash(pairs), set_hash([("a", "1"), ("b", "3")]));
        assert_ne!(set_hash(pairs), set_hash([("a", "1")]));
    }

    #[test]
    fn spoiled_packs_are_sound_or_refused_by_name() {
        fuzz(spoiled_text(GOOD), |text| match bounded(text.len(), || parse(&text)) {
            Ok(set) => set.concepts().iter().for_each(|concept| {
                assert_eq!(concept.check(), Ok(()));
                assert_eq!(concept.version("contrastive", "m", 1).len(), 64);
            }),
            Err(error) => assert!(error.contains("c.toml"), "{error}"),
        });
    }
}
