//! Previews: small pictures of the clean estimate. A preview is output too. The coordinator checks
//! and encodes it; the worker leaves out those of images with an open gate, which would not pass.

use candle_core::{Device, Tensor};
use fairlead_common::picture::Rgb8;
use fairlead_models::layers::{Filter, resize};
use fairlead_proto::{MAX_PREVIEW_SIDE, v1::Preview};

use super::{Run, Track, sample::Moment};
use crate::error::Result;

/// Previews of one image, about.
const COUNT: u32 = 8;

impl Run<'_> {
    /// Whether a preview is due at this step: about eight in a trajectory, none at the last step,
    /// which the image itself follows.
    pub(super) fn wants_preview(&self, moment: &Moment) -> bool {
        let (step, steps) = (moment.report.step, self.schedule.len() as u32);
        self.shard.spec.previews && step + 1 < steps && step.is_multiple_of(steps.div_ceil(COUNT))
    }

    /// The preview of pixels `[3, H, W]` in -1..1; none if they are not finite.
    pub(super) fn preview_of(
        &self,
        track: &Track,
        moment: &Moment,
        pixels: &[f32],
    ) -> Result<Option<Preview>> {
        let (width, height) = self.shard.size;
        let longest = width.max(height);
        let fit = |side: u32| match longest > MAX_PREVIEW_SIDE {
            true => (side * MAX_PREVIEW_SIDE / longest).max(1),
            false => side,
        };
        let (w, h) = (fit(width), fit(height));
        let shape = (1, 3, height as usize, width as usize);
        let image = Tensor::from_slice(pixels, shape, &Device::Cpu)?;
        let image = if (w, h) == (width, height) {
            image
        } else {
            resize(&image, h as usize, w as usize, Filter::BicubicAntialias)?
        };
        let rgb = Rgb8::from_planes(&image.flatten_all()?.to_vec1::<f32>()?, w, h);
        Ok(rgb.map(|rgb| Preview {
            index: track.task.index,
            step: moment.report.step,
            width: w,
            height: h,
            pixels: rgb.into_data(),
        }))
    }

    /// Previews of a step outside the window, of the images whose gates were closed at their last
    /// evaluation.
    pub(super) fn preview_outside(
        &mut self,
        tracks: &mut [Track],
        moments: &mut [Moment],
    ) -> Result<()> {
        if !moments.first().is_some_and(|moment| self.wants_preview(moment)) {
            return Ok(());
        }
        let closed: Vec<usize> =
            (0..moments.len()).filter(|&i| tracks[i].open.is_empty()).collect();
        if closed.is_empty() {
            return Ok(());
        }
        let estimates = self.estimates(moments, &closed, 0)?;
        for (row, &i) in closed.iter().enumerate() {
            moments[i].preview = self.preview_of(&tracks[i], &moments[i], &estimates.row(row)?)?;
        }
        Ok(())
    }
}
