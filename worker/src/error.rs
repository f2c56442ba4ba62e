//! What can go wrong in a worker, and whether another attempt may succeed.

use std::path::PathBuf;

use fairlead_common::limits::FieldError;

/// An error of the worker. Messages say what, where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A network refused its folder or its input.
    #[error(transparent)]
    Model(fairlead_models::Error),
    /// Tensor arithmetic failed.
    #[error("tensor arithmetic: {0}")]
    Tensor(candle_core::Error),
    /// The device failed or has no memory left. What it computes afterwards cannot be relied on.
    #[error("the device failed: {0}; another worker can make this, and this one must start again")]
    Device(candle_core::Error),
    /// A model folder that cannot be served.
    #[error("model folder {}: {reason}", path.display())]
    Folder {
        /// The folder or file at fault.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// An option or a field of the request is out of range.
    #[error("{field}: {reason}")]
    Request {
        /// The field as the caller knows it.
        field: &'static str,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// An energy node did not give a usable answer and no other node serves its concepts.
    #[error(transparent)]
    Energy(#[from] NodeFailure),
    /// The model produced a value that is not finite, or a gradient that is all zero.
    #[error("image {index}, step {step}: {what}; the image is refused, not called safe")]
    Numeric {
        /// Index of the image in the job.
        index: u32,
        /// Step of the trajectory, from 0; the number of steps for the finished image.
        step: u32,
        /// What was found.
        what: &'static str,
    },
    /// A finished picture could not be encoded.
    #[error("image {index}: PNG encoding failed: {source}")]
    Png {
        /// Index of the image in the job.
        index: u32,
        /// The encoder's complaint.
        source: png::EncodingError,
    },
    /// A bug: computing the shard panicked.
    #[error("the engine panicked: {message}; please report this with the request")]
    Panic {
        /// The panic's message.
        message: String,
    },
    /// The work was cancelled; nothing of it may be released.
    #[error("cancelled")]
    Cancelled,
    /// The thread that owns a model is gone.
    #[error("the engine thread of model `{model}` has ended; restart the worker")]
    EngineGone {
        /// Name of the model.
        model: String,
    },
    /// The coordinator cannot be reached or refused the worker.
    #[error("coordinator {address}: {reason}")]
    Coordinator {
        /// Its address.
        address: String,
        /// What happened and what to do.
        reason: String,
    },
}

/// A node that failed, and for which concepts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("energy node {node}, concepts {concepts}: {reason}", concepts = listed(concepts))]
pub struct NodeFailure {
    /// Id and address of the node, or "none" where no node serves the concepts.
    pub node: String,
    /// Names of the concepts it was asked for.
    pub concepts: Vec<String>,
    /// What it did.
    pub reason: String,
    /// Whether a later attempt may succeed without anyone changing the request.
    pub retryable: bool,
}

/// The first few names, and how many there are beyond.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 4;
    match names.len().saturating_sub(SHOWN) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names[..SHOWN].join(", ")),
    }
}

impl Error {
    /// Whether another worker or a later attempt may succeed with the same request.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Energy(failure) => failure.retryable,
            Self::Tensor(_)
            | Self::EngineGone { .. }
            | Self::Coordinator { .. }
            | Self::Device(_)
            | Self::Panic { .. } => true,
            Self::Model(_)
            | Self::Folder { .. }
            | Self::Request { .. }
            | Self::Numeric { .. }
            | Self::Png { .. }
            | Self::Cancelled => false,
        }
    }

    /// Whether the worker's process must end: its supervisor starts one that opens the device anew.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Device(_))
    }

    /// A request field that is out of range.
    pub(crate) fn request(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Request { field, reason: reason.into() }
    }
}

impl From<FieldError> for Error {
    fn from(FieldError { field, problem }: FieldError) -> Self {
        Self::Request { field, reason: problem }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        if is_of_device(&error) { Self::Device(error) } else { Self::Tensor(error) }
    }
}

impl From<fairlead_models::Error> for Error {
    fn from(error: fairlead_models::Error) -> Self {
        match error {
            fairlead_models::Error::Stopped => Self::Cancelled,
            fairlead_models::Error::Candle(error) if is_of_device(&error) => Self::Device(error),
            error => Self::Model(error),
        }
    }
}

/// Whether an error comes from the driver of a device, e.g. a fault of its memory or the lack of it; not from a
/// request that no device could meet.
fn is_of_device(error: &candle_core::Error) -> bool {
    use candle_core::Error::{Context, Cuda, Metal, WithBacktrace, WithPath};
    match error {
        Cuda(_) | Metal(_) => true,
        Context { inner, .. } | WithPath { inner, .. } | WithBacktrace { inner, .. } => {
            is_of_device(inner)
        }
        _ => false,
    }
}

/// The worker's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_fails_costs_the_process_and_not_the_job() {
        let cuda = || candle_core::Error::Cuda("CUDA_ERROR_ECC_UNCORRECTABLE".into());
        let errors: [Error; 4] = [
            cuda().into(),
            cuda().bt().into(),
            fairlead_models::Error::Candle(cuda()).into(),
            fairlead_models::Error::Candle(cuda().context("conv2d").bt()).into(),
        ];
        for error in errors {
            assert!(error.retryable() && error.is_fatal(), "{error:?}");
            assert!(error.to_string().contains("ECC_UNCORRECTABLE"), "{error}");
        }
        let shape = || candle_core::Error::Msg("shapes do not fit".into());
        let network: Error = fairlead_models::Error::Candle(shape()).into();
        assert!(!network.retryable() && !network.is_fatal(), "it would fail anywhere");
        assert!(!Error::from(shape()).is_fatal());
        let stopped: Error = fairlead_models::Error::Stopped.into();
        assert!(matches!(stopped, Error::Cancelled));
    }

    #[test]
    fn a_node_failure_names_node_and_concepts_but_not_all_of_many() {
        let failure = |count: usize| NodeFailure {
            node: "node-a".into(),
            concepts: (0..count).map(|i| format!("c{i}")).collect(),
            reason: "gone".into(),
            retryable: true,
        };
        assert_eq!(failure(2).to_string(), "energy node node-a, concepts c0, c1: gone");
        assert!(failure(20).to_string().contains("c0, c1, c2, c3 and 16 more: gone"));
    }
}
