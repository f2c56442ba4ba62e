//! One steered step: ask about the clean estimates, and correct those with an open gate.

use std::collections::BTreeSet;

use fairlead_common::probe::Probe;
use fairlead_proto::v1::ConceptScore;

use super::{
    Run, Track,
    estimate::{Cut, Estimates},
    sample::Moment,
    track::crop_seed,
};
use crate::{
    energy::{Answer, Sample, is_open},
    error::{Error, Result},
    metrics,
    sampler::Step,
    steering::{Knobs, Push, correct, smooth},
};

/// What all nodes together say about one image.
struct Opinion {
    /// In the order of the policy's probes.
    scores: Vec<ConceptScore>,
    open: BTreeSet<Probe>,
    /// A, the largest over the nodes.
    amplitude: f32,
}

impl<'a> Run<'a> {
    /// Steers the images that are due at the `nth` step of the window. An image whose gates are all
    /// closed is not touched.
    pub(super) fn steer(
        &mut self,
        tracks: &mut [Track],
        moments: &mut [Moment],
        step: &Step,
        nth: u32,
    ) -> Result<()> {
        let knobs = self.shard.knobs;
        let weight = if self.terms.scores_only { 0.0 } else { knobs.window.weight(step.time) };
        let is_due = |track: &Track| track.is_due(nth, knobs.probe_period);
        let mut due: Vec<usize> = (0..tracks.len()).filter(|&i| is_due(&tracks[i])).collect();
        for inner in 0..knobs.inner_iterations {
            if due.is_empty() {
                break;
            }
            self.alive()?;
            // Those open at their last evaluation first: they probably still are.
            due.sort_by_key(|&i| (tracks[i].open.is_empty(), i));
            let likely = due.iter().filter(|&&i| !tracks[i].open.is_empty()).count();
            let likely = if weight > 0.0 { likely } else { 0 };
            let estimates = self.estimates(moments, &due, likely)?;
            let answers = self.ask(tracks, moments, &due, inner, &estimates)?;
            let opinions = self.opinions(&answers, due.len());
            for (row, &i) in due.iter().enumerate() {
                tracks[i].open.clone_from(&opinions[row].open);
                if inner == 0 {
                    moments[i].report.scores.clone_from(&opinions[row].scores);
                    if tracks[i].open.is_empty() && self.wants_preview(&moments[i]) {
                        let pixels = estimates.row(row)?;
                        moments[i].preview = self.preview_of(&tracks[i], &moments[i], &pixels)?;
                    }
                }
            }
            let has_budget = |i: usize| knobs.cap * strength(&moments[i], &knobs) > tracks[i].spent;
            let rows: Vec<usize> = (0..due.len())
                .filter(|&row| !opinions[row].open.is_empty() && has_budget(due[row]))
                .collect();
            if weight == 0.0 || rows.is_empty() {
                break;
            }
            self.alive()?;
            let gradients = estimates.pull_back(&answers, &rows)?;
            for (&row, gradient) in rows.iter().zip(&gradients) {
                let (i, amplitude) = (due[row], opinions[row].amplitude);
                self.correct(&mut tracks[i], &mut moments[i], step, weight, amplitude, gradient)?;
            }
            due = rows.iter().map(|&row| due[row]).collect();
        }
        Ok(())
    }

    /// Clean estimates of the images `due`, the first `likely` of them with a gradient in view.
    pub(super) fn estimates(
        &self,
        moments: &[Moment],
        due: &[usize],
        likely: usize,
    ) -> Result<Estimates<'a>> {
        let (width, height) = self.shard.size;
        let latents = due.iter().map(|&i| moments[i].advance.clean.clone()).collect();
        let cut = Cut::new(likely, width, height);
        Estimates::decode(self.generator(), latents, self.shape, cut, self.turn.cancel())
    }

    fn ask(
        &mut self,
        tracks: &[Track],
        moments: &[Moment],
        due: &[usize],
        inner: u32,
        estimates: &Estimates<'_>,
    ) -> Result<Vec<Answer>> {
        let context = |&i: &usize| {
            let (track, report) = (&tracks[i], &moments[i].report);
            Sample {
                time: report.time,
                open: track.open.clone(),
                held: track.held.clone(),
                crop_seed: crop_seed(track.task.seed, report.attempt, report.step, inner),
            }
        };
        let samples: Vec<Sample> = due.iter().map(context).collect();
        let mut render = |input: &_| estimates.render(input);
        self.energy.evaluate(&self.terms, &samples, &mut render, self.turn)
    }

    fn opinions(&self, answers: &[Answer], count: usize) -> Vec<Opinion> {
        let opinion = |row: usize| {
            let samples = || answers.iter().map(|answer| &answer.samples[row]);
            let all = || samples().flat_map(|sample| &sample.scores);
            let score_of = |probe: Probe| all().find(|score| Probe::from(*score) == probe).cloned();
            let open = all().filter(|score| score.open).map(Probe::from);
            let amplitudes = samples().filter(|s| is_open(s)).map(|s| s.amplitude);
            Opinion {
                scores: self.concepts().iter().filter_map(|c| score_of(c.into())).collect(),
                open: open.collect(),
                amplitude: amplitudes.fold(0.0, f32::max).min(1.0),
            }
        };
        (0..count).map(opinion).collect()
    }

    /// Corrects one image along the gradient of its energy.
    fn correct(
        &self,
        track: &mut Track,
        moment: &mut Moment,
        step: &Step,
        weight: f32,
        amplitude: f32,
        gradient: &[f32],
    ) -> Result<()> {
        let knobs = self.shard.knobs;
        if gradient.iter().all(|&value| value == 0.0) {
            return Err(Error::Numeric {
                index: track.task.index,
                step: moment.report.step,
                what: "a gate is open but the gradient on the latent is zero",
            });
        }
        let strength = strength(moment, &knobs);
        let push = Push {
            eta: knobs.eta * strength,
            amplitude,
            weight,
            budget: knobs.cap * strength - track.spent,
        };
        let smoothed = smooth(gradient, self.shape, knobs.smoothing);
        let Some(correction) = correct(&moment.advance.clean, &smoothed, push) else {
            moment.report.skipped_non_finite = true;
            return Ok(());
        };
        let multiple = knobs.mode.coefficient(step.level, step.next);
        let advance = &mut moment.advance;
        for ((d, clean), next) in correction.d.iter().zip(&mut advance.clean).zip(&mut advance.next)
        {
            *clean += d;
            *next += multiple * d;
        }
        moment.report.correction += correction.relative;
        track.spent += correction.relative;
        track.steered = true;
        metrics::corrected();
        Ok(())
    }
}

/// What multiplies eta and cap at this attempt. A rerun that pushes harder may push as much further:
/// under the same cap it would only spend it earlier, on the noisiest steps, where a correction
/// counts least.
fn strength(moment: &Moment, knobs: &Knobs) -> f32 {
    knobs.rerun_factor.powi(moment.report.attempt as i32)
}
