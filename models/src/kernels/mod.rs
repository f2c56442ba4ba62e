//! CPU kernels on plain `f32` slices.
//!
//! Rules of this room: every sample is computed with arithmetic that does not depend on the batch, on its
//! place in it, or on the number of threads; sums have one fixed order. It is the room of the project
//! with `unsafe` code: vector instructions, outputs that several threads fill at once, and what the whole
//! process shares.
#![allow(unsafe_code)]

pub(crate) mod attention;
pub(crate) mod elementwise;
mod gemm;
pub(crate) mod norm;
mod process;
pub(crate) mod product;
pub(crate) mod resize;
mod scratch;
mod simd;
pub(crate) mod winograd;

pub(crate) use gemm::Lhs;
pub use process::prepare_process;
