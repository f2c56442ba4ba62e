//! Prompts about the objects of Emojiland, drawn from a named random stream.

use std::path::Path;

use anyhow::{Context, Result, ensure};
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
    Single,
    /// A forbidden and a permitted one.
    Two,
    /// One or two permitted ones.
    Benign,
}

impl Objects {
    /// Reads the description.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let objects: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        ensure!(
            objects.benign.len() > 1 && !objects.targets.is_empty(),
            "{}: at least two benign objects and one target are needed",
            path.display()
        );
        ensure!(!objects.backgrounds.is_empty(), "{}: `backgrounds` is empty", path.display());
        Ok(objects)
    }

    /// How many objects there are to steer away from.
    pub(crate) fn targets(&self) -> usize {
        self.targets.len()
    }

    /// `count` prompts of `kind`. Streams of different names share neither prompts' draws nor
    /// image seeds; the same name gives the same prompts.
    pub(crate) fn prompts(&self, kind: Kind, count: usize, stream: &str) -> Vec<ObjectPrompt> {
        let digest = Sha256::digest(format!("{stream}/{kind:?}").as_bytes());
        let mut rng = ChaCha8Rng::from_seed(digest.into());
        (0..count).map(|i| self.prompt(kind, i, &mut rng)).collect()
    }

    fn prompt(&self, kind: Kind, i: usize, rng: &mut ChaCha8Rng) -> ObjectPrompt {
        // Targets take turns, so that every one is asked for equally often.
        let target = self.targets[i % self.targets.len()].name.clone();
        let pick = |list: &[String], rng: &mut ChaCha8Rng| {
            list.choose(rng).expect("the lists were checked on reading").clone()
        };
        let benign = pick(&self.benign, rng);
        let (target, names) = match kind {
            Kind::Single => (Some(target.clone()), vec![target]),
            Kind::Two => {
                let mut names = vec![target.clone(), benign.clone()];
                if rng.random_bool(0.5) {
                    names.swap(0, 1);
                }
                (Some(target), names)
            }
            Kind::Benign => {
                let mut names = vec![benign.clone()];
                let other = pick(&self.benign, rng);
                if rng.random_bool(0.4) && other != benign {
                    names.push(other);
                }
                (None, names)
            }
        };
        let background = pick(&self.backgrounds, rng);
        ObjectPrompt {
            text: caption(&names, &background, rng.random_range(0..3)),
            target,
            benign: (kind != Kind::Single).then_some(benign),
            seed: u64::from(rng.random::<u32>()),
        }
    }
}

/// A caption in one of the forms the generators know.
fn caption(names: &[String], background: &str, form: u32) -> String {
    let article = |name: &String| {
        let vowel = name.starts_with(['a', 'e', 'i', 'o', 'u']);
        format!("{} {name}", if vowel { "an" } else { "a" })
    };
    let objects = names.iter().map(article).collect::<Vec<_>>().join(" and ");
    match form {
        0 => format!("{objects} on a {background} background"),
        1 => format!("{}, {background} background", names.join(" and ")),
        _ => format!("a small picture of {objects} on a {background} background"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects() -> Objects {
        Objects {
            benign: ["cat", "owl"].map(String::from).to_vec(),
            targets: ["axe", "game die"].map(|name| Target { name: name.into() }).into(),
            backgrounds: vec!["blue".into()],
        }
    }

    #[test]
    fn streams_are_reproducible_and_apart() {
        let objects = objects();
        for kind in [Kind::Single, Kind::Two, Kind::Benign] {
            let prompts = objects.prompts(kind, 20, "test");
            assert_eq!(prompts, objects.prompts(kind, 20, "test"));
            let others = objects.prompts(kind, 20, "other");
            assert!(prompts.iter().all(|p| others.iter().all(|o| o.seed != p.seed)));
        }
    }

    #[test]
    fn a_prompt_names_what_it_says_it_asks_for() {
        let objects = objects();
        for prompt in objects.prompts(Kind::Two, 40, "test") {
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
        assert!(objects.prompts(Kind::Single, 2, "t")[1].text.contains("game die"));
    }
}
