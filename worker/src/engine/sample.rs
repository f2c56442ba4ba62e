//! The loop over the steps of one attempt.

use std::time::Instant;

use candle_core::Tensor;
use fairlead_proto::v1::{Preview, StepProgress, StepRecord};

use super::{Run, Track, estimate};
use crate::{
    error::{Error, Result},
    metrics, noise,
    sampler::{Advance, Step},
};

/// One image at one step.
pub(super) struct Moment {
    /// Clean estimate and next state; corrections are added to both.
    pub(super) advance: Advance,
    /// What is put on record.
    pub(super) report: StepRecord,
    /// A preview, if one is due and no gate is open.
    pub(super) preview: Option<Preview>,
}

impl Run<'_> {
    /// Takes every image from its own noise to its latent.
    pub(super) fn sample(&mut self, tracks: &mut [Track], attempt: u32) -> Result<()> {
        let len = self.shape.iter().product();
        for track in tracks.iter_mut() {
            track.restart(noise::normal(track.task.seed, len));
        }
        let mut in_window = 0;
        for index in 0..self.schedule.len() {
            self.alive()?;
            let step = self.schedule[index];
            let asks = !self.concepts().is_empty() && self.shard.knobs.window.contains(step.time);
            if !asks {
                self.turn.give_way();
            }
            let (number, time) = (index as i64, step.time);
            let span = tracing::info_span!("step", number, time, attempt = i64::from(attempt));
            let _step = span.entered();
            let begun = Instant::now();
            let mut moments = self.denoise(tracks, &step, index as u32, attempt)?;
            metrics::denoised(begun.elapsed());
            if asks {
                let begun = Instant::now();
                self.steer(tracks, &mut moments, &step, in_window)?;
                metrics::steered(begun.elapsed());
                in_window += 1;
            } else {
                self.preview_outside(tracks, &mut moments)?;
            }
            for (track, mut moment) in tracks.iter_mut().zip(moments) {
                let preview = moment.preview.take();
                self.observer.step(self.progress(track, &moment), preview);
                track.latent = moment.advance.next;
                track.trajectory.push(moment.report);
            }
        }
        Ok(())
    }

    /// One denoiser call for all images, with guidance if it is on, and the sampler's step.
    fn denoise(
        &self,
        tracks: &[Track],
        step: &Step,
        index: u32,
        attempt: u32,
    ) -> Result<Vec<Moment>> {
        let latents: Vec<&[f32]> = tracks.iter().map(|track| &track.latent[..]).collect();
        let x = estimate::stack(&latents, self.shape, self.generator().device())?;
        let context = self.conditioning.context(tracks.len())?;
        let guided = self.conditioning.is_guided();
        let x = if guided { Tensor::cat(&[&x, &x], 0)? } else { x };
        let output = estimate::rows(&self.generator().denoise(&x, step.timestep, &context)?)?;
        let sampler = self.generator().sampler();
        tracks
            .iter()
            .enumerate()
            .map(|(i, track)| {
                let advance = if guided {
                    let prediction =
                        guide(&output[i], &output[tracks.len() + i], self.shard.guidance);
                    sampler.advance(step, &track.latent, &prediction)
                } else {
                    sampler.advance(step, &track.latent, &output[i])
                };
                if !advance.next.iter().chain(&advance.clean).all(|value| value.is_finite()) {
                    return Err(Error::Numeric {
                        index: track.task.index,
                        step: index,
                        what: "the denoiser's output is not finite",
                    });
                }
                let report =
                    StepRecord { step: index, time: step.time, attempt, ..Default::default() };
                Ok(Moment { advance, report, preview: None })
            })
            .collect()
    }

    fn progress(&self, track: &Track, moment: &Moment) -> StepProgress {
        StepProgress {
            index: track.task.index,
            step: moment.report.step,
            steps: self.schedule.len() as u32,
            scores: moment.report.scores.clone(),
            correction: moment.report.correction,
            preview_png: Vec::new(),
            attempt: moment.report.attempt,
        }
    }
}

/// Classifier-free guidance (Ho and Salimans 2022): `u + scale (c - u)`.
fn guide(unconditional: &[f32], conditional: &[f32], scale: f32) -> Vec<f32> {
    unconditional.iter().zip(conditional).map(|(&u, &c)| u + scale * (c - u)).collect()
}
