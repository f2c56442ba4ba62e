//! A generator and an energy that are plain formulas.
//!
//! The generator's latents are `[3, h / 4, w / 4]`; its data are two Gaussians, a red picture and a
//! cyan one; its denoiser is exact but for a small shift by the prompt; its decoder is
//! `tanh(0.8 x)`, enlarged four times. The energy's concepts are the colours' means.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use candle_core::{Device, Tensor};
use fairlead_common::probe::Probe;
use fairlead_models::Tape;
use fairlead_proto::v1::{
    ConceptRef, ConceptScore, InputSpec, ModelInfo, SampleContext, SampleEvaluation,
};
use fairlead_worker::{
    Error, NodeFailure, Result,
    energy::{Answer, Candidate, Energy, Render, Sample, Sources, Terms, Verdict},
    generator::{Context, EncodedText, Generator},
    sampler::{self, Sampler},
    turn::Turn,
};

/// Distance of each of the two Gaussians from the origin.
const DISTANCE: f32 = 4.0;

/// Tokens in one chunk of a prompt, marks included; a token is a byte.
const WINDOW: usize = 12;

/// What the toy generator gets wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The denoiser answers NaN.
    Denoiser,
    /// The denoiser's device has failed.
    Device,
    /// The decoder answers NaN at the finished image only.
    FinalDecoder,
    /// The decoder's gradient is NaN.
    NanGradient,
    /// The decoder's gradient is zero.
    ZeroGradient,
}

/// A generator made of formulas.
pub(crate) struct ToyGenerator {
    info: ModelInfo,
    sampler: Box<dyn Sampler>,
    pub(crate) fault: Option<Fault>,
    /// Each denoiser call takes one permit, if set.
    pub(crate) permits: Option<Mutex<std::sync::mpsc::Receiver<()>>>,
}

impl ToyGenerator {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let text = r#"{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear",
            "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": false, "steps_offset": 1,
            "set_alpha_to_one": false}"#;
        std::fs::write(dir.path().join("scheduler_config.json"), text).expect("it is written");
        let chosen = sampler::from_folder(dir.path()).expect("it is supported");
        let info = ModelInfo {
            name: "toy".into(),
            hash: "0123456789abcdef".into(),
            family: "toy".into(),
            sampler: chosen.sampler.name().into(),
            default_width: 16,
            default_height: 16,
            granularity: 4,
            max_side: 64,
            default_steps: 20,
            default_guidance_scale: 1.5,
            prompt_tokens: WINDOW as u32,
            train_timesteps: chosen.sampler.train_timesteps(),
            max_steps: 0,
            ..Default::default()
        };
        Self { info, sampler: chosen.sampler, fault: None, permits: None }
    }

    pub(crate) fn with_fault(fault: Fault) -> Self {
        Self { fault: Some(fault), ..Self::new() }
    }
}

/// Cumulative alpha of the toy's noise schedule.
fn alpha(timestep: f32) -> f32 {
    let (start, end) = (0.00085f64.sqrt(), 0.012f64.sqrt());
    let beta = |i: u32| (start + (end - start) * f64::from(i) / 999.0).powi(2);
    (0..=timestep as u32).map(|i| 1.0 - beta(i)).product::<f64>() as f32
}

impl Generator for ToyGenerator {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn sampler(&self) -> &dyn Sampler {
        self.sampler.as_ref()
    }

    fn notices(&self) -> &[String] {
        &[]
    }

    fn latent_shape(&self, width: u32, height: u32) -> [usize; 3] {
        [3, height as usize / 4, width as usize / 4]
    }

    fn encode(&self, prompt: &str) -> Result<EncodedText> {
        let bytes = prompt.as_bytes();
        let body = WINDOW - 2;
        let chunks = bytes.len().div_ceil(body).max(1);
        let mut states = vec![0f32; chunks * WINDOW];
        for (i, &byte) in bytes.iter().enumerate() {
            states[i / body * WINDOW + 1 + i % body] = f32::from(byte) / 255.0;
        }
        let states = Tensor::from_vec(states, (chunks, WINDOW, 1), &Device::Cpu)?;
        Ok(EncodedText { parts: vec![states], pooled: None, tokens: bytes.len() })
    }

