//! Every layer against torch (`goldens/layers.py`), against finite differences, against itself on other
//! batch sizes and thread counts, and the CPU kernels against the composition of candle's operations.
//!
//! "Relative" is `max |a - b| / max |b|` over the whole tensor, `b` being the reference; the divisor is at
//! least 1e-3, for gradients that are exactly zero.

#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use fairlead_models::layers::{
    Activation, Attention, Conv2d, Conv2dConfig, Filter, GroupNorm, LayerNorm, Linear, Padding,
    UpsampleNearest2x, add_scaled, composed_of_candle_ops, resize, resize_backward, scale_backward,
    scale_shift,
};
use fairlead_models::{Error, Tape};

mod common;
use common::device;

/// Forward against torch.
const FORWARD: f32 = 1e-4;
/// Input gradient against torch's autograd.
const GRADIENT: f32 = 1e-3;

/// A layer under test: several inputs, one output, and the gradient of each input.
struct Case {
    name: &'static str,
    inputs: Vec<Tensor>,
    y: Tensor,
    dy: Tensor,
    gradients: Vec<Tensor>,
    run: Run,
}

type Run = Box<dyn Fn(&[Tensor], &Tensor) -> (Tensor, Vec<Tensor>) + Sync>;

fn relative(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let max = |t: &Tensor| {
        t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
    };
    max(&(a - b).unwrap()) / max(b).max(1e-3)
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// A unary layer as a [`Run`].
macro_rules! unary {
    ($layer:expr) => {{
        let layer = $layer;
        Box::new(move |x: &[Tensor], dy: &Tensor| {
            let mut tape = Tape::recording();
            let y = layer.forward(&x[0], &mut tape).unwrap();
            let dx = layer.backward(dy, &mut tape).unwrap();
            assert!(tape.is_empty());
            (y, vec![dx])
        }) as Run
    }};
}

fn attention(d: usize, adjust: impl Fn(Attention) -> Attention) -> Run {
    let layer = adjust(Attention::new((d as f64).powf(-0.5)));
    Box::new(move |x: &[Tensor], dy: &Tensor| {
        let mut tape = Tape::recording();
        let y = layer.forward(&x[0], &x[1], &x[2], &mut tape).unwrap();
        let (dq, dk, dv) = layer.backward(dy, &mut tape).unwrap();
        assert!(tape.is_empty());
        (y, vec![dq, dk, dv])
    })
}

/// One row per sample: the rows as they are, or the first of them for a batch of another size.
fn per_sample(rows: &Tensor, samples: usize) -> Tensor {
    if rows.dim(0).unwrap() == samples {
        return rows.clone();
    }
    rows.narrow(0, 0, 1).unwrap().repeat((samples, 1)).unwrap()
}

fn scaling_and_shifting(factor: Tensor, shift: Tensor) -> Run {
    Box::new(move |x: &[Tensor], dy: &Tensor| {
        let (mut tape, b) = (Tape::recording(), dy.dim(0).unwrap());
        let (factor, shift) = (per_sample(&factor, b), per_sample(&shift, b));
        let y = scale_shift(&x[0], &factor, &shift, &mut tape).unwrap();
        let dx = scale_backward(dy, &mut tape).unwrap();
        assert!(tape.is_empty());
        (y, vec![dx])
    })
}

fn adding_scaled(factor: Tensor) -> Run {
    Box::new(move |x: &[Tensor], dy: &Tensor| {
        let mut tape = Tape::recording();
        let factor = per_sample(&factor, dy.dim(0).unwrap());
        let y = add_scaled(&x[0], &x[1], &factor, &mut tape).unwrap();
        let dx = scale_backward(dy, &mut tape).unwrap();
        assert!(tape.is_empty());
        (y, vec![dy.clone(), dx])
    })
}

fn resizing(filter: Filter, h: usize, w: usize) -> Run {
    Box::new(move |x: &[Tensor], dy: &Tensor| {
        let (_, _, h_in, w_in) = x[0].dims4().unwrap();
        (
            resize(&x[0], h, w, filter).unwrap(),
            vec![resize_backward(dy, h_in, w_in, filter).unwrap()],
        )
    })
}

/// Every case of the golden file.
fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/layers.safetensors");
    let mut golden = candle_core::safetensors::load(path, &device()).unwrap();
    let mut cases = Vec::new();
    conv_cases(&mut golden, &mut cases);
    other_cases(&mut golden, &mut cases);
    assert!(golden.is_empty(), "golden tensors that no test reads: {:?}", golden.keys());
    cases
}

