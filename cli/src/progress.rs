//! Progress: of one job, a bar an image with its step, its score closest to the gate, and the gate;
//! of many jobs, how many are done.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::IsTerminal,
    sync::atomic::{AtomicU64, Ordering},
};

use fairlead_proto::v1::StepProgress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output;

const TEMPLATE: &str = "{prefix:>4} [{bar:24}] {pos:>3}/{len:<3} {msg}";
const COUNTER: &str = "{prefix} [{bar:32}] {pos}/{len}, {eta} left";

/// How much of a long piece of work is done: a bar, or where standard error is no terminal a line
/// every tenth of it.
pub(crate) struct Counter {
    bar: Option<ProgressBar>,
    name: String,
    total: u64,
    done: AtomicU64,
}

impl Counter {
    pub(crate) fn new(name: impl Into<String>, total: usize) -> Self {
        let (name, total) = (name.into(), total as u64);
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(COUNTER).expect("the template is valid");
            ProgressBar::new(total).with_style(style).with_prefix(name.clone())
        });
        Self { bar, name, total, done: AtomicU64::new(0) }
    }

    /// One more is done.
    pub(crate) fn inc(&self) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        match &self.bar {
            Some(bar) => bar.inc(1),
            None if is_milestone(done, self.total) => {
                eprintln!("{}: {done} of {}", self.name, self.total);
            }
            None => {}
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

/// `done` of `total` completes another tenth.
fn is_milestone(done: u64, total: u64) -> bool {
    10 * done / total > 10 * (done - 1) / total
}

/// The bars of one job. Hidden where standard error is no terminal.
pub(crate) struct JobProgress {
    bars: MultiProgress,
    images: RefCell<BTreeMap<u32, ProgressBar>>,
}

impl JobProgress {
    pub(crate) fn new() -> Self {
        let bars = MultiProgress::new();
        if !std::io::stderr().is_terminal() {
            bars.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        Self { bars, images: RefCell::default() }
    }

    /// Shows `step` on its image's bar.
    pub(crate) fn step(&self, step: &StepProgress) {
        let mut images = self.images.borrow_mut();
        let bar = images.entry(step.index).or_insert_with(|| {
            let style = ProgressStyle::with_template(TEMPLATE)
                .expect("the template is valid")
                .progress_chars("=> ");
            let bar = ProgressBar::new(u64::from(step.steps)).with_style(style);
            self.bars.add(bar.with_prefix(format!("#{}", step.index)))
        });
        bar.set_position(u64::from(step.step) + 1);
        bar.set_message(describe(step));
    }

    /// Writes a line to standard error, above the bars.
    pub(crate) fn say(&self, line: &str) {
        self.bars.suspend(|| eprintln!("{line}"));
    }

    /// Leaves the bars on the screen as they are.
    pub(crate) fn finish(&self) {
        for bar in self.images.borrow().values() {
            bar.abandon();
        }
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

    #[test]
    fn every_tenth_is_told_once() {
        for total in [1, 3, 10, 25, 1000] {
            let told: Vec<u64> = (1..=total).filter(|&done| is_milestone(done, total)).collect();
            assert_eq!(told.len() as u64, total.min(10), "{total}");
            assert_eq!(told.last(), Some(&total));
        }
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
