//! Progress: of one job, a bar an image with its step, its pace and its score closest to the gate; of many
//! jobs, how many are done. Where standard error is no terminal, a line every ten seconds.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::IsTerminal,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use fairlead_common::text;
use fairlead_proto::v1::StepProgress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::{
    output::{self, tell},
    pace::{Every, Pace, words},
};

const TEMPLATE: &str = "{prefix:>4} [{bar:24}] {pos:>3}/{len:<3} {msg}";
const COUNTER: &str = "{prefix} [{bar:32}] {pos}/{len} {msg}";

/// How often a line is written where there are no bars.
const PERIOD: Duration = Duration::from_secs(10);

/// Whether standard error shows bars.
#[expect(clippy::disallowed_methods, reason = "nothing is written")]
fn is_shown() -> bool {
    std::io::stderr().is_terminal()
}

/// Sets what a bar says; it may be text of others.
#[expect(clippy::disallowed_methods, reason = "the one place that writes on bars")]
fn show(bar: &ProgressBar, message: &str) {
    bar.set_message(text::printable(message).into_owned());
}

/// A bar of this name, which may be text of others.
#[expect(clippy::disallowed_methods, reason = "the one place that names bars")]
fn named(template: &str, total: u64, name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    let bar = ProgressBar::new(total).with_style(style.progress_chars("=> "));
    bar.with_prefix(text::printable(name).into_owned())
}

/// How much of a long piece of work is done.
pub(crate) struct Counter {
    bar: Option<ProgressBar>,
    count: Mutex<Count>,
}

impl Counter {
    pub(crate) fn new(name: impl Into<String>, total: usize) -> Self {
        let (name, total) = (name.into(), total as u64);
        let bar = is_shown().then(|| named(COUNTER, total, &name));
        Self { bar, count: Mutex::new(Count::new(name, total, Instant::now())) }
    }

