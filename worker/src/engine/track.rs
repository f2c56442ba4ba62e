//! One image on its way: everything that belongs to it and to no other.

use std::{collections::BTreeSet, time::Duration};

use fairlead_common::probe::Probe;
use fairlead_proto::v1::{ImageTask, StepRecord};

use crate::energy::Verdict;

/// One image of a batch.
#[derive(Debug, Clone)]
pub(super) struct Track {
    pub(super) task: ImageTask,
    /// The state, `[c, h, w]`.
    pub(super) latent: Vec<f32>,
    /// Probes whose gate was open at the last evaluation of this attempt.
    pub(super) open: BTreeSet<Probe>,
    /// Probes that the final check found open on an earlier attempt: where this image is heading is
    /// known, so their gates are open from the first step of the window until little is left of them.
    pub(super) held: BTreeSet<Probe>,
    /// Time spent on it so far.
    pub(super) spent_time: Duration,
    /// Sum over the attempt's steps of `rms(d) / rms(x0)`.
    pub(super) spent: f32,
    /// Some correction was applied, in any attempt.
    pub(super) steered: bool,
    /// Every step so far, all attempts.
    pub(super) trajectory: Vec<StepRecord>,
}

impl Track {
    pub(super) fn new(task: ImageTask) -> Self {
        Self {
            task,
            latent: Vec::new(),
            open: BTreeSet::new(),
            held: BTreeSet::new(),
            spent_time: Duration::ZERO,
            spent: 0.0,
            steered: false,
            trajectory: Vec::new(),
        }
    }

    /// Begins an attempt from the image's own noise.
    pub(super) fn restart(&mut self, noise: Vec<f32>) {
        self.latent = noise;
        self.open.clone_from(&self.held);
        self.spent = 0.0;
    }

    /// Holds the gates of what `verdict` found open or left; false if all of them were held already.
    pub(super) fn hold(&mut self, verdict: &Verdict) -> bool {
        let before = self.held.len();
        let found = verdict.scores.iter().filter(|score| score.open).map(Probe::from);
        self.held.extend(found.chain(verdict.remaining.iter().cloned()));
        self.held.len() > before
    }

    /// Whether the energies are asked about this image at the `nth` step of the window: always
    /// while a gate is open, else once a period.
    pub(super) fn is_due(&self, nth: u32, period: u32) -> bool {
        !self.open.is_empty() || nth.is_multiple_of(period)
    }
}

/// Seed of the energy's crops for one evaluation: a function of the image's seed and of where in
/// its making it is, so that the same request gives the same crops in any batch.
pub(super) fn crop_seed(seed: u64, attempt: u32, step: u32, inner: u32) -> u64 {
    let place = u64::from(attempt) << 48 | u64::from(inner) << 32 | u64::from(step);
    split_mix(split_mix(seed) ^ place)
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014) after one step of its Weyl sequence.
fn split_mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::ConceptScore;

    fn probe(concept: &str) -> Probe {
        Probe { concept: concept.into(), energy: String::new() }
    }

    #[test]
    fn split_mix_is_the_published_sequence() {
        // The first value of SplitMix64 seeded with 0, as java.util.SplittableRandom and the
        // reference C code give it.
        assert_eq!(split_mix(0), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn each_evaluation_has_crops_of_its_own() {
        let mut seen = BTreeSet::new();
        for (attempt, step, inner) in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (2, 3, 1)] {
            for seed in [0, 1, u64::MAX] {
                assert!(seen.insert(crop_seed(seed, attempt, step, inner)));
            }
        }
    }

    #[test]
    fn an_open_gate_is_asked_at_every_step() {
        let mut track = Track::new(ImageTask::default());
        let due: Vec<u32> = (0..8).filter(|&nth| track.is_due(nth, 3)).collect();
        assert_eq!(due, [0, 3, 6]);
        track.open.insert(probe("knife"));
        assert!((0..8).all(|nth| track.is_due(nth, 3)));
        track.restart(vec![0.0]);
        assert!(!track.is_due(1, 3));
    }

    #[test]
    fn what_the_final_check_finds_is_open_from_the_start_of_the_next_attempt() {
        let score = |concept: &str, open| ConceptScore {
            concept: concept.into(),
            open,
            ..Default::default()
        };
        let verdict = Verdict {
            scores: vec![score("axe", false), score("bomb", true)],
            flagged: true,
            ..Default::default()
        };
        let mut track = Track::new(ImageTask::default());
        track.open.insert(probe("axe"));
        assert!(track.hold(&verdict));
        assert!(!track.hold(&verdict));
        track.restart(vec![0.0]);
        assert_eq!(track.open, BTreeSet::from([probe("bomb")]));
        assert!(track.is_due(1, 3));
    }
}
