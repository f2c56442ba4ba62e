//! Every network against torch, diffusers and transformers (`goldens/networks.py` made the numbers), against
//! finite differences, and against itself in another batch.
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::path::{Path, PathBuf};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{IndexOp, Tensor};
use fairlead_models::layers::composed_of_candle_ops;
use fairlead_models::{
    AutoencoderKl, ClipModel, ClipTextModel, ClipTextModelWithProjection, Error, Judge, Result,
    Sd3Transformer, SiglipModel, T5EncoderModel, Tape, TextConditions, UNet2DConditionModel,
};

mod common;
use common::device;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/networks").join(name)
}

/// The tensors that torch computed for one model.
struct Golden(std::collections::HashMap<String, Tensor>);

impl Golden {
    fn of(name: &str) -> Self {
        let path = folder(name).join("golden.safetensors");
        Self(candle_core::safetensors::load(path, &device()).unwrap())
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.0[name]
    }

    fn ids(&self) -> Vec<Vec<u32>> {
        let ids = self.get("ids").to_vec2::<i64>().unwrap();
        ids.into_iter().map(|row| row.into_iter().map(|id| id as u32).collect()).collect()
    }

    fn timesteps(&self) -> Vec<f32> {
        self.get("timesteps").to_vec1().unwrap()
    }
}

fn numbers(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest number expected.
#[track_caller]
fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let (found, expected) = (numbers(found), numbers(expected));
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    let error = found.iter().zip(&expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(found.iter().all(|x| x.is_finite()), "{what}: not finite");
    println!("{what}: {:.1e}", error / largest);
    assert!(error <= tolerance * largest, "{what}: {:.2e} relative", error / largest);
}

/// A differentiable network as one function of one tensor.
trait Differentiable {
    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor>;
    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor>;
}

struct Decode(AutoencoderKl);

impl Differentiable for Decode {
    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.0.decode(x, tape)
    }
    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.0.decode_backward(dy, tape)
    }
}

struct Image(ClipModel);

impl Differentiable for Image {
    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.0.image_features(x, tape)
    }
    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.0.image_features_backward(dy, tape)
    }
}

struct SiglipImage(SiglipModel);

impl Differentiable for SiglipImage {
    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.0.image_features(x, tape)
    }
    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.0.image_features_backward(dy, tape)
    }
}

struct Denoise {
    unet: UNet2DConditionModel,
    timesteps: Vec<f32>,
    context: Tensor,
}

impl Denoise {
    fn of(name: &str, golden: &Golden) -> Self {
        Self {
            unet: UNet2DConditionModel::load(&folder(name), &device()).unwrap(),
            timesteps: golden.timesteps(),
            context: golden.get("context").clone(),
        }
    }
}

impl Differentiable for Denoise {
    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.unet.forward(x, &self.timesteps, &self.context, tape)
    }
    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.unet.backward(dy, tape)
    }
}

struct JointDenoise {
    transformer: Sd3Transformer,
    timesteps: Vec<f32>,
    states: Tensor,
    pooled: Tensor,
}

impl JointDenoise {
    /// The last text token stands for the `repeats` last ones of the golden.
    fn of(name: &str, golden: &Golden, repeats: usize) -> Self {
        let states = golden.get("context");
        let kept = states.dim(1).unwrap() + 1 - repeats;
        Self {
            transformer: Sd3Transformer::load(&folder(name), repeats, &device()).unwrap(),
            timesteps: golden.timesteps(),
            states: states.narrow(1, 0, kept).unwrap(),
            pooled: golden.get("pooled").clone(),
        }
    }
}

impl Differentiable for JointDenoise {
    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let text = TextConditions { states: &self.states, pooled: &self.pooled };
        self.transformer.forward(x, &self.timesteps, text, tape)
    }
    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.transformer.backward(dy, tape)
    }
}

