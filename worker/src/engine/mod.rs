//! The engine: denoises a shard's images, asks the energies where they are heading, corrects the
//! ones with an open gate, and has the finished images checked.
//!
//! Image i depends on (request, seed, i) alone: every image has its own noise, gates, budget and
//! crops, and whatever is computed for a batch is computed for each of its images alike.

mod conditioning;
mod estimate;
mod finish;
mod preview;
mod sample;
mod steer;
mod thread;
mod track;

use std::time::{Duration, Instant};

use fairlead_common::limits::MAX_RERUNS;
use fairlead_proto::v1::{
    CalibrationKey, ConceptRef, ImageOutcome, ModelInfo, Preview, StepProgress,
};

pub use thread::EngineHandle;

use crate::{
    Shard,
    energy::{Energy, Terms},
    error::{Error, Result},
    generator::Generator,
    sampler::Step,
    turn::Turn,
};
use conditioning::Conditioning;
use track::Track;

/// Where the engine's results go while it works. Implementations return at once.
pub trait Observer: Send {
    /// One image did one step, of which there may be a preview.
    fn step(&mut self, progress: StepProgress, preview: Option<Preview>);

    /// One image is finished: proposed for release with its pixels, or withheld without. The lease is
    /// left for the sender to fill in.
    fn image(&mut self, outcome: ImageOutcome);
}

/// Keeps what it is told; for tests, benchmarks and single runs.
#[derive(Debug, Default, Clone)]
pub struct Collected {
    /// Progress of every image and step, in order.
    pub steps: Vec<StepProgress>,
    /// Previews of these steps.
    pub previews: Vec<Preview>,
    /// Finished images in the order they were finished.
    pub images: Vec<ImageOutcome>,
}

impl Observer for Collected {
    fn step(&mut self, progress: StepProgress, preview: Option<Preview>) {
        self.steps.push(progress);
        self.previews.extend(preview);
    }

    fn image(&mut self, outcome: ImageOutcome) {
        self.images.push(outcome);
    }
}

/// A generator with the means to steer it. It belongs to threads that take turns; see [`EngineHandle`].
pub struct Engine {
    generator: Box<dyn Generator>,
    info: ModelInfo,
}

impl Engine {
    /// An engine that denoises at most `max_batch` images together.
    pub fn new(generator: Box<dyn Generator>, max_batch: u32) -> Self {
        let mut info = generator.info().clone();
        info.max_batch = max_batch.max(1);
        Self { generator, info }
    }

    /// What is served.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The generator itself, e.g. to measure it.
    pub fn generator(&self) -> &dyn Generator {
        self.generator.as_ref()
    }

    /// Makes the shard's images in a turn at the device, which others have while this waits for energy
    /// nodes. Each ends as one [`Observer::image`] call; an image handed over
    /// stays good even if a later one fails.
    ///
    /// # Errors
    /// [`Error::Cancelled`] within one step of the turn's token; [`Error::Energy`] if a concept has no usable
    /// answer; [`Error::Numeric`] for values that are not finite; [`Error::Request`].
    pub fn run(
        &self,
        shard: &Shard,
        energy: &mut dyn Energy,
        observer: &mut dyn Observer,
        turn: &Turn<'_>,
    ) -> Result<()> {
        let mut run = Run::prepare(self, shard, energy, observer, turn)?;
        for tasks in shard.images.chunks(self.info.max_batch as usize) {
            let mut tracks: Vec<Track> = tasks.iter().cloned().map(Track::new).collect();
            for attempt in 0..=MAX_RERUNS {
                tracks = run.attempt(tracks, attempt)?;
                if tracks.is_empty() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// One shard on its way through the engine.
struct Run<'a> {
    engine: &'a Engine,
    shard: &'a Shard,
    schedule: Vec<Step>,
    conditioning: Conditioning,
    terms: Terms,
    notices: Vec<String>,
    /// Channels, height and width of the latent.
    shape: [usize; 3],
    energy: &'a mut dyn Energy,
    observer: &'a mut dyn Observer,
    turn: &'a Turn<'a>,
    /// When the attempt began, and how long the turn had been waited for by then.
    begun: (Instant, Duration),
}

impl<'a> Run<'a> {
    fn prepare(
        engine: &'a Engine,
        shard: &'a Shard,
        energy: &'a mut dyn Energy,
        observer: &'a mut dyn Observer,
        turn: &'a Turn<'a>,
    ) -> Result<Self> {
        let generator = engine.generator();
        let conditioning = Conditioning::new(generator, shard)?;
        let mut notices = generator.notices().to_vec();
        notices.extend(conditioning.notices(engine.info.prompt_tokens));
        Ok(Self {
            engine,
            shard,
            schedule: generator.sampler().schedule(shard.steps)?,
            conditioning,
            terms: Terms {
                concepts: shard.concepts().to_vec(),
                calibration: CalibrationKey {
                    generator: engine.info.hash.clone(),
                    sampler: generator.sampler().name().to_owned(),
                    steps: shard.steps,
                    conditions: Some(shard.conditions()),
                },
                allow_fallback: shard.policy.allow_calibration_fallback,
                scores_only: shard.policy.observe_only,
                crops: shard.knobs.crops,
                weights: shard.weights(),
            },
            notices,
            shape: generator.latent_shape(shard.size.0, shard.size.1),
            energy,
            observer,
            turn,
            begun: (Instant::now(), turn.waited()),
        })
    }

    /// One attempt at all images of a batch; returns those to be made again.
    fn attempt(&mut self, mut tracks: Vec<Track>, attempt: u32) -> Result<Vec<Track>> {
        self.begun = (Instant::now(), self.turn.waited());
        self.sample(&mut tracks, attempt)?;
        self.finish(tracks, attempt)
    }

    fn generator(&self) -> &'a dyn Generator {
        self.engine.generator()
    }

    fn concepts(&self) -> &[ConceptRef] {
        &self.terms.concepts
    }

    /// Fails once the work is cancelled.
    fn alive(&self) -> Result<()> {
        if self.turn.cancel().is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Time since the attempt began in which nobody else had the device.
    fn spent(&self) -> Duration {
        let (begun, waited) = self.begun;
        begun.elapsed().saturating_sub(self.turn.waited().saturating_sub(waited))
    }
}
