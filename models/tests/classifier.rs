//! Classifiers of others against transformers; `goldens/classifier.py` made the numbers.
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::path::{Path, PathBuf};

use fairlead_models::OnnxClassifier;
use prost::Message;
use serde_json::{Value, json};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorShapeProto,
    TypeProto, ValueInfoProto, tensor_shape_proto, tensor_shape_proto::dimension, type_proto,
};

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

/// A copy with another network: `change` edits the file's graph.
fn rewired(change: impl FnOnce(&mut GraphProto)) -> tempfile::TempDir {
    let copy = changed("config.json", "problem_type", Value::Null);
    let path = copy.path().join("model.onnx");
    let mut model = ModelProto::decode(&*std::fs::read(&path).unwrap()).unwrap();
    change(model.graph.as_mut().unwrap());
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    copy
}

fn node(op: &str, input: &str, output: &str) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        name: output.into(),
        input: vec![input.into()],
        output: vec![output.into()],
        ..NodeProto::default()
    }
}

/// Puts an operation behind the network's output.
fn ending_in(ops: &[&str]) -> tempfile::TempDir {
    rewired(|graph| {
        for op in ops {
            let last = graph.output[0].name.clone();
            let name = format!("after_{last}");
            graph.node.push(node(op, &last, &name));
            graph.output[0].name = name;
        }
    })
}

const RGB: [u8; 3 * 24 * 24] = {
    let mut rgb = [0; 3 * 24 * 24];
    let mut i = 0;
    while i < rgb.len() {
        rgb[i] = (i * 7 % 251) as u8;
        i += 1;
    }
    rgb
};

fn judged(dir: &Path) -> Vec<f32> {
    OnnxClassifier::load(dir).unwrap().probabilities(&RGB, 24, 24).unwrap()
}

#[track_caller]
fn assert_same(found: &[f32], expected: &[f32]) {
    let worst = found.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(found.len() == expected.len() && worst < 1e-5, "{found:?}, expected {expected:?}");
}

/// A softmax of probabilities finds nothing: with five labels none of them can exceed 0.41.
#[test]
fn probabilities_are_told_from_logits_by_the_last_operation() {
    let logits = judged(&folder());
    assert!(logits.iter().any(|p| *p > 0.5));
    for ops in [&["Softmax"][..], &["LogSoftmax"], &["Softmax", "Identity"]] {
        assert_same(&judged(ending_in(ops).path()), &logits);
    }
    let kind = json!("multi_label_classification");
    let independent = judged(changed("config.json", "problem_type", kind).path());
    let sigmoid = ending_in(&["Sigmoid"]);
    assert_same(&judged(sigmoid.path()), &independent);

    let refusal = |dir: &Path| OnnxClassifier::load(dir).unwrap_err().to_string();
    let argmax = refusal(ending_in(&["ArgMax"]).path());
    assert!(argmax.contains("made by ArgMax: no scores of labels"), "{argmax}");
    // Over the batch, each number alone is the whole: every label would be found on every picture.
    let wrong = rewired(|graph| {
        let last = graph.output[0].name.clone();
        let mut softmax = node("Softmax", &last, "probs");
        softmax.attribute.push(AttributeProto {
            name: "axis".into(),
            r#type: 2,
            i: 0,
            ..AttributeProto::default()
        });
        graph.node.push(softmax);
        graph.output[0].name = "probs".into();
    });
    let error = OnnxClassifier::load(wrong.path()).unwrap().probabilities(&RGB, 24, 24);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("over another axis than the labels"), "{error}");
}

/// Tensors may lie in files beside the network; other weights are another judge.
#[test]
fn the_hash_covers_weights_wherever_they_lie() {
    let external = |flip: bool| {
        let mut data = Vec::new();
        let copy = rewired(|graph| {
            for tensor in &mut graph.initializer {
                let bytes = std::mem::take(&mut tensor.raw_data);
                let entry =
                    |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
                tensor.data_location = Some(1);
                tensor.external_data = vec![
                    entry("location", "model.onnx.data".into()),
                    entry("offset", data.len().to_string()),
                    entry("length", bytes.len().to_string()),
                ];
                data.extend(bytes);
            }
        });
        if flip {
            data[3] ^= 0x80;
        }
        std::fs::write(copy.path().join("model.onnx.data"), data).unwrap();
        copy
    };
    let (one, other) = (external(false), external(true));
    assert_same(&judged(one.path()), &judged(&folder()));
    let hash = |dir: &Path| OnnxClassifier::load(dir).unwrap().hash().to_owned();
    assert_ne!(hash(one.path()), hash(other.path()));
    std::fs::write(one.path().join("notes.onnx.data"), "other").unwrap();
    let before = hash(one.path());
    std::fs::write(one.path().join("notes.onnx.data"), "more").unwrap();
    assert_eq!(before, hash(one.path()), "nothing else counts");
    let other_labels = changed("config.json", "id2label", json!({"0": "a", "1": "b", "2": "c"}));
    assert_ne!(hash(other_labels.path()), hash(&folder()), "labels judge, too");

    let data = one.path().join("model.onnx.data");
    // As a Hugging Face cache holds it.
    let blob = tempfile::tempdir().unwrap();
    std::fs::rename(&data, blob.path().join("blob")).unwrap();
    std::os::unix::fs::symlink(blob.path().join("blob"), &data).unwrap();
    assert_same(&judged(one.path()), &judged(&folder()));
    std::fs::write(blob.path().join("blob"), [0; 9]).unwrap();
    let short = OnnxClassifier::load(one.path()).unwrap_err().to_string();
    assert!(short.contains("model.onnx.data: the file is cut short: it has 9 bytes"), "{short}");
    let outside = rewired(|graph| {
        graph.initializer[0].data_location = Some(1);
        graph.initializer[0].external_data =
            vec![StringStringEntryProto { key: "location".into(), value: "../secret".into() }];
    });
    let message = OnnxClassifier::load(outside.path()).unwrap_err().to_string();
    assert!(message.contains("\"../secret\", which is not in the model's folder"), "{message}");
}

