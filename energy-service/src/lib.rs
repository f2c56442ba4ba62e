//! The energy node: a frozen vision-language model that says, at every sampling step, how far a
//! picture is heading towards forbidden concepts, and in which direction on its pixels.
//!
//! A request passes `grpc` (the wire), `service` (what is asked, against which calibration),
//! `engine` (the model's thread) and `evaluate` (crops, scores, gates, energy, gradient), and comes
//! back the same way. New kinds of energy implement [`Scorer`].

pub mod calibration;
mod concepts;
mod config;
mod crops;
mod engine;
mod error;
mod evaluate;
mod gate;
mod grpc;
mod kept;
mod metrics;
mod offer;
mod preprocess;
mod random;
mod register;
mod run;
mod scorer;
mod served;
mod service;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use concepts::{Concept, ConceptSet, ConceptsError};
pub use config::{EnergyArgs, EnergyOptions};
pub use error::Error;
pub use run::{run, run_with_scorer};
pub use scorer::{Learned, Pass, Scorer, ScorerDescription, ScorerError, ScorerLoader};
