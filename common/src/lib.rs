//! Process plumbing used by two crates or more.

pub mod backoff;
pub mod bounds;
pub mod clock;
pub mod connection;
pub mod door;
pub mod envelope;
pub mod follow;
pub mod grpc;
#[cfg(test)]
mod handshakes;
pub mod identity;
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
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod text;
pub mod tls;
pub mod trace;