/// As TensorFlow's exports have it, and with a second output before the one that classifies.
#[test]
fn inputs_and_outputs_are_found() {
    let last = rewired(|graph| {
        let name = graph.input[0].name.clone();
        let mut transpose = node("Transpose", "picture", &name);
        transpose.attribute.push(AttributeProto {
            name: "perm".into(),
            r#type: 7,
            ints: vec![0, 3, 1, 2],
            ..AttributeProto::default()
        });
        graph.node.insert(0, transpose);
        graph.input[0] = picture("picture", 1, [24, 24, 3]);
    });
    assert_same(&judged(last.path()), &judged(&folder()));
    let two = rewired(|graph| {
        let logits = graph.output[0].clone();
        let mut twice = node("Concat", &logits.name, "twice");
        twice.input.push(logits.name);
        twice.attribute.push(AttributeProto {
            name: "axis".into(),
            r#type: 2,
            i: 1,
            ..AttributeProto::default()
        });
        graph.node.push(twice);
        let features = ValueInfoProto { name: "twice".into(), ..ValueInfoProto::default() };
        graph.output.insert(0, features);
    });
    assert_same(&judged(two.path()), &judged(&folder()));
    let refusal = |dir: &Path| OnnxClassifier::load(dir).unwrap_err().to_string();
    let bytes = rewired(|graph| {
        let name = graph.input[0].name.clone();
        graph.input[0] = picture(&name, 2, [3, 24, 24]);
    });
    assert!(refusal(bytes.path()).contains("is not of f32 or f16"), "{}", refusal(bytes.path()));
    let sides = rewired(|graph| {
        let name = graph.input[0].name.clone();
        graph.input[0] = picture(&name, 1, [3, 32, 32]);
    });
    let message = refusal(sides.path());
    assert!(message.contains("[?, 3, 32, 32] takes no pictures of 24 x 24 pixels"), "{message}");
    let fewer = changed("config.json", "id2label", json!({"0": "a", "1": "b"}));
    assert!(refusal(fewer.path()).contains("2 labels in id2label; of its outputs, logits has 3"));
    let unknown = ending_in(&["FancyGelu", "Softmax"]);
    let message = refusal(unknown.path());
    assert!(message.contains("operations that are not known here: FancyGelu;"), "{message}");
}

/// An input of the batch's size and three sides.
fn picture(name: &str, element: i32, sides: [i64; 3]) -> ValueInfoProto {
    let side = |n: i64| tensor_shape_proto::Dimension {
        value: Some(dimension::Value::DimValue(n)),
        ..tensor_shape_proto::Dimension::default()
    };
    let batch = tensor_shape_proto::Dimension::default();
    let dim = [batch].into_iter().chain(sides.map(side)).collect();
    let shape = Some(TensorShapeProto { dim });
    let tensor = type_proto::Tensor { elem_type: element, shape };
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(tensor)),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}

#[test]
fn pictures_are_made_as_the_processor_makes_them() {
    let shorter = changed("preprocessor_config.json", "size", json!({"shortest_edge": 24}));
    assert_same(&judged(shorter.path()), &judged(&folder()));
    let classifier = OnnxClassifier::load(shorter.path()).unwrap();
    let wide = classifier.probabilities(&[9; 3 * 24 * 30], 30, 24).unwrap_err().to_string();
    assert!(wide.contains("30 x 24 pixels does not become one of 24 x 24"), "{wide}");

    let renamed = changed("config.json", "problem_type", Value::Null);
    let old = renamed.path().join("preprocessor_config.json");
    let section = json!({"image_processor": read(&old)});
    std::fs::remove_file(&old).unwrap();
    std::fs::write(renamed.path().join("processor_config.json"), section.to_string()).unwrap();
    assert_same(&judged(renamed.path()), &judged(&folder()));
}

#[test]
fn what_is_wrong_with_a_classifier_is_said() {
    let refusal = |dir: &Path| OnnxClassifier::load(dir).unwrap_err().to_string();
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("model.onnx: no such file"));
    let config = |field, value| refusal(changed("config.json", field, value).path());
    for labels in [json!({"1": "a"}), json!({"0": 1}), json!({}), json!(["a"]), Value::Null] {
        let message = config("id2label", labels);
        assert!(message.contains("supported: labels, numbered from 0 on"), "{message}");
    }
    assert!(config("problem_type", json!("regression")).contains("problem_type is \"regression\""));
    let settings = |field, value| refusal(changed("preprocessor_config.json", field, value).path());
    assert!(settings("resample", json!(6)).contains("resample is 6"));
    assert!(settings("rescale_factor", json!(1.0)).contains("rescale_factor is 1.0"));
    assert!(settings("size", Value::Null).contains("size is null; supported: height and width"));
    assert!(settings("rescale_offset", json!(true)).contains("unknown field rescale_offset"));
    let class = settings("image_processor_type", json!("LevitImageProcessor"));
    assert!(
        class.contains("LevitImageProcessor") && class.contains("ViTImageProcessor"),
        "{class}"
    );
    let broken = changed("config.json", "problem_type", Value::Null);
    std::fs::write(broken.path().join("model.onnx"), "no model").unwrap();
    assert!(refusal(broken.path()).contains("it cannot be run"));
}
