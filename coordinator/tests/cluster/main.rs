//! The coordinator over real gRPC, with scripted workers and energy nodes.

mod access;
mod cluster;
mod faults;
mod gate;
mod jobs;
mod node;
mod requests;
mod restart;
mod roles;
mod worker;
