//! A small analytic scorer whose gradient is known, and that can be made to fail: for tests of this
//! crate and of whole clusters (feature `testing`).

use std::sync::{
    Arc, Condvar, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{Device, Tensor};

use crate::{
    concepts::ConceptSet,
    random::SplitMix64,
    scorer::{Learned, Pass, Scorer, ScorerDescription, ScorerError, ScorerLoader},
};

/// Nothing panics while it holds the lock on the fault.
const UNPOISONED: &str = "the lock is never poisoned";

/// What goes wrong in the next passes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Scores are NaN.
    NanScore,
    /// One score too few.
    TooFewScores,
    /// The gradient holds a NaN.
    NanGradient,
    /// The gradient is all zero.
    ZeroGradient,
    /// The gradient is not zero, but too small for the wire's type.
    TinyGradient,
    /// The gradient has another shape.
    WrongGradientShape,
    /// The forward pass panics.
    Panic,
    /// The forward pass does not end until the fault is changed.
    Hang,
}

/// Watches and disturbs a [`TestScorer`] from outside.
#[derive(Debug, Clone, Default)]
pub struct Probe(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    fault: Mutex<Fault>,
    changed: Condvar,
    forwards: AtomicUsize,
    backwards: AtomicUsize,
    parts: Mutex<Vec<usize>>,
}

impl Probe {
    /// Takes effect from the next pass on, and ends a hang.
    pub fn set(&self, fault: Fault) {
        *self.0.fault.lock().expect(UNPOISONED) = fault;
        self.0.changed.notify_all();
    }

    /// Forward passes begun.
    pub fn forwards(&self) -> usize {
        self.0.forwards.load(Ordering::SeqCst)
    }

    /// Of each concept that was learned later, the forward passes begun before.
    pub fn parts(&self) -> Vec<usize> {
        self.0.parts.lock().expect(UNPOISONED).clone()
    }

    /// Backward passes begun.
    pub fn backwards(&self) -> usize {
        self.0.backwards.load(Ordering::SeqCst)
    }
}

/// `score_k = tanh(<w_k, x - 0.5> / sqrt(N))` with a fixed random `w_k`: smooth, and different for
/// every concept.
#[derive(Debug)]
pub struct TestScorer {
    description: ScorerDescription,
    /// `[concepts][3 h w]`.
    weights: Vec<Vec<f32>>,
    /// How many concepts of the present lesson it has seen.
    seen: usize,
    probe: Probe,
}

/// Size of the test scorer's input in pixels.
pub const SIDE: usize = 12;

impl TestScorer {
    /// A loader for [`crate::run_with_scorer`], and the probe of what it will load.
    pub fn loader() -> (ScorerLoader, Probe) {
        let probe = Probe::default();
        let shared = probe.clone();
        let loader: ScorerLoader =
            Box::new(move |set| Ok(Box::new(Self::new(set.concepts().len(), shared))));
        (loader, probe)
    }

    fn new(concepts: usize, probe: Probe) -> Self {
        let description = ScorerDescription {
            kind: "test",
            model_name: "analytic".to_owned(),
            model_hash: "analytic-1".to_owned(),
            height: SIDE,
            width: SIDE,
            filter: fairlead_models::layers::Filter::BicubicAntialias,
            steepness: 50.0,
        };
        Self { description, weights: weights(concepts), seen: 0, probe }
    }

    /// An image `[3, SIDE, SIDE]` that shows the concept of this index: its score without crops is
    /// `tanh(27.7 strength)`, others' are near 0.
    pub fn image_of(concept: usize, strength: f32) -> Vec<f32> {
        weights(concept + 1)[concept].iter().map(|w| 0.5 + strength * w).collect()
    }

    fn score(&self, image: &[f32], concept: usize) -> f32 {
        let products = self.weights[concept].iter().zip(image).map(|(w, x)| w * (x - 0.5));
        (products.sum::<f32>() / (image.len() as f32).sqrt()).tanh()
    }