type Golden = HashMap<String, Tensor>;

fn case(golden: &mut Golden, name: &'static str, inputs: &[&str], run: Run) -> Case {
    let mut take = |key: &str| golden.remove(&format!("{name}.{key}")).unwrap();
    Case {
        name,
        inputs: inputs.iter().map(|key| take(key)).collect(),
        y: take("y"),
        dy: take("dy"),
        gradients: inputs.iter().map(|key| take(&format!("d{key}"))).collect(),
        run,
    }
}

fn weights(golden: &mut Golden, name: &str) -> (Tensor, Option<Tensor>) {
    (golden.remove(&format!("{name}.weight")).unwrap(), golden.remove(&format!("{name}.bias")))
}

fn conv_cases(golden: &mut Golden, cases: &mut Vec<Case>) {
    let down = Conv2dConfig { stride: 2, padding: Padding::Symmetric(1) };
    let trailing = Conv2dConfig { stride: 2, padding: Padding::BottomRight(1) };
    for (name, config) in [
        ("conv3_small", Conv2dConfig::SAME_3X3),
        ("conv3_even", Conv2dConfig::SAME_3X3),
        ("conv3_odd", Conv2dConfig::SAME_3X3),
        ("conv3_pixel", Conv2dConfig::SAME_3X3),
        ("conv3_column", Conv2dConfig::SAME_3X3),
        ("conv3_plain", Conv2dConfig::SAME_3X3),
        ("conv1_small", Conv2dConfig::POINTWISE),
        ("conv1_odd", Conv2dConfig::POINTWISE),
        ("down_even", down),
        ("down_odd", down),
        ("down_trailing_even", trailing),
        ("down_trailing_odd", trailing),
        ("patch4", Conv2dConfig::patches(4)),
        ("patch5_rest", Conv2dConfig::patches(5)),
    ] {
        let (weight, bias) = weights(golden, name);
        let run = unary!(Conv2d::new(weight, bias, config).unwrap());
        cases.push(case(golden, name, &["x"], run));
    }
}

fn other_cases(golden: &mut Golden, cases: &mut Vec<Case>) {
    for name in ["linear_tokens", "linear_rows", "linear_one"] {
        let (weight, bias) = weights(golden, name);
        cases.push(case(golden, name, &["x"], unary!(Linear::new(weight, bias).unwrap())));
    }
    for (name, groups, silu) in [
        ("group_norm", 3, false),
        ("group_norm_silu", 32, true),
        ("group_norm_pixel", 2, false),
        ("group_norm_silu_tokens", 1, true),
    ] {
        let (weight, bias) = weights(golden, name);
        let layer = GroupNorm::new(weight, bias.unwrap(), groups, 1e-6).unwrap();
        let layer = if silu { layer.with_silu() } else { layer };
        cases.push(case(golden, name, &["x"], unary!(layer)));
    }
    for name in ["layer_norm_tokens", "layer_norm_odd"] {
        let (weight, bias) = weights(golden, name);
        let layer = LayerNorm::new(weight, bias.unwrap(), 1e-5).unwrap();
        cases.push(case(golden, name, &["x"], unary!(layer)));
    }
    for (name, causal, d) in [
        ("attention_small", false, 8),
        ("attention_cross", false, 40),
        ("attention_causal", true, 5),
        ("attention_long", false, 12),
        ("attention_causal_long", true, 16),
        ("attention_one", false, 3),
    ] {
        let run = attention(d, |layer| if causal { layer.causal() } else { layer });
        cases.push(case(golden, name, &["q", "k", "v"], run));
    }
    for (name, times) in [("attention_repeating", 6), ("attention_repeating_long", 256)] {
        let run = attention(8, |layer| layer.repeating_last(times));
        cases.push(case(golden, name, &["q", "k", "v"], run));
    }
    for name in ["rms_norm_heads", "rms_norm_odd"] {
        let (weight, _) = weights(golden, name);
        cases.push(case(golden, name, &["x"], unary!(LayerNorm::rms(weight, 1e-6).unwrap())));
    }
    for name in ["scale_shift_tokens", "scale_shift_odd"] {
        let (factor, shift) = weights(golden, name);
        cases.push(case(golden, name, &["x"], scaling_and_shifting(factor, shift.unwrap())));
    }
    for name in ["add_scaled_tokens", "add_scaled_odd"] {
        let (factor, _) = weights(golden, name);
        cases.push(case(golden, name, &["base", "x"], adding_scaled(factor)));
    }
    for (name, kind) in [
        ("gelu_erf", Activation::GeluErf),
        ("gelu_tanh", Activation::GeluTanh),
        ("gelu_quick", Activation::GeluQuick),
        ("silu", Activation::Silu),
    ] {
        cases.push(case(golden, name, &["x"], unary!(kind)));
    }
    cases.push(case(golden, "upsample", &["x"], unary!(UpsampleNearest2x)));
    for (name, filter, h, w) in [
        ("resize_bicubic_down", Filter::BicubicAntialias, 24, 10),
        ("resize_bicubic_up", Filter::BicubicAntialias, 21, 17),
        ("resize_bicubic_mixed", Filter::BicubicAntialias, 7, 20),
        ("resize_bicubic_pixel", Filter::BicubicAntialias, 3, 2),
        ("resize_bicubic_same", Filter::BicubicAntialias, 6, 5),
        ("resize_bilinear_down", Filter::BilinearAntialias, 24, 10),
        ("resize_bilinear_up", Filter::BilinearAntialias, 21, 17),
        ("resize_bilinear_mixed", Filter::BilinearAntialias, 7, 20),
        ("resize_bilinear_pixel", Filter::BilinearAntialias, 3, 2),
        ("resize_bilinear_same", Filter::BilinearAntialias, 6, 5),
    ] {
        cases.push(case(golden, name, &["x"], resizing(filter, h, w)));
    }
}

