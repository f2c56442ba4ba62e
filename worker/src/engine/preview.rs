//! Previews: small pictures of the clean estimate. A preview is output too: it is sent only while
//! every gate of its image is closed.

use candle_core::{Device, Tensor};
use fairlead_common::record;
use fairlead_models::layers::{Filter, resize};
use fairlead_proto::v1::ConceptScore;

use super::{
    Run, Track,
    sample::{Moment, Preview},
    track::crop_seed,
};
use crate::{
    energy::Candidate,
    error::{Error, Result},
    output::{Rgb8, sha256},
};

/// Longest side of a preview in pixels.
const SIDE: u32 = 128;

/// Previews of one image, about.
const COUNT: u32 = 8;

impl Run<'_> {
    /// Whether a preview is due at this step: about eight in a trajectory, none at the last step,
    /// which the image itself follows.
    pub(super) fn wants_preview(&self, moment: &Moment) -> bool {
        let (step, steps) = (moment.report.step, self.schedule.len() as u32);
        self.shard.spec.previews && step + 1 < steps && step.is_multiple_of(steps.div_ceil(COUNT))
    }

    /// A PNG of pixels `[3, H, W]` in -1..1; empty if they are not finite.
    pub(super) fn preview_of(&self, pixels: &[f32]) -> Result<Vec<u8>> {
        let (width, height) = self.shard.size;
        let longest = width.max(height);
        let fit = |side: u32| if longest > SIDE { (side * SIDE / longest).max(1) } else { side };
        let (w, h) = (fit(width), fit(height));
        let shape = (1, 3, height as usize, width as usize);
        let image = Tensor::from_slice(pixels, shape, &Device::Cpu)?;
        let image = if (w, h) == (width, height) {
            image
        } else {
            resize(&image, h as usize, w as usize, Filter::BicubicAntialias)?
        };
        let Some(rgb) = Rgb8::from_planes(&image.flatten_all()?.to_vec1::<f32>()?, w, h) else {
            return Ok(Vec::new());
        };
        // Without text chunks there is nothing in it that an encoder can refuse.
        Ok(rgb.to_png(&[]).unwrap_or_default())
    }

    /// Previews of a step outside the window: there the gates were not asked, so each preview is
    /// judged like a finished image. If that cannot be had there is no preview; the image's own
    /// check decides about the image.
    pub(super) fn preview_outside(
        &mut self,
        tracks: &mut [Track],
        moments: &mut [Moment],
    ) -> Result<()> {
        if !moments.first().is_some_and(|moment| self.wants_preview(moment)) {
            return Ok(());
        }
        let all: Vec<usize> = (0..moments.len()).collect();
        let estimates = self.estimates(moments, &all, 0)?;
        let previews =
            all.iter().map(|&i| self.preview_of(&estimates.row(i)?)).collect::<Result<Vec<_>>>()?;
        let allowed = self.judge_previews(tracks, moments, &previews)?;
        for ((moment, png), allowed) in moments.iter_mut().zip(previews).zip(allowed) {
            if let Some(scores) = allowed {
                moment.preview = Preview { png, scores };
            }
        }
        Ok(())
    }

    /// For each preview the scores that allow it, none if it is flagged or nobody can say.
    fn judge_previews(
        &mut self,
        tracks: &[Track],
        moments: &[Moment],
        previews: &[Vec<u8>],
    ) -> Result<Vec<Option<Vec<ConceptScore>>>> {
        if self.concepts().is_empty() || previews.iter().any(Vec::is_empty) {
            return Ok(vec![self.concepts().is_empty().then(Vec::new); previews.len()]);
        }
        let candidates: Vec<Candidate> = previews
            .iter()
            .zip(tracks.iter().zip(moments))
            .map(|(png, (track, moment))| Candidate {
                png: png.clone(),
                sha256: sha256(png),
                crop_seed: crop_seed(track.task.seed, moment.report.attempt, moment.report.step, 0),
                steered_away: record::steered_away(&track.trajectory),
            })
            .collect();
        match self.energy.check(&self.terms, &candidates, self.turn) {
            Ok(verdicts) => {
                Ok(verdicts.into_iter().map(|v| (!v.flagged).then_some(v.scores)).collect())
            }
            Err(Error::Energy(failure)) => {
                tracing::warn!("no preview: {failure}");
                Ok(vec![None; previews.len()])
            }
            Err(other) => Err(other),
        }
    }
}
