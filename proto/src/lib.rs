//! The contract between Fairlead's processes, generated from `fairlead/v1/*.proto`.

/// Package `fairlead.v1`.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::unwrap_used, unreachable_pub)]
    tonic::include_proto!("fairlead.v1");
}

/// Encoded `FileDescriptorSet` of the contract, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Version of the contract; both sides of a handshake compare it and refuse a mismatch.
pub const PROTOCOL_VERSION: u32 = 3;

/// Version of resize, crops and normalisation between workers and energy nodes.
pub const PREPROCESSING_VERSION: u32 = 1;

/// Names of the samplers, as calibrations, records and policies have them.
pub const SAMPLERS: [&str; 2] = ["ddim", "flow-euler"];

/// Largest message either side sends or accepts, set on every client and server.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
