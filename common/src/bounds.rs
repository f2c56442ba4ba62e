//! Bounds of what members of a cluster bring, and the form of their names: one place, so that nothing that
//! one process accepts is more than another can take. What is refused is shown without its control
//! characters, and short.

use std::fmt;

use fairlead_proto::v1;

/// Most characters of a name of a process, generator or energy model.
pub const MAX_NAME: usize = 128;

/// Most characters of the name of a concept or of a group of them.
pub const MAX_CONCEPT_NAME: usize = 64;

/// Most concepts of one energy node.
pub const MAX_CONCEPTS: usize = 1_024;

/// Most concepts that a cluster remembers, each counted once for every energy model.
pub const MAX_KNOWN_CONCEPTS: usize = 4_096;

/// Most phrases that describe a concept, and most neutral ones beside them.
pub const MAX_PHRASES: usize = 64;

/// Most characters of a phrase.
pub const MAX_PHRASE_CHARS: usize = 512;

/// Most calibrations of one energy node.
pub const MAX_CALIBRATIONS: usize = 4_096;

/// Most calibrations, and stand-ins for missing ones, that one answer of an energy node names.
pub const MAX_ANSWER_CALIBRATIONS: usize = MAX_CONCEPTS;

/// Most generators of one worker.
pub const MAX_MODELS: usize = 64;

/// Most shards that a worker may ask to hold at once.
pub const MAX_CAPACITY: u32 = 1_024;

/// Most notices of one image, or of anything else that a worker says beside its images.
pub const MAX_NOTICES: usize = 64;

/// Most characters of a text for people: a notice, or why a shard failed.
pub const MAX_TEXT_CHARS: usize = 1_024;

/// Largest side of an image, in pixels, that a generator may claim.
pub const MAX_SIDE: u32 = 16_384;

/// Characters of a refused text that its refusal shows.
const SHOWN: usize = 64;

/// Why something is refused, without the name of its field.
type Problem = String;

/// Text of others for a message: without control characters, and its beginning only.
pub fn shown(text: &str) -> impl fmt::Display {
    let short: String = text.chars().take(SHOWN).collect();
    let rest = if short.len() < text.len() { "..." } else { "" };
    format!("`{}{rest}`", short.escape_debug())
}

/// Lower-case words and digits joined by single hyphens, at most [`MAX_CONCEPT_NAME`] characters: the form
/// of concepts' and groups' names.
pub fn is_kebab_case(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= MAX_CONCEPT_NAME
        && name.split('-').all(|word| !word.is_empty() && word.bytes().all(plain))
}

/// Letters, digits, `-`, `_` and `.`, a letter or digit first: the form of processes' names.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    name.len() <= MAX_NAME
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name.bytes().all(plain)
}

/// Names joined by `/`, at most [`MAX_NAME`] characters in all: "worker-1/2", "owner/model".
pub fn is_path(name: &str) -> bool {
    name.len() <= MAX_NAME && name.split('/').all(is_name)
}

/// Refuses what is no name of a process.
pub fn name(name: &str) -> Result<(), Problem> {
    match is_name(name) {
        true => Ok(()),
        false => Err(not_a_name(name, "")),
    }
}

/// Refuses what is no name, or names joined by `/`: of a worker, a generator, an energy model.
pub fn path(name: &str) -> Result<(), Problem> {
    match is_path(name) {
        true => Ok(()),
        false => Err(not_a_name(name, ", in parts joined by `/`")),
    }
}

fn not_a_name(name: &str, parts: &str) -> Problem {
    format!(
        "{} must be 1 to {MAX_NAME} letters, digits, `-`, `_` or `.`, a letter or digit first{parts}",
        shown(name)
    )
}

/// Refuses what is no name of a concept or of a group.
pub fn kebab_case(name: &str) -> Result<(), Problem> {
    match is_kebab_case(name) {
        true => Ok(()),
        false => Err(format!(
            "{} must be kebab-case, at most {MAX_CONCEPT_NAME} characters, e.g. `kitchen-knife`",
            shown(name)
        )),
    }
}

/// Refuses more than `most` of something.
pub fn count(what: &str, number: usize, most: usize) -> Result<(), Problem> {
    match number <= most {
        true => Ok(()),
        false => Err(format!("has {number} {what}; at most {most}")),
    }
}

