//! The tokenizers against transformers (`goldens/tokenizer.py` made the numbers).
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use fairlead_models::{ClipTokenizer, EncodedPrompt, FileTokenizer};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizers")
}

#[derive(serde::Deserialize)]
struct Case {
    text: String,
    /// Without marks.
    ids: Vec<u32>,
    /// Padded and cut to one window.
    window: Vec<u32>,
}

fn golden() -> HashMap<String, Vec<Case>> {
    let golden = fs::read_to_string(root().join("golden.json")).unwrap();
    let golden: HashMap<String, Vec<Case>> = serde_json::from_str(&golden).unwrap();
    assert!(golden.len() == 6 && golden.values().all(|cases| cases.len() > 300));
    golden
}

/// The text's windows hold its ids in order, `body` of them each from `first` on; the first window is the
/// one transformers makes where the text fits it.
fn check(
    name: &str,
    cases: &[Case],
    (first, body): (usize, usize),
    encode: impl Fn(&str) -> EncodedPrompt,
) {
    for Case { text, ids, window } in cases {
        let encoded = encode(text);
        assert_eq!(encoded.tokens, ids.len(), "{name}: {text:?}");
        assert_eq!(encoded.chunks[0], *window, "{name}: {text:?}");
        let bodies = encoded.chunks.iter().flat_map(|chunk| &chunk[first..first + body]);
        let kept: Vec<u32> = bodies.take(ids.len()).copied().collect();
        assert_eq!(kept, *ids, "{name}: {text:?}");
    }
}

#[test]
fn every_text_has_the_ids_of_transformers() {
    let golden = golden();
    for name in ["sd15", "sd21", "whole"] {
        let tokenizer = ClipTokenizer::load(&root().join(name)).unwrap();
        let encode = |text: &str| tokenizer.encode(text).unwrap();
        check(name, &golden[name], (1, tokenizer.max_length() - 2), encode);
    }
    for (name, length) in [("siglip", 12), ("t5", 30), ("siglip2", 16)] {
        let tokenizer = FileTokenizer::load(&root().join(name), length).unwrap();
        assert_eq!((tokenizer.max_length(), tokenizer.body()), (length, length - 1));
        check(name, &golden[name], (0, length - 1), |text| tokenizer.encode(text).unwrap());
    }
}

/// SigLIP 2 was trained on lower-cased text; its class lower-cases, its `tokenizer.json` does not.
#[test]
fn what_a_class_does_beside_its_file_is_done() {
    let folder = |settings: &[(&str, serde_json::Value)]| {
        let copy = tempfile::tempdir().unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(root().join("siglip2").join(name), copy.path().join(name)).unwrap();
        }
        let path = copy.path().join("tokenizer_config.json");
        let text = fs::read_to_string(&path).unwrap();
        let mut fields: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (field, value) in settings {
            fields[*field] = value.clone();
        }
        fs::write(path, fields.to_string()).unwrap();
        copy
    };
    let windows = |settings: &[(&str, serde_json::Value)]| {
        let folder = folder(settings);
        let tokenizer = FileTokenizer::load(folder.path(), 16).unwrap();
        ["An Axe", "an axe"].map(|text| tokenizer.encode(text).unwrap().chunks.remove(0))
    };
    let [upper, lower] = windows(&[]);
    assert_eq!(upper, lower);
    let gemma = ("tokenizer_class", "GemmaTokenizerFast".into());
    let [upper, same] = windows(std::slice::from_ref(&gemma));
    assert_eq!((&upper, &same), (&lower, &lower), "do_lower_case says so");
    let [upper, same] = windows(&[gemma.clone(), ("do_lower_case", false.into())]);
    assert!(upper != lower && same == lower);
    let [left, _] = windows(&[("padding_side", serde_json::Value::Null)]);
    let marks = lower.iter().filter(|id| **id != 0).count();
    assert_eq!(left[16 - marks..], lower[..marks], "the class pads before the text");
    assert!(left[..16 - marks].iter().all(|id| *id == 0));

    for (field, value, part) in [
        ("tokenizer_class", "BertTokenizer".into(), "supported: \"PreTrainedTokenizerFast\""),
        ("do_lower_case", "yes".into(), "do_lower_case is \"yes\""),
        ("padding_side", "top".into(), "padding_side is \"top\""),
        ("pad_token", 3.into(), "pad_token is 3; supported: a token"),
        ("add_bos_token", true.into(), "contradicts add_bos_token"),
        ("add_eos_token", false.into(), "contradicts add_bos_token or add_eos_token"),
        ("strip_accents", true.into(), "unknown field strip_accents"),
    ] {
        let folder = folder(&[(field, value)]);
        let message = FileTokenizer::load(folder.path(), 16).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_tokenizer_file_that_cannot_be_honoured_is_refused() {
    let refusal = |edit: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(root().join("t5").join(name), folder.path().join(name)).unwrap();
        }
        edit(folder.path());
        FileTokenizer::load(folder.path(), 30).unwrap_err().to_string()
    };
    let replace = |name: &'static str, from: &'static str, to: &'static str| {
        move |folder: &Path| {
            let text = fs::read_to_string(folder.join(name)).unwrap();
            assert!(text.contains(from), "{name} has no {from}");
            fs::write(folder.join(name), text.replace(from, to)).unwrap();
        }
    };
    let settings = "tokenizer_config.json";
    let unknown = refusal(&replace(settings, "<pad>", "<filler>"));
    assert!(unknown.contains("\"<filler>\" is not in the vocabulary"), "{unknown}");
    let unnamed = refusal(&replace(settings, "pad_token", "other_token"));
    assert!(unnamed.contains("names a pad_token"), "{unnamed}");
    let prefix =
        r#"{"SpecialToken":{"id":"</s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}"#;
    let prefixed = refusal(&|folder: &Path| {
        let path = folder.join("tokenizer.json");
        let text = fs::read_to_string(&path).unwrap();
        let mut fields: serde_json::Value = serde_json::from_str(&text).unwrap();
        fields["post_processor"]["single"] = serde_json::from_str(&format!("[{prefix}]")).unwrap();
        fs::write(path, fields.to_string()).unwrap();
    });
    assert!(prefixed.contains("marks before the text"), "{prefixed}");
    let none = refusal(&|folder: &Path| fs::remove_file(folder.join("tokenizer.json")).unwrap());
    assert!(none.contains("tokenizer.json: no such file"), "{none}");
    let narrow = FileTokenizer::load(&root().join("t5"), 1).unwrap_err().to_string();
    assert!(narrow.contains("no room"), "{narrow}");
}