/// Forward and gradient against torch, with our kernels and composed of candle's operations; then the
/// gradient against finite differences.
fn check(name: &str, golden: &Golden, network: &dyn Differentiable) {
    let (x, dy) = (golden.get("x"), golden.get("dy"));
    let run = || {
        let mut tape = Tape::recording();
        let y = network.forward(x, &mut tape).unwrap();
        let dx = network.backward(dy, &mut tape).unwrap();
        assert!(tape.is_empty(), "{name}: a backward pass takes everything off the tape");
        assert!(matches!(network.backward(dy, &mut tape), Err(Error::TapeEmpty)));
        (y, dx)
    };
    for (path, (y, dx)) in [("kernels", run()), ("composed", composed_of_candle_ops(run))] {
        assert_close(&format!("{name} forward, {path}"), &y, golden.get("y"), 1e-4);
        assert_close(&format!("{name} gradient, {path}"), &dx, golden.get("dx"), 1e-3);
    }
    let unrecorded = network.forward(x, &mut Tape::off()).unwrap();
    let recorded = network.forward(x, &mut Tape::recording()).unwrap();
    assert_eq!(numbers(&unrecorded), numbers(&recorded), "{name}: recording changes nothing");
    finite_difference(name, golden, network);
}

/// The slope of `sum(y dy)` along the gradient's own direction, where it is steepest and so measured best.
fn finite_difference(name: &str, golden: &Golden, network: &dyn Differentiable) {
    let (x, dy) = (golden.get("x"), golden.get("dy"));
    let mut tape = Tape::recording();
    network.forward(x, &mut tape).unwrap();
    let dx = network.backward(dy, &mut tape).unwrap();
    let length = numbers(&dx).iter().map(|d| f64::from(d * d)).sum::<f64>().sqrt();
    let direction = (&dx / length).unwrap();
    let value = |step: f64| {
        let moved = (x + (&direction * step).unwrap()).unwrap();
        let y = network.forward(&moved, &mut Tape::off()).unwrap();
        numbers(&y).iter().zip(numbers(dy)).map(|(y, d)| f64::from(*y) * f64::from(d)).sum::<f64>()
    };
    let step = 5e-3;
    // Fourth order, so that the step can be wide enough for f32.
    let slope = (8.0 * (value(step) - value(-step)) - (value(2.0 * step) - value(-2.0 * step)))
        / (12.0 * step);
    println!("{name} finite difference: {:.1e}", (slope / length - 1.0).abs());
    assert!((slope / length - 1.0).abs() < 5e-3, "{name}: slope {slope}, gradient {length}");
}

#[test]
fn vae_matches_diffusers() {
    for name in ["vae", "vae_shifted", "vae_plain"] {
        let golden = Golden::of(name);
        let vae = AutoencoderKl::load(&folder(name), &device()).unwrap();
        let latent = vae.encode_mean(golden.get("pixels")).unwrap();
        assert_close(&format!("{name} encode"), &latent, golden.get("latent"), 1e-4);
        check(name, &golden, &Decode(vae));
    }
}

/// Cancelled anywhere, a decoder ends before its next layer, forward and backward; a stop that never comes
/// changes no bit.
#[test]
fn vae_stops_between_any_two_layers() {
    let vae = AutoencoderKl::load(&folder("vae"), &device()).unwrap();
    let z = &Tensor::randn(0f32, 1.0, (1, 4, 4, 4), &device()).unwrap();
    // Counts how often it is asked, and says stop at the `most`-th time and ever after.
    let until = |tape: Tape, most: usize| {
        let asked = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&asked);
        (tape.stopped_by(move || counter.fetch_add(1, Ordering::Relaxed) + 1 >= most), asked)
    };
    let both = |tape: &mut Tape| {
        let pixels = vae.decode(z, tape)?;
        let gradient = vae.decode_backward(&pixels, tape)?;
        Ok::<_, Error>([numbers(&pixels), numbers(&gradient)])
    };
    let undisturbed = both(&mut Tape::recording()).unwrap();
    let (mut tape, asked) = until(Tape::recording(), usize::MAX);
    assert_eq!(both(&mut tape).unwrap(), undisturbed);
    let layers = asked.load(Ordering::Relaxed);
    assert!(layers > 40, "every layer asks: {layers}");
    for most in 1..=layers {
        let (mut tape, asked) = until(Tape::recording(), most);
        assert!(matches!(both(&mut tape), Err(Error::Stopped)), "at layer {most}");
        assert_eq!(asked.load(Ordering::Relaxed), most, "nothing follows");
    }
    let (mut tape, _) = until(Tape::off(), 3);
    assert!(matches!(vae.decode(z, &mut tape), Err(Error::Stopped)), "without a gradient in view");
}