fn compare_with_torch(case: &Case) {
    let (y, gradients) = (case.run)(&case.inputs, &case.dy);
    let forward = relative(&y, &case.y);
    assert!(forward <= FORWARD, "{}: forward {forward:e}", case.name);
    for (i, (a, b)) in gradients.iter().zip(&case.gradients).enumerate() {
        let gradient = relative(a, b);
        assert!(gradient <= GRADIENT, "{}: gradient {i} {gradient:e}", case.name);
    }
}

#[test]
fn kernels_agree_with_torch() {
    cases().iter().for_each(compare_with_torch);
}

#[test]
fn composed_ops_agree_with_torch() {
    composed_of_candle_ops(|| cases().iter().for_each(compare_with_torch));
}

/// `sum(dy y(x + h v)) - sum(dy y(x - h v))` over `2 h` is `sum(dx v)`, along a direction that mixes the
/// gradient itself (so that there is something to measure) and noise.
#[test]
fn gradients_agree_with_finite_differences() {
    for case in cases() {
        let loss = |inputs: &[Tensor]| {
            let (y, _) = (case.run)(inputs, &case.dy);
            dot(&y, &case.dy)
        };
        let (_, gradients) = (case.run)(&case.inputs, &case.dy);
        for (i, gradient) in gradients.iter().enumerate() {
            let v = direction(gradient);
            let h = 1e-2f64;
            let moved = |step: f64| {
                let mut inputs = case.inputs.clone();
                inputs[i] = (&inputs[i] + (&v * step).unwrap()).unwrap();
                loss(&inputs)
            };
            let measured = (moved(h) - moved(-h)) / (2.0 * h);
            let told = dot(gradient, &v);
            let error = (measured - told).abs() / told.abs().max(1e-3);
            assert!(error <= 2e-3, "{}: input {i}: {measured} measured, {told} told", case.name);
        }
    }
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat(a).iter().zip(flat(b)).map(|(a, b)| f64::from(*a) * f64::from(b)).sum()
}

fn direction(gradient: &Tensor) -> Tensor {
    let noise = Tensor::randn(0f32, 1f32, gradient.dims(), &device()).unwrap();
    let unit = |t: &Tensor| (t / dot(t, t).sqrt().max(1e-12)).unwrap();
    (unit(gradient) + (unit(&noise) * 0.5).unwrap()).unwrap()
}