    fn denoise(&self, latents: &Tensor, timestep: f32, context: &Context) -> Result<Tensor> {
        if let Some(permits) = &self.permits {
            // The other side is gone only when the test is over.
            let _ = permits.lock().expect("no test panicked").recv();
        }
        if self.fault == Some(Fault::Device) {
            return Err(candle_core::Error::Cuda("CUDA_ERROR_OUT_OF_MEMORY".into()).bt().into());
        }
        let (_, channels, h, w) = latents.dims4()?;
        let a = alpha(timestep);
        let (signal, noise) = (a.sqrt(), (1.0 - a).sqrt());
        let unit = 1.0 / ((channels * h * w) as f32).sqrt();
        let shifts = context.states.mean((1, 2))?.to_vec1::<f32>()?;
        let rows = latents.flatten_from(1)?.to_vec2::<f32>()?;
        let mut out = Vec::new();
        for (x, shift) in rows.iter().zip(shifts) {
            // The unit vector from cyan to red: red up, green and blue down.
            let m = |i: usize| if i < h * w { unit } else { -unit };
            let along: f32 = x.iter().enumerate().map(|(i, x)| x * m(i)).sum();
            let sign = (signal * DISTANCE * along).tanh();
            out.extend(x.iter().enumerate().map(|(i, x)| {
                let mean = sign * DISTANCE * m(i);
                let clean = mean + signal * (x - signal * mean);
                (x - signal * clean) / noise + 0.05 * shift
            }));
        }
        if self.fault == Some(Fault::Denoiser) {
            out[0] = f32::NAN;
        }
        Ok(Tensor::from_vec(out, latents.shape(), &Device::Cpu)?)
    }

    fn decode(&self, latents: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let pixels = (latents * 0.8)?.tanh()?;
        tape.push(&pixels);
        let (_, _, h, w) = latents.dims4()?;
        let pixels = pixels.upsample_nearest2d(4 * h, 4 * w)?;
        // A single latent without a tape is the finished image.
        let is_final = latents.dim(0)? == 1 && !tape.is_recording();
        if self.fault == Some(Fault::FinalDecoder) && is_final {
            return Ok((pixels * f64::NAN)?);
        }
        Ok(pixels)
    }

    fn decode_backward(&self, dpixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let pixels = tape.pop()?;
        let summed = (dpixels.avg_pool2d(4)? * 16.0)?;
        let slope = (pixels.sqr()?.affine(-1.0, 1.0)? * 0.8)?;
        let gradient = (summed * slope)?;
        Ok(match self.fault {
            Some(Fault::NanGradient) => (gradient * f64::NAN)?,
            Some(Fault::ZeroGradient) => gradient.zeros_like()?,
            _ => gradient,
        })
    }
}

/// The concept of a colour.
pub(crate) fn concept(name: &str) -> ConceptRef {
    ConceptRef { name: name.into(), version: "v1".into(), ..Default::default() }
}

/// Scores, gates and gradient of images `[b, 3, side, side]` in 0..1: the score of "red", "green"
/// and "blue" is the channel's mean, z its distance from 0.5 in eighths.
pub(crate) fn scores_of(
    pixels: &[f32],
    side: usize,
    concepts: &[ConceptRef],
    contexts: &[SampleContext],
    gate: f32,
) -> (Vec<SampleEvaluation>, Vec<f32>) {
    let plane = side * side;
    let mut gradient = vec![0.0; pixels.len()];
    let mut samples = Vec::new();
    for (row, pixels) in pixels.chunks_exact(3 * plane).enumerate() {
        let mut sample = SampleEvaluation::default();
        for concept in concepts {
            let channel = ["red", "green", "blue"]
                .iter()
                .position(|colour| *colour == concept.name)
                .expect("a colour");
            let values = &pixels[channel * plane..][..plane];
            let score = values.iter().sum::<f32>() / plane as f32;
            let z = 8.0 * (score - 0.5);
            let named = |list: fn(&SampleContext) -> &Vec<String>| {
                contexts.get(row).is_some_and(|context| list(context).contains(&concept.name))
            };
            let threshold = if named(|c| &c.open_concepts) { gate - 0.5 } else { gate };
            let open = z > threshold || named(|c| &c.held_concepts);
            if open {
                sample.energy += score;
                sample.amplitude = sample.amplitude.max((z - gate + 0.5).clamp(0.25, 1.0));
                let start = row * 3 * plane + channel * plane;
                gradient[start..start + plane].fill(1.0 / plane as f32);
            }
            let concept = concept.name.clone();
            sample.scores.push(ConceptScore {
                concept,
                score,
                z,
                gate,
                open,
                ..Default::default()
            });
        }
        samples.push(sample);
    }
    (samples, gradient)
}

