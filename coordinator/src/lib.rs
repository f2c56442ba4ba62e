//! The coordinator: admits jobs under an operator's policy, hands their shards to workers under
//! leases with fencing tokens, checks every finished image once more before it is released, and
//! tells clients what became of it.
//!
//! Decisions are pure functions (`admission`, `policy`, `placement`, `lease`, `transition`,
//! `routing`, `levels`, `verdict`); everything outside sits behind the `Store` trait, `object_store` or gRPC.

mod access;
mod admission;
mod clock;
mod config;
mod contact;
mod deploy;
mod disclosure;
mod error;
mod events;
mod grpc;
mod handout;
mod health;
mod hub;
mod lease;
mod levels;
mod metrics;
mod outputs;
mod place;
mod placement;
mod policy;
mod registrar;
mod registry;
mod release;
mod retention;
mod routing;
mod server;
mod service;
#[cfg(test)]
mod simulation;
mod state;
mod steering;
mod store;
mod suggest;
mod tenants;
mod transition;
mod verdict;

pub use config::{CoordinatorArgs, CoordinatorOptions, Data, parse_duration};
pub use error::{Error, Result};
pub use lease::{LeaseError, Phase};
pub use outputs::OutputError;
pub use policy::{Outside, Policies, Policy, PolicyError};
pub use server::run;
pub use store::StoreError;
pub use tenants::{Quota, Tenant, Tenants};
pub use transition::Refusal;