/// Samples of a batch do not see each other: a batch of three is, bit by bit, three batches of one.
#[test]
fn batch_size_does_not_matter() {
    for case in cases() {
        if case.inputs[0].rank() < 2 {
            continue;
        }
        let three = |t: &Tensor| {
            let first = t.narrow(0, 0, 1).unwrap();
            Tensor::cat(&[&(&first * 0.5).unwrap(), &first, &(&first * -2.0).unwrap()], 0).unwrap()
        };
        let (inputs, dy): (Vec<_>, _) = (case.inputs.iter().map(three).collect(), three(&case.dy));
        let (y, gradients) = (case.run)(&inputs, &dy);
        for i in 0..3 {
            let one = |t: &Tensor| t.narrow(0, i, 1).unwrap().contiguous().unwrap();
            let (y1, gradients1) =
                (case.run)(&inputs.iter().map(one).collect::<Vec<_>>(), &one(&dy));
            assert!(bits(&one(&y)) == bits(&y1), "{}: sample {i}", case.name);
            for (all, alone) in gradients.iter().zip(&gradients1) {
                assert!(bits(&one(all)) == bits(alone), "{}: gradient of sample {i}", case.name);
            }
        }
    }
}

/// Numbers from -1 to 1 of a fixed sequence.
fn noise(shape: &[usize], seed: u32) -> Tensor {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = std::iter::repeat_with(next).take(shape.iter().product()).collect();
    Tensor::from_vec(values, shape, &device()).unwrap()
}

