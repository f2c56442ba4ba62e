//! Scorers: frozen models that say how much of each concept an image shows, and in which direction
//! on the pixels it shows more.
//!
//! A new kind of energy is one file here that implements [`Scorer`]; crops, gates, energies and the
//! wire are the same for all.

mod contrastive;

use candle_core::{Device, Tensor};

pub(crate) use contrastive::Contrastive;
use fairlead_models::layers::Filter;

use crate::concepts::ConceptSet;

/// What a scorer is.
#[derive(Debug, Clone, PartialEq)]
pub struct ScorerDescription {
    /// "contrastive".
    pub kind: &'static str,
    /// Name of the model, for people.
    pub model_name: String,
    /// Content hash of the model.
    pub model_hash: String,
    /// Height of the input in pixels.
    pub height: usize,
    /// Width of the input in pixels.
    pub width: usize,
    /// How pictures of other sizes get to that size.
    pub filter: Filter,
    /// `K_s` of the energy: how many softplus widths one unit of raw score is; 50 for cosines.
    pub steepness: f32,
}

/// A frozen model that scores the concepts it was loaded with or has learned since. It lives on one thread.
pub trait Scorer {
    /// What it is.
    fn describe(&self) -> &ScorerDescription;

    /// Where its tensors live.
    fn device(&self) -> &Device;

    /// Learns a part of further concepts, so that others are not kept waiting for all; ask again until it
    /// knows them. Their indices then follow those of the ones it knew. After an error it knows no more
    /// concepts than before.
    fn learn(&mut self, set: &ConceptSet) -> Result<Learned, ScorerError>;

    /// Scores `images` `[n, 3, h, w]`, RGB, black 0 and white 1 (values may lie somewhat outside),
    /// for `concepts`, given as indices into those it knows. Each image's numbers must
    /// not depend on the others. With `gradient` a [`Pass::backward`] may follow.
    fn forward<'a>(
        &'a self,
        images: &Tensor,
        concepts: &[usize],
        gradient: bool,
    ) -> Result<Box<dyn Pass + 'a>, ScorerError>;
}

/// How much of a set a scorer has learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// Some of it; the concepts can't be asked for yet.
    Part,
    /// All.
    All,
}

/// One forward pass, ready for at most one backward pass.
pub trait Pass {
    /// Raw scores, row-major `[n, concepts]`.
    fn scores(&self) -> &[f32];

    /// Pulls `slopes` `[n, concepts]`, a gradient on the scores, back to the images
    /// `[n, 3, h, w]`: one backward pass whatever the number of concepts.
    fn backward(self: Box<Self>, slopes: &[f32]) -> Result<Tensor, ScorerError>;
}

/// Loads a scorer for a set of concepts, on the thread it will live on.
pub type ScorerLoader = Box<dyn FnOnce(&ConceptSet) -> Result<Box<dyn Scorer>, ScorerError> + Send>;

/// Why a scorer did not load or score.
#[derive(Debug, thiserror::Error)]
pub enum ScorerError {
    /// A network refused its folder or its input.
    #[error(transparent)]
    Network(Box<fairlead_models::Error>),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A phrase does not fit the text model.
    #[error(
        "concept `{concept}`: the phrase \"{phrase}\" is {tokens} tokens long, the text model \
         takes {window}; shorten it in the concepts file"
    )]
    Phrase {
        /// The concept.
        concept: String,
        /// The phrase.
        phrase: String,
        /// Its tokens, without start and end.
        tokens: usize,
        /// Tokens that fit, without start and end.
        window: usize,
    },
    /// The model's features are not finite.
    #[error("the text features of \"{phrase}\" are not finite: the model's weights are broken")]
    Features {
        /// The phrase.
        phrase: String,
    },
    /// The scorer answered in another shape.
    #[error("the {what} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// Scores or gradient.
        what: &'static str,
        /// Shape answered.
        got: Vec<usize>,
        /// Shape expected.
        expected: Vec<usize>,
    },
}

impl From<fairlead_models::Error> for ScorerError {
    fn from(error: fairlead_models::Error) -> Self {
        Self::Network(Box::new(error))
    }
}
