//! The contrastive scorer on the project's own CLIP and SigLIP, from their folders to the wire.

use std::path::PathBuf;

use fairlead_proto::v1::{AddConceptsRequest, CheckRequest};

use super::*;

/// The embedded energies.
const MODELS: [&str; 2] = ["emojiland-clip", "emojiland-siglip"];

fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets")
}

/// Emojiland's node with thresholds that open every gate: the energy is then smooth everywhere.
async fn emojiland(model: &str) -> (TempDir, TestNode) {
    let folder = tempfile::tempdir().expect("a folder");
    for pack in fs::read_dir(assets().join("concepts")).expect("packs") {
        let pack = pack.expect("a pack");
        let text = fs::read_to_string(pack.path()).expect("concepts");
        let text = text.replace("[[concept]]", "[[concept]]\nfallback_threshold = -2.2");
        fs::write(folder.path().join(pack.file_name()), text).expect("written");
    }
    let concepts = vec![folder.path().to_owned()];
    let options = EnergyOptions { concepts, ..EnergyOptions::new(assets().join(model)) };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mut node =
        TestNode::attach(listener, |listener, shutdown| crate::run(listener, options, shutdown));
    node.until("fairlead.concept.kitchen-knife", ServingStatus::Serving).await;
    (folder, node)
}

/// A dark, slanted bar on a light ground: something, though no concept.
fn picture(shift: f32) -> Vec<f32> {
    let at = |channel: usize, y: usize, x: usize| {
        let distance = (x as f32 - 0.7 * y as f32 - 4.0 - shift).abs();
        let bar = 1.0 / (1.0 + (distance - 4.0).exp());
        [0.85, 0.8, 0.9][channel] - bar * [0.6, 0.5, 0.3][channel]
    };
    (0..3)
        .flat_map(|c| (0..32).flat_map(move |y| (0..32).map(move |x| (c, y, x))))
        .map(|(c, y, x)| at(c, y, x))
        .collect()
}