/// What the toy energy saw and does.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Images of each evaluation, with their crop seeds and times.
    pub(crate) evaluations: Vec<Vec<Sample>>,
    /// Images of each check.
    pub(crate) checks: Vec<usize>,
}

/// An energy in the same process.
#[derive(Clone)]
pub(crate) struct ToyEnergy {
    /// Gate on z; infinite keeps every gate closed.
    pub(crate) gate: f32,
    /// Gate of the final check, if another.
    pub(crate) final_gate: Option<f32>,
    /// The final check's verdict, if not the score's.
    pub(crate) verdict: Option<bool>,
    /// The final check finds that something is left of whatever an image was steered away from.
    pub(crate) leaves: bool,
    /// The evaluation (from 0) that fails.
    pub(crate) fails_at: Option<usize>,
    pub(crate) seen: Arc<Mutex<Seen>>,
    sources: Sources,
}

impl ToyEnergy {
    pub(crate) fn new(gate: f32) -> Self {
        Self {
            gate,
            final_gate: None,
            verdict: None,
            leaves: false,
            fails_at: None,
            seen: Arc::default(),
            sources: Sources::default(),
        }
    }
}

/// Side of the pictures the toy energy asks for.
pub(crate) const SIDE: u32 = 8;

/// What a node is told of a sample.
fn context(sample: &Sample) -> SampleContext {
    let names = |probes: &BTreeSet<Probe>| probes.iter().map(|p| p.concept.clone()).collect();
    SampleContext {
        time: sample.time,
        crop_seed: sample.crop_seed,
        open_concepts: names(&sample.open),
        held_concepts: names(&sample.held),
    }
}

impl Energy for ToyEnergy {
    fn evaluate(
        &mut self,
        terms: &Terms,
        samples: &[Sample],
        render: &mut Render<'_>,
        _: &Turn<'_>,
    ) -> Result<Vec<Answer>> {
        let mut seen = self.seen.lock().expect("no test panicked");
        if self.fails_at == Some(seen.evaluations.len()) {
            return Err(Error::Energy(NodeFailure {
                node: "toy".into(),
                concepts: vec!["red".into()],
                reason: "gone".into(),
                retryable: true,
            }));
        }
        seen.evaluations.push(samples.to_vec());
        let input = InputSpec {
            height: SIDE,
            width: SIDE,
            range_min: 0.0,
            range_max: 1.0,
            ..Default::default()
        };
        let pixels = render(&input)?;
        let gate = if terms.scores_only { f32::INFINITY } else { self.gate };
        let contexts: Vec<SampleContext> = samples.iter().map(context).collect();
        let (samples, gradient) =
            scores_of(&pixels, SIDE as usize, &terms.concepts, &contexts, gate);
        let any = samples.iter().any(|sample| sample.amplitude > 0.0);
        Ok(vec![Answer { input, weight: 1.0, samples, gradient: any.then_some(gradient) }])
    }

    fn check(
        &mut self,
        terms: &Terms,
        candidates: &[Candidate],
        _: &Turn<'_>,
    ) -> Result<Vec<Verdict>> {
        self.seen.lock().expect("no test panicked").checks.push(candidates.len());
        let gate = self.final_gate.unwrap_or(self.gate);
        let judge = |candidate: &Candidate| {
            let (scores, flagged) = judge(&candidate.png, &terms.concepts, gate);
            let remaining = candidate.steered_away.iter().filter(|_| self.leaves).cloned();
            Verdict {
                scores,
                flagged: self.verdict.unwrap_or(flagged),
                remaining: remaining.collect(),
            }
        };
        Ok(candidates.iter().map(judge).collect())
    }

    fn sources(&self) -> &Sources {
        &self.sources
    }
}

/// Scores of a finished PNG and whether some gate is open.
pub(crate) fn judge(png: &[u8], concepts: &[ConceptRef], gate: f32) -> (Vec<ConceptScore>, bool) {
    let rgb = crate::common::pixels(png);
    let planes: Vec<f32> = (0..3)
        .flat_map(|channel| rgb.iter().skip(channel).step_by(3).map(|&v| f32::from(v) / 255.0))
        .collect();
    let side = (planes.len() as f64 / 3.0).sqrt() as usize;
    let (mut samples, _) = scores_of(&planes, side, concepts, &[], gate);
    let scores = samples.remove(0).scores;
    let flagged = scores.iter().any(|score| score.open);
    (scores, flagged)
}