/// Refuses what is empty, too long, or holds control characters: a phrase, a hash, a version.
pub fn line(text: &str, most: usize) -> Result<(), Problem> {
    if text.trim().is_empty() {
        return Err("holds an empty text".to_owned());
    }
    if text.chars().take(most + 1).count() > most {
        return Err(format!("{} has more than {most} characters", shown(text)));
    }
    match text.chars().any(char::is_control) {
        true => Err(format!("{} holds control characters", shown(text))),
        false => Ok(()),
    }
}

/// Text for people from another process, as it may be kept and shown: control characters become spaces,
/// and what is too long ends in dots.
pub fn text(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut short: String = text.chars().take(MAX_TEXT_CHARS).map(plain).collect();
    if short.chars().count() < text.chars().take(MAX_TEXT_CHARS + 1).count() {
        short.push_str("...");
    }
    short
}

/// Refuses a node's concepts that no node may have.
pub fn concepts(infos: &[v1::ConceptInfo]) -> Result<(), Problem> {
    count("concepts", infos.len(), MAX_CONCEPTS)?;
    for v1::ConceptInfo { concept, group, phrases, weight, .. } in infos {
        let concept = concept.as_ref().ok_or("holds a concept without a name")?;
        kebab_case(&concept.name)?;
        let within = |problem: Problem| format!("concept `{}`: {problem}", concept.name);
        line(&concept.version, MAX_NAME).map_err(|problem| within(format!("version {problem}")))?;
        if !group.is_empty() {
            kebab_case(group).map_err(|problem| within(format!("group {problem}")))?;
        }
        count("phrases", phrases.len(), MAX_PHRASES).map_err(within)?;
        phrases.iter().try_for_each(|phrase| line(phrase, MAX_PHRASE_CHARS)).map_err(within)?;
        if !(weight.is_finite() && *weight >= 0.0) {
            return Err(within(format!("weight {weight} must be finite, 0 or more")));
        }
    }
    Ok(())
}

/// Refuses a node's calibrations that no node may have.
pub fn calibrations(infos: &[v1::CalibrationInfo]) -> Result<(), Problem> {
    count("calibrations", infos.len(), MAX_CALIBRATIONS)?;
    for info in infos {
        let key = info.key.as_ref().ok_or("holds a calibration for no run")?;
        line(&info.id, MAX_NAME)?;
        let within = |problem: Problem| format!("calibration `{}`: {problem}", info.id);
        line(&key.generator, MAX_NAME).map_err(within)?;
        path(&key.sampler).map_err(within)?;
        if !info.generator_name.is_empty() {
            line(&info.generator_name, MAX_NAME).map_err(within)?;
        }
        count("concepts", info.concepts.len(), MAX_CONCEPTS).map_err(within)?;
        info.concepts.iter().try_for_each(|name| kebab_case(name)).map_err(within)?;
        let numbers = [info.alpha, info.gate, info.window_start, info.window_end];
        if !numbers.iter().all(|number| number.is_finite()) {
            return Err(within("holds a number that is not finite".to_owned()));
        }
    }
    Ok(())
}

/// Refuses generators that no worker may have.
pub fn models(infos: &[v1::ModelInfo]) -> Result<(), Problem> {
    if infos.is_empty() {
        return Err("is empty; a worker has one model at least".to_owned());
    }
    count("models", infos.len(), MAX_MODELS)?;
    for (index, model) in infos.iter().enumerate() {
        path(&model.name)?;
        let within = |problem: Problem| format!("`{}`: {problem}", model.name);
        line(&model.hash, MAX_NAME).map_err(|problem| within(format!("hash {problem}")))?;
        path(&model.sampler).map_err(|problem| within(format!("sampler {problem}")))?;
        let unusable = [
            ("granularity", model.granularity == 0),
            ("max_side", !(model.granularity.max(1)..=MAX_SIDE).contains(&model.max_side)),
            ("max_batch", model.max_batch == 0),
            ("family", model.family.len() > MAX_NAME || model.family.contains(char::is_control)),
            ("default_guidance_scale", !model.default_guidance_scale.is_finite()),
        ];
        if let Some((field, _)) = unusable.iter().find(|(_, unusable)| *unusable) {
            return Err(format!("`{}` has no usable {field}", model.name));
        }
        if infos[..index].iter().any(|other| other.name == model.name) {
            return Err(format!("`{}` twice", model.name));
        }
    }
    Ok(())
}

/// Refuses what an energy node says its answer rests on, if that is more than any answer can.
pub fn answer(ids: &[String], fallbacks: &[String]) -> Result<(), Problem> {
    count("calibrations", ids.len().saturating_add(fallbacks.len()), MAX_ANSWER_CALIBRATIONS)?;
    ids.iter().try_for_each(|id| line(id, MAX_NAME))?;
    fallbacks.iter().try_for_each(|fallback| line(fallback, MAX_TEXT_CHARS))
}