#[test]
fn a_long_prompt_is_several_windows_and_nothing_is_lost() {
    let tokenizer = ClipTokenizer::load(&root().join("sd21")).unwrap();
    assert_eq!(tokenizer.max_length(), 16);
    let counts = |words: usize| {
        let encoded = tokenizer.encode(&"a ".repeat(words)).unwrap();
        assert!(encoded.chunks.iter().all(|chunk| chunk.len() == 16));
        (encoded.tokens, encoded.chunks.len())
    };
    assert_eq!(counts(0), (0, 1));
    assert_eq!(counts(14), (14, 1));
    assert_eq!(counts(15), (15, 2));
    assert_eq!(counts(2000), (2000, 143));

    let chunks = tokenizer.encode(&"a ".repeat(15)).unwrap().chunks;
    let (start, end) = (chunks[0][0], chunks[0][15]);
    assert_eq!(chunks[1][0], start);
    assert_eq!(chunks[1][2], end);
    assert_eq!(chunks[1][3..], [0; 13], "padded with \"!\"");
}

/// As some editors save them.
#[test]
fn byte_order_marks_and_carriage_returns_are_no_tokens() {
    let plain = ClipTokenizer::load(&root().join("sd21")).unwrap().encode("a cat's toys").unwrap();
    for (file, change) in [
        ("vocab.json", (|text| format!("\u{feff}{text}")) as fn(&str) -> String),
        ("merges.txt", |text| format!("\u{feff}{}", text.replace('\n', "\r\n"))),
    ] {
        let text = fs::read_to_string(root().join("sd21").join(file)).unwrap();
        let folder = changed("sd21", file, &change(&text));
        let tokenizer = ClipTokenizer::load(folder.path()).unwrap();
        assert_eq!(tokenizer.encode("a cat's toys").unwrap(), plain, "{file}");
    }
}

/// A copy of `name` with one file changed, or removed when `content` is empty.
fn changed(name: &str, file: &str, content: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(root().join(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    if content.is_empty() {
        fs::remove_file(copy.path().join(file)).unwrap();
    } else {
        fs::write(copy.path().join(file), content).unwrap();
    }
    copy
}

#[test]
fn a_bad_folder_is_refused_with_what_is_wrong() {
    let cases = [
        ("vocab.json", "", "vocab.json: no such file; a CLIP tokenizer needs"),
        ("merges.txt", "", "merges.txt: no such file; a CLIP tokenizer needs"),
        ("vocab.json", "{\"a\": \"b\"}", "the id of \"a\" is not a number"),
        ("vocab.json", "[1]", "expected a JSON object, found a list"),
        ("vocab.json", "{\"a\": 1", "not valid JSON"),
        ("vocab.json", "{\"a\": 1}", "not a CLIP tokenizer"),
        ("merges.txt", "a b c\n", "bad merge \"a b c\""),
        ("merges.txt", "ab\n", "bad merge \"ab\""),
        ("tokenizer_config.json", "{\"model_max_length\": 2}", "model_max_length is 2; supported"),
        (
            "tokenizer_config.json",
            "{\"tokenizer_class\": \"T5Tokenizer\"}",
            "\"T5Tokenizer\"; supported",
        ),
        (
            "tokenizer_config.json",
            "{\"do_lower_case\": false}",
            "do_lower_case is false; supported: true",
        ),
        (
            "special_tokens_map.json",
            "{\"bos_token\": \"<s>\"}",
            "the bos_token \"<s>\" is not in the vocabulary",
        ),
        ("special_tokens_map.json", "{\"bos_token\": 5}", "bos_token is not a token"),
        ("special_tokens_map.json", "{\"start_token\": 5}", "unknown field start_token (5)"),
        (
            "special_tokens_map.json",
            "{\"bos_token\": {\"content\": \"!\", \"lstrip\": \"no\"}}",
            "bos_token is not a token",
        ),
        (
            "tokenizer_config.json",
            "{\"added_tokens_decoder\": [3]}",
            "added_tokens_decoder is [3]; supported: a JSON object",
        ),
        ("tokenizer_config.json", "{\"bos_tokens\": \"a\"}", "unknown field bos_tokens"),
    ];
    for (file, content, expected) in cases {
        let folder = changed("sd21", file, content);
        let message = ClipTokenizer::load(folder.path()).unwrap_err().to_string();
        assert!(message.contains(expected), "{file} {content:?}: {message}");
    }
}

#[test]
fn a_window_that_no_file_names_is_77() {
    let folder = changed("sd21", "tokenizer_config.json", "");
    assert_eq!(ClipTokenizer::load(folder.path()).unwrap().max_length(), 77);
    let unset = "{\"model_max_length\": 1000000000000000019884624838656}";
    let folder = changed("sd21", "tokenizer_config.json", unset);
    assert_eq!(ClipTokenizer::load(folder.path()).unwrap().max_length(), 77);
}
