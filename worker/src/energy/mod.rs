//! Energies as the engine sees them: a question about clean estimates, an answer that was checked.

mod call;
mod pool;
mod routing;
mod validate;

use std::collections::{BTreeMap, BTreeSet};

use fairlead_common::probe::Probe;
use fairlead_proto::v1::{CalibrationKey, ConceptRef, ConceptScore, InputSpec, SampleEvaluation};

pub use call::{PoolOptions, channels};
pub use pool::EnergyPool;
pub(crate) use validate::is_open;

use crate::{error::Result, turn::Turn};

/// What holds for every question of one shard.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The policy's concepts, in its order.
    pub concepts: Vec<ConceptRef>,
    /// What the calibration must be for.
    pub calibration: CalibrationKey,
    /// Whether a node may use a recorded fallback in place of a missing calibration.
    pub allow_fallback: bool,
    /// Scores only: no gates, no gradient.
    pub scores_only: bool,
    /// Crops the node makes of each image.
    pub crops: u32,
    /// Factors of the gradients of energies that do not count once.
    pub weights: BTreeMap<String, f32>,
}

/// What the energies are told of one clean estimate.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// Training time as a fraction `t / T`.
    pub time: f32,
    /// Seed of the nodes' crops.
    pub crop_seed: u64,
    /// Probes whose gate is open.
    pub open: BTreeSet<Probe>,
    /// Probes whose gate is held open from the first step on.
    pub held: BTreeSet<Probe>,
}

/// The checked answer of one node about a batch of clean estimates.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The size and range the node was shown.
    pub input: InputSpec,
    /// Factor of its gradient.
    pub weight: f32,
    /// One per image: a score for every concept asked of this node, all finite.
    pub samples: Vec<SampleEvaluation>,
    /// `dE/dpixels`, `[b, 3, input.height, input.width]`, in the node's range. Present if some
    /// gate is open; finite, and not all zero for an image with an open gate.
    pub gradient: Option<Vec<f32>>,
}

/// A finished image to be checked.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The PNG as it would leave.
    pub png: Vec<u8>,
    /// SHA-256 of the PNG, lower-case hex.
    pub sha256: String,
    /// Seed of the node's crops.
    pub crop_seed: u64,
    /// Concepts that it was steered away from.
    pub steered_away: BTreeSet<Probe>,
}

/// The verdict of all concepts on one finished image.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    /// One score per concept, in the policy's order.
    pub scores: Vec<ConceptScore>,
    /// Some concept's gate is open.
    pub flagged: bool,
    /// What the image was steered away from and of which too much is left.
    pub remaining: Vec<Probe>,
}

/// Who answered so far, for the record.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// "node_id model_hash".
    pub nodes: BTreeSet<String>,
    /// Calibration ids; a fallback is "fallback: ...".
    pub calibrations: BTreeSet<String>,
}

/// Turns the present clean estimates into a node's input: `[b, 3, height, width]` in its range.
pub type Render<'a> = dyn FnMut(&InputSpec) -> Result<Vec<f32>> + 'a;

/// Everything that can say where images are heading. Called from the engine's thread and blocking
/// it; an implementation bounds the wait, waits aside of the turn, and returns at once when its token
/// is cancelled.
pub trait Energy: Send {
    /// Asks a node of every probe of `terms` about the images of `samples`. Answers are
    /// in the order of the policy's concepts and cover each exactly once.
    ///
    /// # Errors
    /// [`crate::Error::Energy`] if some concept has no usable answer, [`crate::Error::Cancelled`].
    fn evaluate(
        &mut self,
        terms: &Terms,
        samples: &[Sample],
        render: &mut Render<'_>,
        turn: &Turn<'_>,
    ) -> Result<Vec<Answer>>;

    /// Judges finished images, one verdict each.
    ///
    /// # Errors
    /// As [`Energy::evaluate`].
    fn check(
        &mut self,
        terms: &Terms,
        candidates: &[Candidate],
        turn: &Turn<'_>,
    ) -> Result<Vec<Verdict>>;

    /// Who answered so far.
    fn sources(&self) -> &Sources;
}
