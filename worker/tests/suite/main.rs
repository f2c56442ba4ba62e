//! The worker's tests: parity with diffusers, the engine on formulas, the hub over real gRPC.

mod cluster;
mod common;
mod engine;
mod folders;
mod hub;
mod parity;
mod toy;
