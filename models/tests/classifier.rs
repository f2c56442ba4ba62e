//! Classifiers of others against transformers; `goldens/classifier.py` made the numbers.
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::path::{Path, PathBuf};

use fairlead_models::OnnxClassifier;
use serde_json::{Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/classifier")
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A copy whose `config.json` or other file has one field changed.
fn changed(file: &str, field: &str, value: Value) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["model.onnx", "config.json", "preprocessor_config.json"] {
        std::fs::copy(folder().join(name), copy.path().join(name)).unwrap();
    }
    let mut json = read(&copy.path().join(file));
    json[field] = value;
    std::fs::write(copy.path().join(file), json.to_string()).unwrap();
    copy
}

#[test]
fn an_exported_classifier_says_what_transformers_says() {
    let single = OnnxClassifier::load(&folder()).unwrap();
    assert_eq!(single.labels(), ["normal", "drawing", "forbidden"]);
    let kind = json!("multi_label_classification");
    let multi = changed("config.json", "problem_type", kind);
    let multi = OnnxClassifier::load(multi.path()).unwrap();
    for golden in read(&folder().join("golden.json")).as_array().unwrap() {
        let side = golden["side"].as_u64().unwrap() as usize;
        // Where the picture has another size, transformers rounds to bytes what it resizes.
        let tolerance = if side == 24 { 1e-5 } else { 5e-3 };
        let rgb = hex::decode(golden["rgb"].as_str().unwrap()).unwrap();
        for (classifier, expected) in [(&single, &golden["softmax"]), (&multi, &golden["sigmoid"])]
        {
            let expected = expected.as_array().unwrap().iter().map(|p| p.as_f64().unwrap());
            let found = classifier.probabilities(&rgb, side, side).unwrap();
            let pairs = found.iter().zip(expected);
            let worst = pairs.fold(0f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
            println!("side {side}: {worst:.1e}");
            assert!(found.len() == 3 && worst < tolerance, "side {side}: {worst:.1e}");
        }
    }
}

#[test]
fn what_is_wrong_with_a_classifier_is_said() {
    let refusal = |dir: &Path| OnnxClassifier::load(dir).unwrap_err().to_string();
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("model.onnx: no such file"));
    let gap = changed("config.json", "id2label", json!({"1": "a"}));
    assert!(refusal(gap.path()).contains("must number the labels from 0"));
    let filter = changed("preprocessor_config.json", "resample", json!(0));
    assert!(refusal(filter.path()).contains("resample is 0"));
    let cropped = changed("preprocessor_config.json", "do_center_crop", json!(true));
    assert!(refusal(cropped.path()).contains("do_center_crop false"));
    let scaled = changed("preprocessor_config.json", "rescale_factor", json!(1.0));
    assert!(refusal(scaled.path()).contains("rescale_factor must be 1/255"));
    let broken = changed("config.json", "problem_type", Value::Null);
    std::fs::write(broken.path().join("model.onnx"), "no model").unwrap();
    assert!(refusal(broken.path()).contains("it cannot be run"));
}