/// Name, shapes of input and output, number of inputs, and the layer.
type Larger = (&'static str, Vec<usize>, Vec<usize>, usize, Run);

/// Shapes that take the other ways through the kernels: several blocks of tiles in a row, Winograd weights
/// that are too large to keep, several rectangles of a product, several blocks of keys.
fn larger_cases() -> Vec<Larger> {
    let conv = |[c_out, c_in, k]: [usize; 3], config| {
        let weight =
            (noise(&[c_out, c_in, k, k], 1) / (c_in as f64 * (k * k) as f64).sqrt()).unwrap();
        unary!(Conv2d::new(weight, Some(noise(&[c_out], 2)), config).unwrap())
    };
    let down = Conv2dConfig { stride: 2, padding: Padding::Symmetric(1) };
    let same = Conv2dConfig::SAME_3X3;
    let linear =
        Linear::new((noise(&[450, 70], 3) * 0.2).unwrap(), Some(noise(&[450], 4))).unwrap();
    let norm = GroupNorm::new(noise(&[8], 5), noise(&[8], 6), 4, 1e-6).unwrap().with_silu();
    vec![
        ("conv, wide rows", vec![2, 5, 9, 70], vec![2, 7, 9, 70], 1, conv([7, 5, 3], same)),
        (
            "conv, rows of 16 tiles",
            vec![2, 16, 6, 64],
            vec![2, 8, 6, 64],
            1,
            conv([8, 16, 3], same),
        ),
        ("conv, many tiles", vec![3, 3, 33, 65], vec![3, 4, 33, 65], 1, conv([4, 3, 3], same)),
        (
            "conv, weights made",
            vec![2, 360, 9, 6],
            vec![2, 344, 9, 6],
            1,
            conv([344, 360, 3], same),
        ),
        (
            "conv, 1 x 1",
            vec![2, 40, 20, 21],
            vec![2, 70, 20, 21],
            1,
            conv([70, 40, 1], Conv2dConfig::POINTWISE),
        ),
        ("conv, down", vec![2, 20, 33, 30], vec![2, 24, 17, 15], 1, conv([24, 20, 3], down)),
        ("linear", vec![3, 37, 70], vec![3, 37, 450], 1, unary!(linear)),
        ("group norm", vec![2, 8, 70, 81], vec![2, 8, 70, 81], 1, unary!(norm)),
        ("layer norm", vec![2, 200, 40], vec![2, 200, 40], 1, {
            unary!(LayerNorm::new(noise(&[40], 7), noise(&[40], 8), 1e-5).unwrap())
        }),
        ("attention", vec![2, 2, 300, 24], vec![2, 2, 300, 24], 3, attention(24, |layer| layer)),
        (
            "causal attention",
            vec![1, 2, 530, 20],
            vec![1, 2, 530, 20],
            3,
            attention(20, Attention::causal),
        ),
        ("upsample", vec![2, 3, 70, 90], vec![2, 3, 140, 180], 1, unary!(UpsampleNearest2x)),
        ("silu", vec![2, 3, 70, 90], vec![2, 3, 70, 90], 1, unary!(Activation::Silu)),
    ]
}

#[test]
fn kernels_agree_with_composed_ops_and_with_themselves() {
    for (name, shape, out, inputs, run) in larger_cases() {
        let x: Vec<Tensor> = (0..inputs).map(|i| noise(&shape, 10 + i as u32)).collect();
        let dy = noise(&out, 20);
        let (y, gradients) = composed_of_candle_ops(|| run(&x, &dy));
        let (y_kernel, gradients_kernel) = run(&x, &dy);
        let forward = relative(&y_kernel, &y);
        assert!(forward <= FORWARD, "{name}: forward {forward:e}");
        for (a, b) in gradients_kernel.iter().zip(&gradients) {
            let gradient = relative(a, b);
            assert!(gradient <= GRADIENT, "{name}: gradient {gradient:e}");
        }
        let last = shape[0] - 1;
        let alone = |t: &Tensor| t.narrow(0, last, 1).unwrap().contiguous().unwrap();
        let (y1, gradients1) = run(&x.iter().map(alone).collect::<Vec<_>>(), &alone(&dy));
        assert!(bits(&alone(&y_kernel)) == bits(&y1), "{name}: the last sample alone");
        for (all, one) in gradients_kernel.iter().zip(&gradients1) {
            assert!(bits(&alone(all)) == bits(one), "{name}: gradient of the last sample alone");
        }
    }
}

/// One thread, two and three give the same bits, also where the work is cut by their number.
#[test]
fn thread_count_does_not_matter() {
    let pools = [1, 2, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    let same = |name: &str, run: &(dyn Fn() -> (Tensor, Vec<Tensor>) + Sync)| {
        let [(y1, dx1), others @ ..] = pools.each_ref().map(|pool| pool.install(run));
        for (y, dx) in &others {
            assert!(bits(&y1) == bits(y), "{name}");
            assert!(dx1.iter().zip(dx).all(|(a, b)| bits(a) == bits(b)), "{name}: gradient");
        }
    };
    for case in cases() {
        same(case.name, &|| (case.run)(&case.inputs, &case.dy));
    }
    for (name, shape, out, inputs, run) in larger_cases() {
        let x: Vec<Tensor> = (0..inputs).map(|i| noise(&shape, 10 + i as u32)).collect();
        let dy = noise(&out, 20);
        same(name, &|| run(&x, &dy));
    }
}

/// What does not fit is refused with the layer's name and both shapes, before any arithmetic.
#[test]
fn wrong_inputs_are_named() {
    let linear = Linear::new(noise(&[3, 4], 1), None).unwrap();
    let conv = Conv2d::new(noise(&[2, 3, 3, 3], 1), None, Conv2dConfig::SAME_3X3).unwrap();
    let attention = Attention::new(1.0).causal();
    let off = &mut Tape::off();
    for (result, words) in [
        (linear.forward(&noise(&[2, 5], 1), off), ["Linear::forward", "[.., 4]", "[2, 5]"]),
        (
            linear.forward(&noise(&[2, 4], 1).to_dtype(DType::F16).unwrap(), off),
            ["Linear::forward", "f32", "F16"],
        ),
        (
            conv.forward(&noise(&[1, 4, 5, 5], 1), off),
            ["Conv2d::forward", "3 channels", "[1, 4, 5, 5]"],
        ),
        (
            conv.backward(&noise(&[1, 3, 5, 5], 1), off),
            ["Conv2d::backward", "[b, 2, 5, 5]", "[1, 3, 5, 5]"],
        ),
        (
            attention.forward(
                &noise(&[1, 1, 4, 2], 1),
                &noise(&[1, 1, 3, 2], 1),
                &noise(&[1, 1, 3, 2], 1),
                off,
            ),
            ["Attention::forward", "[1, 1, 4, 2]", "[1, 1, 3, 2]"],
        ),
        (
            UpsampleNearest2x.backward(&noise(&[1, 1, 3, 2], 1), off),
            ["UpsampleNearest2x::backward", "even", "3 x 2"],
        ),
        (
            resize(&noise(&[1, 1, 3, 2], 1), 0, 2, Filter::BicubicAntialias),
            ["resize", "at least 1", "0"],
        ),
    ] {
        let text = result.unwrap_err().to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text:?} lacks one of {words:?}");
    }
    assert!(Conv2d::new(noise(&[2, 3, 3, 2], 1), None, Conv2dConfig::SAME_3X3).is_err());
    assert!(Linear::new(noise(&[3, 4], 1), Some(noise(&[4], 1))).is_err());
    assert!(GroupNorm::new(noise(&[6], 1), noise(&[6], 1), 4, 1e-6).is_err());
    let nothing_saved = Activation::Silu.backward(&noise(&[2], 1), &mut Tape::recording());
    assert!(matches!(nothing_saved, Err(Error::TapeEmpty)));
}

/// Whatever the filter, the backward pass is the transpose of the forward pass: `<A x, y> = <x, A'
/// y>`.
#[test]
fn every_filter_has_a_gradient() {
    let dot = |a: &Tensor, b: &Tensor| {
        let product = (a * b).unwrap().sum_all().unwrap();
        product.to_scalar::<f32>().unwrap()
    };
    for number in 0..6 {
        let filter = Filter::from_pillow(number).unwrap();
        for (from, to) in [([9, 6], [4, 13]), ([5, 7], [11, 2]), ([3, 3], [3, 3])] {
            let (x, y) = (noise(&[2, 3, from[0], from[1]], 1), noise(&[2, 3, to[0], to[1]], 2));
            let forward = dot(&resize(&x, to[0], to[1], filter).unwrap(), &y);
            let backward = dot(&x, &resize_backward(&y, from[0], from[1], filter).unwrap());
            let error = (forward - backward).abs();
            assert!(error < 1e-4, "{filter:?} {from:?} {to:?}: {forward} {backward}");
        }
    }
    assert_eq!(Filter::from_pillow(6), None);
}

/// On a GPU candle counts the columns of a convolution in 32 bits: 1,365 x 1,365 pixels of 256
/// channels are the most, beyond which pixels would be whatever lay in memory.
#[test]
fn an_image_too_large_for_the_device_is_refused_before_it_is_computed() {
    let conv = Conv2d::new(noise(&[2, 256, 3, 3], 1), None, Conv2dConfig::SAME_3X3).unwrap();
    // One number that stands for all pixels: nothing of this size is ever allocated.
    let pixels = |side: usize| {
        Tensor::zeros((1, 1, 1, 1), DType::F32, &device())
            .unwrap()
            .broadcast_as((1, 256, side, side))
    };
    let off = &mut Tape::off();
    let forward = |x: &Tensor, tape: &mut Tape| composed_of_candle_ops(|| conv.forward(x, tape));
    let message = forward(&pixels(1366).unwrap(), off).unwrap_err().to_string();
    assert!(
        message.contains("1366 x 1366 pixels of 256 channels make 4299162624 columns"),
        "{message}"
    );
    assert!(message.contains("ask for a smaller image"), "{message}");
    let narrow = Conv2d::new(noise(&[256, 2, 3, 3], 1), None, Conv2dConfig::SAME_3X3).unwrap();
    let message = composed_of_candle_ops(|| narrow.backward(&pixels(1366).unwrap(), off));
    assert!(message.unwrap_err().to_string().contains("ask for a smaller image"));
}

/// A number that is not finite must come out as one, so that the run-time can refuse the image.
#[test]
fn not_a_number_is_never_hidden() {
    let broken = |shape: &[usize]| (noise(shape, 1) * f64::NAN).unwrap();
    let conv = Conv2d::new(noise(&[2, 3, 3, 3], 1), None, Conv2dConfig::SAME_3X3).unwrap();
    let norm = GroupNorm::new(noise(&[4], 1), noise(&[4], 1), 2, 1e-6).unwrap().with_silu();
    let off = &mut Tape::off();
    let (q, v) = (broken(&[1, 1, 5, 4]), noise(&[1, 1, 5, 4], 1));
    for y in [
        conv.forward(&broken(&[1, 3, 6, 6]), off),
        norm.forward(&broken(&[1, 4, 3]), off),
        Attention::new(1.0).forward(&q, &v, &v, off),
        Activation::GeluErf.forward(&broken(&[20]), off),
        Activation::GeluTanh.forward(&broken(&[20]), off),
        Activation::GeluQuick.forward(&broken(&[20]), off),
        Activation::Silu.forward(&broken(&[20]), off),
        resize(&broken(&[1, 1, 4, 4]), 3, 3, Filter::BicubicAntialias),
    ] {
        let y = y.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(y.iter().all(|y| y.is_nan()), "{y:?}");
    }
}