#[test]
fn vae_config_says_how_much_smaller_a_latent_is() {
    let factor = |name| AutoencoderKl::load(&folder(name), &device()).unwrap().downsample_factor();
    assert_eq!([factor("vae_plain"), factor("vae"), factor("vae_shifted")], [1, 2, 4]);
}

#[test]
fn unet_matches_diffusers() {
    for name in ["unet", "unet_linear"] {
        let golden = Golden::of(name);
        check(name, &golden, &Denoise::of(name, &golden));
    }
}

/// One text token that counts seven times is seven equal tokens.
#[test]
fn mmdit_matches_diffusers() {
    for (name, repeats) in [("mmdit", 1), ("mmdit_dual", 1), ("mmdit_dual", 7)] {
        let golden = Golden::of(name);
        check(name, &golden, &JointDenoise::of(name, &golden, repeats));
    }
}

#[test]
fn clip_matches_transformers() {
    for name in ["clip", "clip_legacy"] {
        let golden = Golden::of(name);
        let clip = ClipModel::load(&folder(name), &device()).unwrap();
        let text = clip.text_features(&golden.ids()).unwrap();
        assert_close(&format!("{name} text"), &text, golden.get("text"), 1e-4);
        let scale = golden.get("logit_scale").to_scalar::<f32>().unwrap();
        assert!((clip.logit_scale() / scale - 1.0).abs() < 1e-6);
        assert_eq!(clip.preprocess().mean, [0.5, 0.45, 0.4]);
        check(name, &golden, &Image(clip));
    }
}

/// `goldens/openclip.py` made the numbers.
#[test]
fn open_clip_folders_match_open_clip() {
    for name in ["open_clip", "open_clip_quick"] {
        let golden = Golden::of(name);
        let clip = ClipModel::load(&folder(name), &device()).unwrap();
        let text = clip.text_features(&golden.ids()).unwrap();
        assert_close(&format!("{name} text"), &text, golden.get("text"), 1e-4);
        let scale = golden.get("logit_scale").to_scalar::<f32>().unwrap();
        assert!((clip.logit_scale() / scale - 1.0).abs() < 1e-6);
        assert_eq!(clip.preprocess().mean, [0.5, 0.45, 0.4]);
        check(name, &golden, &Image(clip));
    }
}

#[test]
fn siglip_matches_transformers() {
    for name in ["siglip", "siglip_rest"] {
        let golden = Golden::of(name);
        let siglip = SiglipModel::load(&folder(name), &device()).unwrap();
        let text = siglip.text_features(&golden.ids()).unwrap();
        assert_close(&format!("{name} text"), &text, golden.get("text"), 1e-4);
        let (scale, bias) = siglip.logit();
        let logit = Tensor::new(&[scale, bias], &device()).unwrap();
        assert_close(&format!("{name} logit"), &logit, golden.get("logit"), 1e-6);
        assert_eq!(siglip.preprocess().mean, [0.5; 3]);
        check(name, &golden, &SiglipImage(siglip));
    }
}

#[test]
fn projected_clip_text_matches_transformers() {
    let golden = Golden::of("clip_text_projected");
    let folder = folder("clip_text_projected");
    let model = ClipTextModelWithProjection::load(&folder, &device()).unwrap();
    assert_eq!(model.projection_dim(), 24);
    let run = || model.forward(&golden.ids()).unwrap();
    for (path, text) in [("kernels", run()), ("composed", composed_of_candle_ops(run))] {
        let close = |what: &str, found: &Tensor| {
            assert_close(&format!("{what}, {path}"), found, golden.get(what), 1e-4);
        };
        close("penultimate", &text.penultimate);
        close("embeds", &text.embeds);
    }
}

/// Both windows are longer than the distances T5 tells apart.
#[test]
fn the_t5_encoder_agrees_with_transformers() {
    for name in ["t5", "t5_relu"] {
        let golden = Golden::of(name);
        let model = T5EncoderModel::load(&folder(name), &device()).unwrap();
        assert_eq!(model.width(), 24);
        let y = model.forward(&golden.ids()).unwrap();
        assert_close(name, &y, golden.get("y"), 1e-5);
        let error = model.forward(&[vec![5, 64]]).unwrap_err().to_string();
        assert!(error.contains("token id 64; the vocabulary has 64"), "{error}");
    }
}

