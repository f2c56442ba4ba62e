//! Initial noise of one image from its own seed.
//!
//! ChaCha20 keyed with the seed's eight little-endian bytes (the other 24 zero) gives 64-bit
//! words; the top 53 bits of a pair become `u1` in (0, 1] and `u2` in [0, 1), and Box-Muller
//! makes two normal values of them,
//! `sqrt(-2 ln u1) cos(2 pi u2)` and `sqrt(-2 ln u1) sin(2 pi u2)`, in f64 rounded to f32. Image i
//! takes its own stream, so its noise depends neither on the batch nor on its place in it.

use std::f64::consts::TAU;

use rand_chacha::{
    ChaCha20Rng,
    rand_core::{RngCore, SeedableRng},
};

/// `len` independent standard normal values.
pub fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha20Rng::from_seed(key);
    let mut unit = || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut values = Vec::with_capacity(len + 1);
    while values.len() < len {
        let radius = (-2.0 * (1.0 - unit()).ln()).sqrt();
        let (sin, cos) = (TAU * unit()).sin_cos();
        values.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    values.truncate(len);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_tails_are_those_of_a_normal() {
        let values = normal(7, 200_000);
        let moment = |k: i32| {
            values.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / values.len() as f64
        };
        // Five standard errors each.
        assert!(moment(1).abs() < 0.012, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.016, "{}", moment(2));
        assert!(moment(3).abs() < 0.05, "{}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.11, "{}", moment(4));
        let beyond = values.iter().filter(|v| v.abs() > 1.959_964).count();
        assert!((beyond as f64 / 200_000.0 - 0.05).abs() < 0.0025, "{beyond}");
    }

    #[test]
    fn a_seed_is_a_stream_of_its_own() {
        assert_eq!(normal(1, 8)[..5], normal(1, 5)[..]);
        assert_ne!(normal(1, 8), normal(2, 8));
    }
}
