//! Prompts about the objects of Emojiland, drawn from a named random stream.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context, Result, bail, ensure};
use fairlead_common::{parse, text};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// What Emojiland is made of: `assets/emojiland-objects.json`.
#[derive(Deserialize)]
pub(crate) struct Objects {
    benign: Vec<String>,
    targets: Vec<Target>,
    backgrounds: Vec<String>,
}

/// An object to steer away from.
#[derive(Deserialize)]
struct Target {
    name: String,
    /// Ways to name it, with their articles.
    phrases: Vec<String>,
}

impl Target {
    /// Its phrases that do not say its name.
    fn paraphrases(&self) -> Vec<&String> {
        self.phrases.iter().filter(|phrase| !phrase.contains(&self.name)).collect()
    }
}

/// A thing as a caption names it.
struct Noun {
    bare: String,
    with_article: String,
}

impl Noun {
    fn of(name: &str) -> Self {
        let article = if name.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        Self { bare: name.to_owned(), with_article: format!("{article} {name}") }
    }

    fn of_phrase(phrase: &str) -> Self {
        let bare = phrase.strip_prefix("a ").or(phrase.strip_prefix("an ")).unwrap_or(phrase);
        Self { bare: bare.to_owned(), with_article: phrase.to_owned() }
    }
}

/// The first of `phrases` that `text` has in it, with or without its article, as whole words.
pub(crate) fn named_in<'a>(
    text: &str,
    mut phrases: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    let words = |text: &str| -> Vec<String> {
        let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        words.map(str::to_lowercase).collect()
    };
    let text = words(text);
    phrases.find(|phrase| {
        let phrase = words(&Noun::of_phrase(phrase).bare);
        !phrase.is_empty() && text.windows(phrase.len()).any(|part| part == phrase)
    })
}

/// One prompt and what it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObjectPrompt {
    pub(crate) text: String,
    /// The forbidden object asked for.
    pub(crate) target: Option<String>,
    /// The permitted object asked for.
    pub(crate) benign: Option<String>,
    /// Seed of the image.
    pub(crate) seed: u64,
}

/// A kind of prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One forbidden object.
    Direct,
    /// One forbidden object by another name.
    Paraphrased,
    /// A forbidden and a permitted one.
    Compositional,
    /// One or two permitted ones.
    Benign,
}

impl Kind {
    /// All of them, in the order of reports.
    pub(crate) const ALL: [Self; 4] =
        [Self::Direct, Self::Paraphrased, Self::Compositional, Self::Benign];

    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Paraphrased => "paraphrased",
            Self::Compositional => "compositional",
            Self::Benign => "benign",
        }
    }

    /// What tells its random streams from those of other kinds. Changing one changes every prompt of
    /// the kind.
    fn stream(self) -> &'static str {
        match self {
            Self::Direct => "Single",
            Self::Paraphrased => "Paraphrased",
            Self::Compositional => "Two",
            Self::Benign => "Benign",
        }
    }
}

impl Objects {
    /// Reads the description.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = text::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let objects: Self = parse::json(&text).with_context(|| path.display().to_string())?;
        ensure!(
            objects.benign.len() > 1 && !objects.targets.is_empty(),
            "{}: at least two benign objects and one target are needed",
            path.display()
        );
        if let Some(bare) = objects.targets.iter().find(|target| target.paraphrases().is_empty()) {
            bail!("{}: `{}` has no phrase without its name", path.display(), bare.name);
        }
        ensure!(!objects.backgrounds.is_empty(), "{}: `backgrounds` is empty", path.display());
        Ok(objects)
    }

    /// How many objects there are to steer away from.
    pub(crate) fn targets(&self) -> usize {
        self.targets.len()
    }

    /// Takes the permitted objects out that one of `phrases` names, with or without an article, and returns
    /// them.
    pub(crate) fn without<'a>(
        &mut self,
        phrases: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<String>> {
        let named: BTreeSet<String> =
            phrases.map(|phrase| Noun::of_phrase(phrase).bare.replace('-', " ")).collect();
        let is_named = |object: &mut String| named.contains(&object.replace('-', " "));
        let taken: Vec<String> = self.benign.extract_if(.., is_named).collect();
        ensure!(
            self.benign.len() > 1,
            "the concepts are about {}: fewer than two embedded benign objects are left; give \
             benign prompts with --prompts",
            taken.join(", ")
        );
        Ok(taken)
    }

    /// Their names.
    pub(crate) fn target_names(&self) -> Vec<String> {
        self.targets.iter().map(|target| target.name.clone()).collect()
    }

    /// `count` prompts of `kind`. Streams of different names share neither prompts' draws nor
    /// image seeds; the same name gives the same prompts.
    pub(crate) fn prompts(&self, kind: Kind, count: usize, stream: &str) -> Vec<ObjectPrompt> {
        let digest = Sha256::digest(format!("{stream}/{}", kind.stream()).as_bytes());
        let mut rng = ChaCha8Rng::from_seed(digest.into());
        (0..count).map(|i| self.prompt(kind, i, &mut rng)).collect()
    }

    fn prompt(&self, kind: Kind, i: usize, rng: &mut ChaCha8Rng) -> ObjectPrompt {
        // Targets take turns, so that every one is asked for equally often.
        let chosen = &self.targets[i % self.targets.len()];
        let target = chosen.name.clone();
        let pick = |list: &[String], rng: &mut ChaCha8Rng| {
            list.choose(rng).expect("the lists were checked on reading").clone()
        };
        let benign = pick(&self.benign, rng);
        let (target, names) = match kind {
            Kind::Direct => (Some(target.clone()), vec![Noun::of(&target)]),
            Kind::Paraphrased => {
                let phrases = chosen.paraphrases();
                let phrase = phrases.choose(rng).expect("the phrases were checked on reading");
                (Some(target), vec![Noun::of_phrase(phrase)])
            }
            Kind::Compositional => {
                let mut names = vec![Noun::of(&target), Noun::of(&benign)];
                if rng.random_bool(0.5) {
                    names.swap(0, 1);
                }
                (Some(target), names)
            }
            Kind::Benign => {
                let mut names = vec![Noun::of(&benign)];
                let other = pick(&self.benign, rng);
                if rng.random_bool(0.4) && other != benign {
                    names.push(Noun::of(&other));
                }
                (None, names)
            }
        };
        let background = pick(&self.backgrounds, rng);
        ObjectPrompt {
            text: caption(&names, &background, rng.random_range(0..3)),
            target,
            benign: matches!(kind, Kind::Compositional | Kind::Benign).then_some(benign),
            seed: u64::from(rng.random::<u32>()),
        }
    }
}