/// The text tower is differentiated with respect to its embeddings, which are no input.
#[test]
fn clip_text_matches_transformers() {
    for name in ["clip_text", "clip_text_gelu"] {
        let golden = Golden::of(name);
        let model = ClipTextModel::load(&folder(name), &device()).unwrap();
        let run = || {
            let mut tape = Tape::recording();
            let y = model.forward_on(&golden.ids(), &mut tape).unwrap();
            (y, model.backward(golden.get("dy"), &mut tape).unwrap())
        };
        for (path, (y, dx)) in [("kernels", run()), ("composed", composed_of_candle_ops(run))] {
            assert_close(&format!("{name} forward, {path}"), &y, golden.get("y"), 1e-4);
            assert_close(&format!("{name} gradient, {path}"), &dx, golden.get("dx"), 1e-3);
        }
    }
}

#[test]
fn judge_matches_torch() {
    let golden = Golden::of("judge");
    let judge = Judge::load(&folder("judge"), &device()).unwrap();
    assert_eq!(judge.labels(), ["cat", "dagger", "pill"]);
    assert_eq!(judge.thresholds(), [0.0, -0.5, 1.25]);
    let y = judge.logits(golden.get("x")).unwrap();
    assert_close("judge", &y, golden.get("y"), 1e-4);
    let second = judge.logits(&golden.get("x").i(1..2).unwrap()).unwrap();
    assert_eq!(numbers(&second), numbers(&y.i(1..2).unwrap()));
}

/// Every sample of a batch has the very bits it has alone, and in another place of the batch.
fn check_batches<N: Differentiable>(name: &str, network: impl Fn(&[usize]) -> N, golden: &Golden) {
    let run = |samples: &[usize]| {
        let pick = |t: &Tensor| {
            let rows: Vec<_> = samples.iter().map(|&i| t.i(i..i + 1).unwrap()).collect();
            Tensor::cat(&rows, 0).unwrap()
        };
        let (network, mut tape) = (network(samples), Tape::recording());
        let y = network.forward(&pick(golden.get("x")), &mut tape).unwrap();
        let dx = network.backward(&pick(golden.get("dy")), &mut tape).unwrap();
        let rows =
            |t: &Tensor| (0..samples.len()).map(|i| numbers(&t.i(i).unwrap())).collect::<Vec<_>>();
        rows(&y).into_iter().zip(rows(&dx)).collect::<Vec<_>>()
    };
    let alone = [run(&[0]).remove(0), run(&[1]).remove(0)];
    for samples in [&[0, 1][..], &[1, 0], &[1, 1, 0, 1, 0]] {
        for (result, &sample) in run(samples).iter().zip(samples) {
            assert!(*result == alone[sample], "{name}: sample {sample} in batch {samples:?}");
        }
    }
}

#[test]
fn a_sample_does_not_depend_on_its_batch() {
    let golden = Golden::of("vae");
    let vae = || AutoencoderKl::load(&folder("vae"), &device()).unwrap();
    check_batches("vae", |_| Decode(vae()), &golden);

    let golden = Golden::of("clip");
    let clip = || ClipModel::load(&folder("clip"), &device()).unwrap();
    check_batches("clip", |_| Image(clip()), &golden);

    let golden = Golden::of("siglip");
    let siglip = || SiglipModel::load(&folder("siglip"), &device()).unwrap();
    check_batches("siglip", |_| SiglipImage(siglip()), &golden);

    let golden = Golden::of("unet");
    let denoise = |samples: &[usize]| {
        let whole = Denoise::of("unet", &golden);
        let rows: Vec<_> = samples.iter().map(|&i| whole.context.i(i..i + 1).unwrap()).collect();
        Denoise {
            timesteps: samples.iter().map(|&i| whole.timesteps[i]).collect(),
            context: Tensor::cat(&rows, 0).unwrap(),
            unet: whole.unet,
        }
    };
    check_batches("unet", denoise, &golden);

    let golden = Golden::of("mmdit");
    let denoise = |samples: &[usize]| {
        let whole = JointDenoise::of("mmdit", &golden, 1);
        let pick = |t: &Tensor| {
            let rows: Vec<_> = samples.iter().map(|&i| t.i(i..i + 1).unwrap()).collect();
            Tensor::cat(&rows, 0).unwrap()
        };
        JointDenoise {
            timesteps: samples.iter().map(|&i| whole.timesteps[i]).collect(),
            states: pick(&whole.states),
            pooled: pick(&whole.pooled),
            transformer: whole.transformer,
        }
    };
    check_batches("mmdit", denoise, &golden);
}

