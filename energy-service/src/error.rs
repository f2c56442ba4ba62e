//! What can go wrong: starting and running a node ([`Error`]), and answering a call.

use std::time::Duration;

use fairlead_common::tensor::TensorError;
use tonic::{Code, Status};

use crate::{calibration::FileError, concepts::ConceptsError, scorer::ScorerError};

/// Why a node did not start or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The concepts file.
    #[error(transparent)]
    Concepts(#[from] ConceptsError),
    /// A calibration file.
    #[error(transparent)]
    Calibration(#[from] FileError),
    /// The energy model did not load.
    #[error("the energy model did not load: {0}")]
    Model(#[source] ScorerError),
    /// The energy model's loader panicked.
    #[error("the energy model's loader panicked: {0}")]
    LoaderPanicked(String),
    /// A value given by the operator.
    #[error("{option} {why}")]
    Option {
        /// The command-line option.
        option: &'static str,
        /// What is wrong and what to do.
        why: String,
    },
    /// The coordinator's address is no address.
    #[error("--coordinator: {0}")]
    Coordinator(#[from] fairlead_common::grpc::AddressError),
    /// The system refused a socket or a thread.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The gRPC server failed.
    #[error("the gRPC server failed: {0}")]
    Server(#[from] tonic::transport::Error),
    /// The descriptors of the contract are broken, which a build rules out.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Why a call is refused or fails. [`RequestError::code`] is the one place that maps it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("`{field}` {why}")]
    Invalid { field: &'static str, why: String },
    #[error(transparent)]
    Tensor(#[from] TensorError),
    #[error("`png`: {0}")]
    Png(String),
    #[error("concept `{concept}` is not served here; this node serves: {served}")]
    UnknownConcept { concept: String, served: String },
    #[error(
        "concept `{concept}`: version {asked} was asked for, this node serves {served}; take \
         versions from Describe and pin them anew"
    )]
    WrongVersion { concept: String, asked: String, served: String },
    #[error(
        "concept `{concept}` is served here already, in other words or in another set; send only new ones, under \
         names of their own"
    )]
    ServedAlready { concept: String },
    #[error(
        "this node has no calibration of these very concepts, without which policies over all concepts would \
         refuse jobs: make one with `fairlead calibrate --concepts FILE` in the node's --calibrations, or allow \
         it with --uncalibrated"
    )]
    Uncalibrated,
    #[error(
        "{concepts} concepts would be too many: a node serves at most {most}; start another one"
    )]
    TooManyConcepts { concepts: usize, most: usize },
    #[error("the concepts are served until the node stops, but could not be kept: {0}")]
    NotKept(String),
    #[error("the calibrations cannot be read: {0}")]
    Calibrations(#[from] FileError),
    #[error(
        "no calibration for {setup} (this node has: {present}); make one with `{command}`, or let \
         the policy set allow_calibration_fallback"
    )]
    NoCalibration { setup: String, present: String, command: String },
    #[error(
        "calibration {id} covers t / T from {} to {}, not {time}; calibrate with the window you \
         steer in: `{command} --window-start .. --window-end ..`", window.0, window.1
    )]
    OutsideCalibration { id: String, time: f32, window: (f32, f32), command: String },
    #[error(
        "calibration {id} is not for this run ({ways}); extend it with `{command}`, or let the policy set \
         outside = \"withhold-unless-clear\""
    )]
    OutsideEnvelope { id: String, ways: String, command: String },
    #[error(
        "concept `{concept}` has no calibration for generator {generator} and no \
         `fallback_threshold` in the concepts file; run `fairlead calibrate`, or add the threshold"
    )]
    NoThreshold { concept: String, generator: String },
    #[error("the queue is full ({queue} requests wait); retry later or add an energy node")]
    QueueFull { queue: usize },
    #[error("the energy model is still loading; wait for the health service to say SERVING")]
    Loading,
    #[error("this energy node can no longer score: {0}; restart it")]
    Stopped(String),
    #[error("no answer within {0:?}; send fewer images a call, or add an energy node")]
    Late(Duration),
    #[error("scoring failed: {0}")]
    Scorer(#[from] ScorerError),
    #[error("the energy model's score of {concepts} is not finite; no verdict")]
    Score { concepts: String },
    #[error(
        "the gradient of image {image} is {what} although the gate of {concepts} is open; the \
         image cannot be steered and must not be released"
    )]
    Gradient { image: usize, what: &'static str, concepts: String },
}

impl RequestError {
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::Tensor(_) | Self::Png(_) => Code::InvalidArgument,
            Self::UnknownConcept { .. } | Self::WrongVersion { .. } => Code::NotFound,
            Self::ServedAlready { .. } => Code::AlreadyExists,
            Self::NoCalibration { .. }
            | Self::OutsideCalibration { .. }
            | Self::OutsideEnvelope { .. }
            | Self::NoThreshold { .. }
            | Self::Calibrations(_)
            | Self::Uncalibrated => Code::FailedPrecondition,
            Self::QueueFull { .. } | Self::TooManyConcepts { .. } => Code::ResourceExhausted,
            Self::Loading | Self::Stopped(_) => Code::Unavailable,
            Self::Late(_) => Code::DeadlineExceeded,
            Self::Scorer(ScorerError::Phrase { .. }) => Code::InvalidArgument,
            Self::NotKept(_) | Self::Scorer(_) | Self::Score { .. } | Self::Gradient { .. } => {
                Code::Internal
            }
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