/// Refuses a step's progress of a job with so many probes if it tells more than there was.
pub fn progress(step: &v1::StepProgress, probes: usize) -> Result<(), Problem> {
    count("scores in a step", step.scores.len(), probes)?;
    step.scores.iter().try_for_each(score)
}

fn score(score: &v1::ConceptScore) -> Result<(), Problem> {
    kebab_case(&score.concept)?;
    match score.energy.is_empty() {
        true => Ok(()),
        false => path(&score.energy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_have_one_form() {
        for good in ["a", "energy-1", "gpu-7.example.com", "emojiland-sd", "SD_3.5", "0"] {
            assert!(is_name(good) && is_path(good), "{good}");
        }
        for bad in ["", "-a", ".", "a b", "a/b", "a\n", "\u{1b}[2J", "ä", "a@b", &"a".repeat(129)]
        {
            assert!(!is_name(bad), "{bad:?}");
        }
        assert!(is_path("worker-1/2") && is_path("owner/sdxl-base-1.0"));
        for bad in ["/", "a/", "/a", "a//b", "a/../b", "a/-b"] {
            assert!(!is_path(bad), "{bad}");
        }
        assert!(is_kebab_case("kitchen-knife") && is_kebab_case("7-up"));
        for bad in ["", "Kitchen", "a--b", "-a", "a_b", "a b", &"a".repeat(65)] {
            assert!(!is_kebab_case(bad), "{bad}");
        }
    }

    #[test]
    fn concepts_beyond_a_bound_are_refused_by_name() {
        let good = v1::ConceptInfo {
            concept: Some(v1::ConceptRef {
                name: "axe".into(),
                version: "1".into(),
                energy: "clip".into(),
            }),
            phrases: vec!["an axe".into()],
            ..Default::default()
        };
        assert_eq!(concepts(&vec![good.clone(); MAX_CONCEPTS]), Ok(()));
        let refused = |change: fn(&mut v1::ConceptInfo), part: &str| {
            let mut bad = good.clone();
            change(&mut bad);
            let problem = concepts(&[bad]).expect_err(part);
            assert!(problem.contains(part), "{problem}");
        };
        refused(|c| c.concept = None, "without a name");
        refused(|c| c.concept.get_or_insert_default().name = "Ax\u{1b}[2J".into(), "kebab-case");
        refused(|c| c.concept.get_or_insert_default().version = "v".repeat(129), "`axe`: version");
        refused(|c| c.group = "We apons".into(), "`axe`: group");
        refused(|c| c.phrases = vec!["an axe".into(); 65], "has 65 phrases; at most 64");
        refused(|c| c.phrases[0] = "x".repeat(513), "more than 512 characters");
        refused(|c| c.phrases[0] = "an\naxe".into(), "control characters");
        refused(|c| c.weight = f32::NAN, "weight");
        let problem = concepts(&vec![good.clone(); 20_000]).expect_err("too many");
        assert_eq!(problem, "has 20000 concepts; at most 1024");
    }

    #[test]
    fn answers_and_steps_tell_no_more_than_there_was() {
        let score =
            |concept: &str| v1::ConceptScore { concept: concept.into(), ..Default::default() };
        let step = v1::StepProgress { scores: vec![score("axe"); 2], ..Default::default() };
        assert_eq!(progress(&step, 2), Ok(()));
        assert!(progress(&step, 1).expect_err("scores").contains("2 scores"));
        let odd = v1::StepProgress { scores: vec![score("a\u{1b}")], ..Default::default() };
        progress(&odd, 2).expect_err("no concept is called so");
        let ids = vec!["c".to_owned(); MAX_ANSWER_CALIBRATIONS + 1];
        assert!(answer(&ids, &[]).expect_err("ids").contains("calibrations"));
        assert!(answer(&["c".repeat(40 << 20)], &[]).expect_err("one").len() < 200);
    }

    proptest! {
        #[test]
        fn what_is_shown_is_short_and_plain(text in "\\PC*|.*\\n.*|\u{1b}.*") {
            let kept = super::text(&text);
            prop_assert!(!kept.contains(char::is_control), "{kept:?}");
            prop_assert!(kept.chars().count() <= MAX_TEXT_CHARS + 3);
            let shown = shown(&text).to_string();
            prop_assert!(!shown.contains(char::is_control), "{shown:?}");
        }
    }
}