fn request(refs: &[ConceptRef], images: &[Vec<f32>], datatype: Datatype) -> EvaluateRequest {
    let shape = [images.len(), 3, 32, 32];
    let sample =
        |(seed, _)| SampleContext { time: 0.8, crop_seed: seed as u64, ..Default::default() };
    EvaluateRequest {
        concepts: refs.to_vec(),
        calibration: Some(key(20)),
        allow_calibration_fallback: true,
        pixels: Some(tensor::encode("pixels", &shape, &images.concat(), datatype)),
        samples: images.iter().enumerate().map(sample).collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn twenty_concepts_in_six_groups_are_served_from_the_model_folder() {
    for model in MODELS {
        serves_twenty_concepts(model).await;
    }
}

async fn serves_twenty_concepts(model: &str) {
    let (_folder, mut node) = emojiland(model).await;
    let info = node.describe().await;
    assert_eq!((info.kind.as_str(), info.model_name.as_str()), ("contrastive", model));
    assert_eq!(info.concepts.len(), 20);
    let mut groups = info.concepts.iter().map(|c| c.group.as_str()).collect::<Vec<_>>();
    groups.dedup();
    assert_eq!(groups, ["alcohol", "death", "drugs", "gambling", "tobacco", "weapons"]);
    let input = info.input.expect("an input");
    assert_eq!((input.height, input.width), (32, 32));
    let energies = info.concepts.iter().filter_map(|c| c.concept.as_ref());
    assert!(energies.into_iter().all(|concept| concept.energy == model));
}

#[tokio::test]
async fn a_concept_that_was_added_answers_as_one_that_was_there() {
    let (folder, mut whole) = emojiland(MODELS[0]).await;
    let packs = [folder.path().join("weapons.toml"), folder.path().join("drugs.toml")];
    let start = async |pack: &PathBuf| {
        let concepts = vec![pack.clone()];
        let options = EnergyOptions { concepts, ..EnergyOptions::new(assets().join(MODELS[0])) };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let run = |listener, shutdown| crate::run(listener, options, shutdown);
        let mut node = TestNode::attach(listener, run);
        node.until("", ServingStatus::Serving).await;
        node
    };
    let mut node = start(&packs[0]).await;
    let set = crate::ConceptSet::load(&packs[1..]).expect("a pack");
    let adding = AddConceptsRequest { concepts: set.definitions(), allow_uncalibrated: true };
    node.client.add_concepts(adding).await.expect("added");
    let refs = node.refs().await;
    let asked = request(&refs, &[picture(0.0)], Datatype::F32);
    let answer = node.evaluate(asked.clone()).await.expect("evaluated");
    let expected = whole.evaluate(asked).await.expect("the same versions are served");
    assert_eq!(answer.samples, expected.samples);
    // Not shown: it would fill the screen.
    assert!(answer.gradient == expected.gradient, "the gradients differ");
}

#[tokio::test]
async fn the_gradient_of_twenty_concepts_agrees_with_finite_differences_on_pixels() {
    for model in MODELS {
        gradient_agrees(model).await;
    }
}

async fn gradient_agrees(model: &str) {
    let (_folder, mut node) = emojiland(model).await;
    let refs = node.refs().await;
    let image = picture(0.0);
    let answer = node.evaluate(request(&refs, std::slice::from_ref(&image), Datatype::F32)).await;
    let answer = answer.expect("evaluated");
    assert!(answer.samples[0].scores.iter().all(|score| score.open));
    let (_, gradient) = tensor::decode(&answer.gradient.expect("a gradient")).expect("sound");
    let mut random = SplitMix64::new(9);
    for _ in 0..3 {
        let direction = gradient.iter().map(|g| g.signum() * random.unit()).collect::<Vec<_>>();
        let mut energies = [0.0; 2];
        for (energy, step) in energies.iter_mut().zip([2e-3, -2e-3]) {
            let moved = image.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
            let answer = node.evaluate(request(&refs, &[moved], Datatype::F32)).await;
            *energy = f64::from(answer.expect("evaluated").samples[0].energy);
        }
        let numeric = (energies[0] - energies[1]) / 4e-3;
        let analytic = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum::<f64>();
        assert!((numeric - analytic).abs() < 0.02 * analytic.abs(), "{numeric} {analytic}");
    }
}

#[tokio::test]
async fn an_image_scores_the_same_in_any_batch_and_f16_is_near() {
    let (_folder, mut node) = emojiland(MODELS[0]).await;
    let refs = node.refs().await;
    let images = [picture(0.0), picture(5.0), picture(9.0)];
    let mut all = request(&refs, &images, Datatype::F32);
    let together = node.evaluate(all.clone()).await.expect("evaluated");
    let (_, gradient) =
        tensor::decode(together.gradient.as_ref().expect("a gradient")).expect("sound");
    let mut alone = request(&refs, &images[2..], Datatype::F32);
    alone.samples = all.samples[2..].to_vec();
    let alone = node.evaluate(alone).await.expect("evaluated");
    assert_eq!(alone.samples[0], together.samples[2]);
    let (_, own) = tensor::decode(&alone.gradient.expect("a gradient")).expect("sound");
    assert_eq!(own, gradient[2 * own.len()..]);

    all.pixels = request(&refs, &images, Datatype::F16).pixels;
    let rounded = node.evaluate(all).await.expect("evaluated");
    for (a, b) in rounded.samples.iter().zip(&together.samples) {
        let pairs = a.scores.iter().zip(&b.scores);
        assert!(pairs.into_iter().all(|(a, b)| (a.score - b.score).abs() < 0.01));
    }
}

#[tokio::test]
async fn a_check_agrees_with_an_evaluation_of_the_same_pixels() {
    let (_folder, mut node) = emojiland(MODELS[0]).await;
    let refs = node.refs().await;
    // Every pixel a whole number of 255ths, so that the PNG loses nothing.
    let image = picture(3.0).iter().map(|v| (v * 255.0).round() / 255.0).collect::<Vec<_>>();
    let evaluated =
        node.evaluate(request(&refs, std::slice::from_ref(&image), Datatype::F32)).await;
    let check = CheckRequest {
        concepts: refs,
        calibration: Some(key(20)),
        allow_calibration_fallback: true,
        png: super::calls::png(&image, 32),
        ..Default::default()
    };
    let checked = node.client.check(check).await.expect("checked").into_inner();
    let evaluated = &evaluated.expect("evaluated").samples[0].scores;
    for (a, b) in checked.scores.iter().zip(evaluated) {
        assert!((a.score - b.score).abs() < 1e-5, "{a:?} {b:?}");
    }
}
