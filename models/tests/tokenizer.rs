//! The tokenizer against transformers' `CLIPTokenizer` (`goldens/tokenizer.py` made the numbers).
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use fairlead_models::ClipTokenizer;

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

#[test]
fn every_text_has_the_ids_of_transformers() {
    let golden = fs::read_to_string(root().join("golden.json")).unwrap();
    let golden: HashMap<String, Vec<Case>> = serde_json::from_str(&golden).unwrap();
    assert_eq!(golden.len(), 3);
    for (name, cases) in golden {
        let tokenizer = ClipTokenizer::load(&root().join(&name)).unwrap();
        assert!(cases.len() > 300);
        for Case { text, ids, window } in cases {
            let encoded = tokenizer.encode(&text).unwrap();
            assert_eq!(encoded.tokens, ids.len(), "{name}: {text:?}");
            assert_eq!(encoded.chunks[0], window, "{name}: {text:?}");
            let body = tokenizer.max_length() - 2;
            let bodies = encoded.chunks.iter().flat_map(|chunk| &chunk[1..=body]);
            let kept: Vec<u32> = bodies.take(ids.len()).copied().collect();
            assert_eq!(kept, ids, "{name}: {text:?}");
        }
    }
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
