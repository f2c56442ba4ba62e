//! The end of an attempt: the final decoding, the final check, and what follows from it.

use fairlead_common::{
    picture::{Rgb8, sha256},
    record,
};
use fairlead_models::Tape;
use fairlead_proto::v1::{ImageOutcome, ImageStatus, WorkerReport};

use super::{MAX_RERUNS, Run, Track, estimate};
use crate::{
    energy::{Candidate, Verdict},
    error::{Error, Result},
    metrics,
};

/// A finished picture that nobody has judged yet.
struct Picture {
    rgb: Rgb8,
    png: Vec<u8>,
    sha256: String,
}

impl Run<'_> {
    /// Has every image of the attempt judged. Good ones are handed over, those with something left
    /// of what they were steered away from are returned for a rerun with those gates held open, and
    /// so are flagged ones, until no attempt is left: then a flagged one is withheld.
    pub(super) fn finish(&mut self, tracks: Vec<Track>, attempt: u32) -> Result<Vec<Track>> {
        self.alive()?;
        let pictures = self.pictures(&tracks)?;
        let verdicts = self.judge(&tracks, &pictures)?;
        self.alive()?;
        let each = self.spent() / tracks.len().max(1) as u32;
        let mut rerun = Vec::new();
        for ((mut track, picture), verdict) in tracks.into_iter().zip(pictures).zip(verdicts) {
            track.spent_time += each;
            let flagged = verdict.flagged && !self.terms.scores_only;
            let again = flagged || !verdict.remaining.is_empty();
            let was_pushed = track
                .trajectory
                .iter()
                .any(|step| step.attempt == attempt && step.correction > 0.0);
            // Where nothing pushed and nothing new is held, a rerun would change nothing.
            if again && attempt < MAX_RERUNS && (track.hold(&verdict) || was_pushed) {
                metrics::rerun();
                tracing::info!(index = track.task.index, attempt, "not gone, running again");
                rerun.push(track);
            } else {
                let outcome = self.outcome(track, picture, verdict, flagged, attempt);
                self.observer.image(outcome);
            }
        }
        Ok(rerun)
    }

    /// Decodes the final latents, one image at a time to bound memory.
    fn pictures(&self, tracks: &[Track]) -> Result<Vec<Picture>> {
        let generator = self.generator();
        tracks
            .iter()
            .map(|track| {
                let latent = estimate::stack(&[&track.latent], self.shape, generator.device())?;
                let mut tape = estimate::stopped_by(Tape::off(), self.turn.cancel());
                let pixels = generator.decode(&latent, &mut tape)?;
                let pixels = pixels.flatten_all()?.to_vec1::<f32>()?;
                self.picture(track, &pixels)
            })
            .collect()
    }

    fn picture(&self, track: &Track, pixels: &[f32]) -> Result<Picture> {
        let (width, height) = self.shard.size;
        let index = track.task.index;
        let rgb = Rgb8::from_planes(pixels, width, height).ok_or(Error::Numeric {
            index,
            step: self.schedule.len() as u32,
            what: "the decoder's pixels are not finite",
        })?;
        // The coordinator encodes the file that is released, with texts of its own.
        let png = rgb.to_png(&[]).map_err(|source| Error::Png { index, source })?;
        Ok(Picture { sha256: sha256(&png), rgb, png })
    }

    fn judge(&mut self, tracks: &[Track], pictures: &[Picture]) -> Result<Vec<Verdict>> {
        if self.concepts().is_empty() {
            return Ok(vec![Verdict::default(); pictures.len()]);
        }
        let candidates: Vec<Candidate> = tracks
            .iter()
            .zip(pictures)
            .map(|(track, picture)| Candidate {
                png: picture.png.clone(),
                sha256: picture.sha256.clone(),
                // The coordinator's final check has crops of its own, which nobody knows beforehand.
                crop_seed: track.task.seed,
                steered_away: record::steered_away(&track.trajectory),
            })
            .collect();
        self.energy.check(&self.terms, &candidates, self.turn)
    }

    fn outcome(
        &self,
        track: Track,
        picture: Picture,
        verdict: Verdict,
        withheld: bool,
        attempt: u32,
    ) -> ImageOutcome {
        let status = if withheld { ImageStatus::Withheld } else { ImageStatus::Released };
        let index = track.task.index;
        metrics::finished(status, track.spent_time);
        ImageOutcome {
            lease: None,
            index,
            status: status.into(),
            pixels: if withheld { Vec::new() } else { picture.rgb.into_data() },
            report: Some(self.report(track, verdict, attempt)),
            notices: self.notices.clone(),
        }
    }

    /// What the safety record keeps as this worker's word.
    fn report(&self, track: Track, verdict: Verdict, reruns: u32) -> WorkerReport {
        let sources = self.energy.sources();
        WorkerReport {
            trajectory: track.trajectory,
            final_scores: verdict.scores,
            reruns,
            steered: track.steered,
            energy_nodes: sources.nodes.iter().cloned().collect(),
            calibrations: sources.calibrations.iter().cloned().collect(),
            engine_ms: u32::try_from(track.spent_time.as_millis()).unwrap_or(u32::MAX),
        }
    }
}