#[test]
fn a_text_does_not_depend_on_its_batch() {
    let (text, clip) = (Golden::of("clip_text"), Golden::of("clip"));
    let model = ClipTextModel::load(&folder("clip_text"), &device()).unwrap();
    let towers = ClipModel::load(&folder("clip"), &device()).unwrap();
    let together = model.forward(&text.ids()).unwrap();
    for (i, window) in text.ids().into_iter().enumerate() {
        let alone = model.forward(&[window]).unwrap();
        assert_eq!(numbers(&alone.i(0).unwrap()), numbers(&together.i(i).unwrap()));
    }
    let together = towers.text_features(&clip.ids()).unwrap();
    for (i, window) in clip.ids().into_iter().enumerate() {
        let alone = towers.text_features(&[window]).unwrap();
        assert_eq!(numbers(&alone.i(0).unwrap()), numbers(&together.i(i).unwrap()));
    }
}

#[track_caller]
fn assert_refused<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("refused").to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
}

#[test]
fn inputs_that_do_not_fit_are_refused_with_the_shapes() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &device()).unwrap();
    let off = &mut Tape::off();
    let vae = AutoencoderKl::load(&folder("vae"), &device()).unwrap();
    assert_refused(vae.decode(&zeros(&[1, 3, 4, 4]), off), &["[b, 4, h, w]", "[1, 3, 4, 4]"]);
    assert_refused(vae.encode_mean(&zeros(&[1, 3, 5, 4])), &["multiples of 2", "[1, 3, 5, 4]"]);

    let unet = UNet2DConditionModel::load(&folder("unet"), &device()).unwrap();
    let (x, context) = (zeros(&[2, 4, 8, 8]), zeros(&[2, 5, 24]));
    assert_refused(unet.forward(&x, &[1.0], &context, off), &["1 and [2, 5, 24]", "[2, 4, 8, 8]"]);
    assert_refused(unet.forward(&x, &[1.0; 2], &zeros(&[2, 5, 25]), off), &["[b, n, 24]"]);
    assert_refused(
        unet.forward(&zeros(&[2, 3, 8, 8]), &[1.0; 2], &context, off),
        &["[b, 4, h, w]"],
    );

    let mmdit = Sd3Transformer::load(&folder("mmdit"), 1, &device()).unwrap();
    let (states, pooled) = (zeros(&[1, 5, 20]), zeros(&[1, 12]));
    let text = TextConditions { states: &states, pooled: &pooled };
    for shape in [[1, 4, 5, 4], [1, 4, 12, 4], [1, 3, 4, 4], [2, 4, 4, 4]] {
        let dims = format!("{shape:?}");
        let refused = mmdit.forward(&zeros(&shape), &[1.0], text, off);
        assert_refused(refused, &["multiples of 2 up to 10", &dims]);
    }

    let clip = ClipModel::load(&folder("clip"), &device()).unwrap();
    assert_refused(clip.image_features(&zeros(&[1, 3, 23, 24]), off), &["[b, 3, 24, 24]"]);
    assert_refused(clip.text_features(&[vec![62, 5, 7]]), &["window 0 has no end mark 63"]);

    let text = ClipTextModel::load(&folder("clip_text"), &device()).unwrap();
    assert_refused(text.forward(&[]), &["windows of one length from 1 to 11"]);
    assert_refused(text.forward(&[vec![1; 12]]), &["from 1 to 11", "[12]"]);
    assert_refused(text.forward(&[vec![1; 3], vec![1; 4]]), &["[3, 4]"]);
    assert_refused(text.forward(&[vec![1, 64]]), &["token id 64", "vocabulary of 64"]);

    let judge = Judge::load(&folder("judge"), &device()).unwrap();
    assert_refused(judge.logits(&zeros(&[1, 3, 12, 13])), &["[b, 3, 13, 13]"]);
}