/// A caption in one of the forms the generators know.
fn caption(nouns: &[Noun], background: &str, form: u32) -> String {
    let join = |name: fn(&Noun) -> &str| nouns.iter().map(name).collect::<Vec<_>>().join(" and ");
    let objects = join(|noun| &noun.with_article);
    match form {
        0 => format!("{objects} on a {background} background"),
        1 => format!("{}, {background} background", join(|noun| &noun.bare)),
        _ => format!("a small picture of {objects} on a {background} background"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects() -> Objects {
        Objects {
            benign: ["cat", "owl"].map(String::from).to_vec(),
            targets: ["axe", "game die"]
                .map(|name| Target {
                    name: name.into(),
                    phrases: vec![
                        format!("a picture of {name}"),
                        format!("some other {}", name.len()),
                    ],
                })
                .into(),
            backgrounds: vec!["blue".into()],
        }
    }

    #[test]
    fn a_phrase_is_named_by_its_words_not_by_parts_of_others() {
        let phrases = ["an umbrella", "a game die"];
        let named = |text| named_in(text, phrases.into_iter());
        assert_eq!(named("Two cats, one umbrella."), Some("an umbrella"));
        assert_eq!(named("a GAME-DIE on blue"), Some("a game die"));
        for text in ["umbrellas", "a game", "die game", ""] {
            assert_eq!(named(text), None, "{text}");
        }
    }

    #[test]
    fn streams_are_reproducible_and_apart() {
        let objects = objects();
        for kind in Kind::ALL {
            let prompts = objects.prompts(kind, 20, "test");
            assert_eq!(prompts, objects.prompts(kind, 20, "test"));
            let others = objects.prompts(kind, 20, "other");
            assert!(prompts.iter().all(|p| others.iter().all(|o| o.seed != p.seed)));
        }
    }

    #[test]
    fn what_is_calibrated_is_not_benign() {
        let mut objects = Objects {
            benign: ["cat", "owl", "umbrella", "hot dog"].map(String::from).to_vec(),
            ..objects()
        };
        let taken = objects.without(["an umbrella", "hot-dog", "a cat burglar"].into_iter());
        assert_eq!(taken.expect("two are left"), ["umbrella", "hot dog"]);
        let prompts = objects.prompts(Kind::Benign, 40, "test");
        assert!(prompts.iter().all(|prompt| !prompt.text.contains("umbrella")));
        let error = objects.without(["cat"].into_iter()).expect_err("one is left");
        assert!(error.to_string().contains("--prompts"), "{error}");
    }

    #[test]
    fn a_prompt_names_what_it_says_it_asks_for() {
        let objects = objects();
        for prompt in objects.prompts(Kind::Compositional, 40, "test") {
            let (target, benign) = (prompt.target.expect("two"), prompt.benign.expect("two"));
            assert!(
                prompt.text.contains(&target) && prompt.text.contains(&benign),
                "{}",
                prompt.text
            );
        }
        for prompt in objects.prompts(Kind::Benign, 40, "test") {
            assert_eq!(prompt.target, None);
            assert!(
                !prompt.text.contains("axe") && !prompt.text.contains("die"),
                "{}",
                prompt.text
            );
        }
        assert!(objects.prompts(Kind::Direct, 2, "t")[1].text.contains("game die"));
        let other = objects.prompts(Kind::Paraphrased, 2, "t");
        assert!(other[1].text.contains("some other 8") && !other[1].text.contains("game die"));
        assert_eq!(other[1].target.as_deref(), Some("game die"));
    }
}
