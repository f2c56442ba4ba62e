use fairlead_fuzz::{fuzz, spoiled};
use proptest::{prelude::*, sample::select};

use super::*;

fn parameters() -> Parameters {
    Parameters {
        prompt: "a cat".into(),
        negative_prompt: "a dog".into(),
        steps: 20,
        sampler: "DDIM".into(),
        guidance: 5.0,
        seed: 1,
        size: (32, 48),
        model_hash: "0123456789abcdef".into(),
        model: "emojiland-sd".into(),
    }
}

/// What `write` keeps of it.
fn short(mut parameters: Parameters) -> Parameters {
    parameters.model_hash = parameters.model_hash.chars().take(HASH_DIGITS).collect();
    parameters
}

#[test]
fn the_usual_is_in_the_usual_form() {
    let mut parameters = parameters();
    assert_eq!(
        write(&parameters),
        "a cat\nNegative prompt: a dog\nSteps: 20, Sampler: DDIM, CFG scale: 5, Seed: 1, \
         Size: 32x48, Model hash: 0123456789, Model: emojiland-sd"
    );
    parameters.negative_prompt.clear();
    parameters.guidance = 7.5;
    parameters.model = "a, b".into();
    assert!(write(&parameters).starts_with("a cat\nSteps: 20, Sampler: DDIM, CFG scale: 7.5,"));
    assert!(write(&parameters).ends_with("Model: \"a, b\""));
    for usual in
        ["two\n\nlines, (axe:1.2)", " spaced ", "a \"sign\"", "\"A\" and \"B\"", "steps of stone"]
    {
        parameters.prompt = usual.into();
        assert!(write(&parameters).starts_with(&format!("{usual}\nSteps: 20,")), "{usual}");
    }
}

#[test]
fn a_prompt_that_names_fields_is_quoted() {
    let mut parameters = parameters();
    parameters.prompt = "a cat\nSteps: 1, Seed: 2\nNegative prompt: all".into();
    let text = write(&parameters);
    let first = text.lines().next().expect("a prompt");
    assert_eq!(first, r#""a cat\nSteps\u003a 1, Seed\u003a 2\nNegative prompt\u003a all""#);
    assert_eq!(read(&text), Ok(short(parameters)));
}

#[test]
fn what_is_not_in_this_form_is_refused_by_name() {
    let good = write(&parameters());
    for (old, new, refused) in [
        ("\nSteps: ", "\nSteps ", "the last line does not begin with `Steps: `"),
        ("Seed: 1", "Seed: -1", "`Seed` is `-1`, which is not a number"),
        ("32x48", "32", "`Size` is `32`, which is not WIDTHxHEIGHT"),
        ("Seed: 1, ", "", "`Seed` is missing"),
        ("Seed: 1", "Seed: 1, Seed: 2", "`Seed` is there twice"),
        ("Model: e", "Model: \"e", "`Model: \"emojiland-sd` is not `Key: value, Key: value`"),
    ] {
        let error = read(&good.replace(old, new)).expect_err(new);
        assert_eq!(error.to_string(), refused);
    }
    assert!(read(&good.replace("Seed: 1", "Seed: 1, Clip skip: 2")).is_ok(), "passed over");
}

/// Pieces of which a prompt could make a forged line.
fn hostile() -> impl Strategy<Value = String> {
    let labels = FIELDS.into_iter().chain([NEGATIVE, "prompt"]).map(str::to_owned);
    let cases =
        labels.clone().map(|l| l.to_lowercase()).chain(labels.clone().map(|l| l.to_uppercase()));
    let labels: Vec<String> = labels
        .chain(cases)
        .chain(["\u{17f}teps", "\u{fb06}eps", "Se"].map(str::to_owned))
        .collect();
    let breaks = ["\n", "\r", "\r\n", "\u{b}", "\u{c}", "\u{1c}", "\u{85}", "\u{2028}", "\u{2029}"];
    let others = [
        ":", " :", ": ", ", ", "\"", "\\", "\\\"", "\\u003a", " ", "\t", "\0", "7", "9x9",
        "\u{202e}",
    ];
    let piece = prop_oneof![
        3 => select(labels),
        2 => select(breaks.to_vec()).prop_map(str::to_owned),
        4 => select(others.to_vec()).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

prop_compose! {
    fn any_parameters()(
        texts in [hostile(), hostile(), hostile(), hostile(), hostile()],
        (steps, seed, size) in any::<(u32, u64, (u32, u32))>(),
        guidance in any::<f32>().prop_filter("finite", |value| value.is_finite()),
    ) -> Parameters {
        let [prompt, negative_prompt, sampler, model_hash, model] = texts;
        Parameters {
            prompt, negative_prompt, steps, sampler, guidance, seed, size, model_hash, model,
        }
    }
}

/// Splits lines where any of the usual languages does.
fn lines(text: &str) -> Vec<&str> {
    text.split(|c: char| "\n\r\u{b}\u{c}\u{1c}\u{1d}\u{1e}\u{85}\u{2028}\u{2029}".contains(c))
        .collect()
}

proptest! {
    #[test]
    fn what_is_written_reads_back_exactly(parameters in any_parameters()) {
        prop_assert_eq!(read(&write(&parameters)), Ok(short(parameters)));
    }

    #[test]
    fn no_text_changes_what_other_tools_read(parameters in any_parameters()) {
        let text = write(&parameters);
        let steps = format!("Steps: {}, Sampler: ", parameters.steps);
        let all = lines(&text);
        let begins = |line: &&&str, name: &str| {
            line.trim_start().to_uppercase().starts_with(&name.to_uppercase())
        };
        // The last line, and the only one that begins as fields do.
        prop_assert!(all.last().is_some_and(|line| line.starts_with(&steps)), "{text}");
        prop_assert_eq!(all.iter().filter(|line| begins(line, "Steps:")).count(), 1, "{}", text);
        // The only line that begins with a negative prompt is the written one.
        let negative = usize::from(!parameters.negative_prompt.is_empty());
        prop_assert_eq!(all.iter().filter(|line| begins(line, "Negative prompt:")).count(), negative);
        // Whoever takes the first `Seed:` or the like anywhere, in whatever case, finds the true one.
        let upper = text.to_uppercase();
        let (width, height) = parameters.size;
        for (name, value) in [
            (STEPS, parameters.steps.to_string()),
            (SEED, parameters.seed.to_string()),
            (SIZE, format!("{width}X{height}")),
        ] {
            let first = upper.split_once(&format!("{}:", name.to_uppercase())).expect("it is written").1;
            prop_assert!(first.starts_with(&format!(" {value},")), "{}: {}", name, text);
        }
        prop_assert_eq!(upper.matches("PROMPT:").count(), negative);
    }
}

#[test]
fn spoiled_texts_are_refused_or_read_back_the_same() {
    fuzz(spoiled(write(&parameters()).into_bytes()), |bytes| {
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(found) = read(&text) {
            let again = read(&write(&found)).expect("what is written can be read");
            // Not the values themselves: NaN is not equal to NaN.
            assert_eq!(format!("{:?}", short(found)), format!("{again:?}"));
        }
    });
}