    /// One more is done.
    pub(crate) fn inc(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let line = count.add(Instant::now());
        match (&self.bar, line) {
            (Some(bar), _) => {
                bar.inc(1);
                show(bar, &count.pace());
            }
            (None, Some(line)) => tell!("{line}"),
            (None, None) => {}
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// What a [`Counter`] counts.
struct Count {
    name: String,
    total: u64,
    done: u64,
    pace: Pace,
    lines: Every,
}

impl Count {
    fn new(name: String, total: u64, now: Instant) -> Self {
        Self { name, total, done: 0, pace: Pace::default(), lines: Every::new(PERIOD, now) }
    }

    /// One more is done; the line to write if it is time for one. The last is always told.
    fn add(&mut self, now: Instant) -> Option<String> {
        self.done += 1;
        self.pace.add(now);
        let is_told = self.lines.is_due(now) || self.done == self.total;
        is_told.then(|| {
            let line = format!("{}: {} of {} {}", self.name, self.done, self.total, self.pace());
            line.trim_end().to_owned()
        })
    }

    /// "(1.30 s each, 17 s left)", once it is known.
    fn pace(&self) -> String {
        let left = self.pace.left(self.total.saturating_sub(self.done));
        let Some((each, left)) = self.pace.each().zip(left) else { return String::new() };
        match left.is_zero() {
            true => format!("({} each)", words(each)),
            false => format!("({} each, {} left)", words(each), words(left)),
        }
    }
}

/// The bars of one job, or its lines.
pub(crate) struct JobProgress {
    bars: Option<MultiProgress>,
    job: RefCell<Steps>,
    images: RefCell<BTreeMap<u32, ProgressBar>>,
}

impl JobProgress {
    /// Of a job of so many images.
    pub(crate) fn new(images: usize) -> Self {
        let bars = is_shown().then(MultiProgress::new);
        let job = RefCell::new(Steps::new(images, Instant::now()));
        Self { bars, job, images: RefCell::default() }
    }

    /// Shows `step`.
    pub(crate) fn step(&self, step: &StepProgress) {
        let mut job = self.job.borrow_mut();
        let line = job.add(step, Instant::now());
        let Some(bars) = &self.bars else {
            if let Some(line) = line {
                tell!("{line}");
            }
            return;
        };
        let mut images = self.images.borrow_mut();
        let bar = images.entry(step.index).or_insert_with(|| {
            bars.add(named(TEMPLATE, u64::from(step.steps), &format!("#{}", step.index)))
        });
        bar.set_position(u64::from(step.step) + 1);
        show(bar, &[job.pace(step.index), describe(step)].join(" "));
    }

    /// Writes a line to standard error, above the bars.
    pub(crate) fn say(&self, line: &str) {
        match &self.bars {
            Some(bars) => bars.suspend(|| tell!("{line}")),
            None => tell!("{line}"),
        }
    }

    /// Leaves the bars on the screen as they are.
    pub(crate) fn finish(&self) {
        for bar in self.images.borrow().values() {
            bar.abandon();
        }
    }
}

/// Steps of a job's images as they are heard of.
struct Steps {
    /// Images that the job makes.
    images: u64,
    of: BTreeMap<u32, ImageSteps>,
    /// Of the steps of all images.
    pace: Pace,
    lines: Every,
}

/// Steps of one image.
#[derive(Default)]
struct ImageSteps {
    done: u64,
    total: u64,
    pace: Pace,
}

impl Steps {
    fn new(images: usize, now: Instant) -> Self {
        Self {
            images: images as u64,
            of: BTreeMap::new(),
            pace: Pace::default(),
            lines: Every::new(PERIOD, now),
        }
    }

    /// `step` was made; the line to write if it is time for one.
    fn add(&mut self, step: &StepProgress, now: Instant) -> Option<String> {
        let image = self.of.entry(step.index).or_default();
        (image.done, image.total) = (u64::from(step.step) + 1, u64::from(step.steps));
        image.pace.add(now);
        self.pace.add(now);
        self.lines.is_due(now).then(|| {
            let place = format!("image {}: step {} of {}", step.index, step.step + 1, step.steps);
            let parts = [place, self.pace(step.index), describe(step)];
            parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
        })
    }

    /// "1.30 s/step, 17 s left", once it is known: how long a step of this image takes, and all that is
    /// left of the job.
    fn pace(&self, index: u32) -> String {
        let each = self.of.get(&index).and_then(|image| image.pace.each());
        let Some((each, left)) = each.zip(self.pace.left(self.left())) else {
            return String::new();
        };
        format!("{}/step, {} left", words(each), words(left))
    }

    /// Steps that are left, as far as it is known: an image may be made again.
    fn left(&self) -> u64 {
        let of_begun: u64 =
            self.of.values().map(|image| image.total.saturating_sub(image.done)).sum();
        let steps = self.of.values().map(|image| image.total).max().unwrap_or_default();
        of_begun + steps * self.images.saturating_sub(self.of.len() as u64)
    }
}

/// "kitchen-knife z 4.1 / 3.2 open, corrected 0.21", as much of it as the step has.
fn describe(step: &StepProgress) -> String {
    let mut text = String::new();
    if step.attempt > 0 {
        text.push_str(&format!("rerun {} ", step.attempt));
    }
    if let Some(top) = output::top_score(&step.scores) {
        let gate = if top.open { "open" } else { "closed" };
        text.push_str(&format!("{} z {:.1} / {:.1} {gate}", top.concept, top.z, top.gate));
    }
    if step.correction > 0.0 {
        text.push_str(&format!(", corrected {:.2}", step.correction));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::ConceptScore;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn work_is_told_every_ten_seconds_and_at_its_end() {
        let start = Instant::now();
        let mut count = Count::new("images".to_owned(), 14, start);
        let told: Vec<String> =
            (1..=14).filter_map(|i| count.add(start + i * 2 * SECOND)).collect();
        assert_eq!(
            told,
            [
                "images: 5 of 14 (2.00 s each, 18 s left)",
                "images: 10 of 14 (2.00 s each, 8.00 s left)",
                "images: 14 of 14 (2.00 s each)",
            ]
        );
    }

    #[test]
    fn a_job_is_told_every_ten_seconds_with_its_pace_and_what_is_left() {
        let start = Instant::now();
        let mut steps = Steps::new(3, start);
        let step = |index, step| StepProgress { index, step, steps: 20, ..Default::default() };
        let mut told = Vec::new();
        // Two images at once, a step of both every four seconds; a third waits.
        for i in 0..6 {
            for index in 0..2 {
                told.extend(steps.add(&step(index, i), start + (4 * i + 2 * index) * SECOND));
            }
        }
        assert_eq!(
            told,
            [
                "image 1: step 3 of 20, 4.00 s/step, 1 min 48 s left",
                "image 0: step 6 of 20, 4.00 s/step, 1 min 38 s left",
            ]
        );
    }

    #[test]
    fn a_step_is_described_by_the_concept_closest_to_its_gate() {
        let score = |concept: &str, z, gate, open| ConceptScore {
            concept: concept.into(),
            z,
            gate,
            open,
            ..Default::default()
        };
        let step = StepProgress {
            scores: vec![score("axe", 3.0, 5.0, false), score("bomb", 2.5, 2.0, true)],
            correction: 0.25,
            attempt: 1,
            ..Default::default()
        };
        assert_eq!(describe(&step), "rerun 1 bomb z 2.5 / 2.0 open, corrected 0.25");
        assert_eq!(describe(&StepProgress::default()), "");
    }
}
