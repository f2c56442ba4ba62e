//! Process plumbing used by two crates or more.

pub mod backoff;
pub mod clock;
pub mod envelope;
pub mod grpc;
pub mod ids;
pub mod limits;
pub mod metrics;
pub mod parameters;
pub mod parse;
pub mod picture;
pub mod probe;
pub mod record;
pub mod shutdown;
pub mod signature;
pub mod steering;
pub mod telemetry;
pub mod tensor;
#[cfg(feature = "testing")]
pub mod testing;
pub mod text;
pub mod tls;
pub mod trace;