    /// The present fault, once it is no hang.
    fn fault(&self) -> Fault {
        let Shared { fault, changed, .. } = &*self.probe.0;
        let fault = fault.lock().expect(UNPOISONED);
        *changed.wait_while(fault, |fault| *fault == Fault::Hang).expect(UNPOISONED)
    }
}

/// Uniform in -2..2, `[concepts][3 SIDE SIDE]`.
fn weights(concepts: usize) -> Vec<Vec<f32>> {
    let mut random = SplitMix64::new(17);
    let mut row = || (0..3 * SIDE * SIDE).map(|_| 4.0 * random.unit() - 2.0).collect();
    (0..concepts).map(|_| row()).collect()
}

impl Scorer for TestScorer {
    fn describe(&self) -> &ScorerDescription {
        &self.description
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    /// One concept at a time.
    fn learn(&mut self, set: &ConceptSet) -> Result<Learned, ScorerError> {
        let fault = self.fault();
        assert!(fault != Fault::Panic, "the test asked for a panic");
        self.probe.0.parts.lock().expect(UNPOISONED).push(self.probe.forwards());
        self.seen += 1;
        if self.seen < set.concepts().len() {
            return Ok(Learned::Part);
        }
        self.weights = weights(self.weights.len() + std::mem::take(&mut self.seen));
        Ok(Learned::All)
    }

    fn forward<'a>(
        &'a self,
        images: &Tensor,
        concepts: &[usize],
        _gradient: bool,
    ) -> Result<Box<dyn Pass + 'a>, ScorerError> {
        self.probe.0.forwards.fetch_add(1, Ordering::SeqCst);
        let fault = self.fault();
        assert!(fault != Fault::Panic, "the test asked for a panic");
        let images = images.flatten_from(1)?.to_vec2::<f32>()?;
        let score = |image: &Vec<f32>, k: &usize| match fault {
            Fault::NanScore => f32::NAN,
            _ => self.score(image, *k),
        };
        let mut scores = images
            .iter()
            .flat_map(|image| concepts.iter().map(move |k| score(image, k)))
            .collect::<Vec<_>>();
        if fault == Fault::TooFewScores {
            scores.pop();
        }
        Ok(Box::new(TestPass { scorer: self, concepts: concepts.to_vec(), scores }))
    }
}

struct TestPass<'a> {
    scorer: &'a TestScorer,
    concepts: Vec<usize>,
    scores: Vec<f32>,
}

impl Pass for TestPass<'_> {
    fn scores(&self) -> &[f32] {
        &self.scores
    }

    fn backward(self: Box<Self>, slopes: &[f32]) -> Result<Tensor, ScorerError> {
        let TestScorer { weights, probe, .. } = self.scorer;
        probe.0.backwards.fetch_add(1, Ordering::SeqCst);
        let pixels = 3 * SIDE * SIDE;
        let images = self.scores.len() / self.concepts.len();
        let mut gradient = vec![0f32; images * pixels];
        for (row, (score, slope)) in self.scores.iter().zip(slopes).enumerate() {
            let (image, k) = (row / self.concepts.len(), self.concepts[row % self.concepts.len()]);
            let factor = slope * (1.0 - score * score) / (pixels as f32).sqrt();
            let target = &mut gradient[image * pixels..][..pixels];
            target.iter_mut().zip(&weights[k]).for_each(|(g, w)| *g += factor * w);
        }
        let mut side = SIDE;
        match self.scorer.fault() {
            Fault::ZeroGradient => gradient.fill(0.0),
            Fault::TinyGradient => gradient.fill(1e-12),
            Fault::NanGradient => gradient[5] = f32::NAN,
            Fault::WrongGradientShape => {
                side -= 1;
                gradient.truncate(images * 3 * side * side);
            }
            _ => {}
        }
        Ok(Tensor::from_vec(gradient, (images, 3, side, side), &Device::Cpu)?)
    }
}
