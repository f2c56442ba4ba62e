//! The one case where the right answer is known: a mixture of two Gaussians in 64 dimensions,
//! `N(+m, I)` and `N(-m, I)` with `|m| = 4`, whose denoiser is exact. "Unsafe" is the side of `+m`;
//! the gate is open until the clean estimate lies well on the other one.

use super::{Mode, Push, Window, correct};
use crate::{
    noise,
    sampler::{Step, choose},
};

const DIMENSIONS: usize = 64;
const SAMPLES: u64 = 200;
const DISTANCE: f32 = 4.0;

/// Unit direction from one mode to the other.
fn direction() -> Vec<f32> {
    // A seed that no sample takes.
    let raw = noise::normal(SAMPLES, DIMENSIONS);
    let norm = dot(&raw, &raw).sqrt();
    raw.iter().map(|v| v / norm).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The noise in `x` by the exact posterior mean: at level (signal, noise) the state is a mixture of
/// `N(+-signal m, I)`, so the sign's posterior mean is `tanh(signal m . x)`.
fn exact_noise(step: &Step, x: &[f32], m: &[f32]) -> Vec<f32> {
    let (signal, noise) = (step.level.signal, step.level.noise);
    let sign = (signal * DISTANCE * dot(x, m)).tanh();
    x.iter()
        .zip(m)
        .map(|(&x, &m)| {
            let mean = sign * DISTANCE * m;
            let clean = mean + signal * (x - signal * mean);
            (x - signal * clean) / noise
        })
        .collect()
}

/// Share of samples that end on the unsafe side after 30 steps.
fn unsafe_share(steering: Option<(Mode, f32)>) -> f32 {
    let text = r#"{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": false, "steps_offset": 1,
        "set_alpha_to_one": false}"#;
    let sampler = choose(text).expect("the configuration is supported").sampler;
    let schedule = sampler.schedule(30).expect("30 steps are allowed");
    let (window, m) = (Window { start: 1.0, end: 0.6 }, direction());
    let ends_unsafe = |seed: &u64| {
        let mut x = noise::normal(*seed, DIMENSIONS);
        for step in &schedule {
            let advance = sampler.advance(step, &x, &exact_noise(step, &x, &m));
            x = advance.next;
            let open = dot(&advance.clean, &m) > -0.5 * DISTANCE;
            if let (Some((mode, eta)), true) = (steering, open) {
                let weight = window.weight(step.time);
                let push = Push { eta, amplitude: 1.0, weight, budget: f32::INFINITY };
                let shift = correct(&advance.clean, &m, push).expect("the gradient is finite");
                let by = mode.coefficient(step.level, step.next);
                x.iter_mut().zip(&shift.d).for_each(|(x, d)| *x += by * d);
            }
        }
        dot(&x, &m) > 0.0
    };
    (0..SAMPLES).filter(ends_unsafe).count() as f32 / SAMPLES as f32
}

#[test]
fn unsteered_about_half_are_unsafe() {
    let share = unsafe_share(None);
    assert!((0.4..0.6).contains(&share), "{share}");
}

#[test]
fn holding_the_noise_leaves_none_at_half_strength() {
    assert_eq!(unsafe_share(Some((Mode::HoldNoise, 0.5))), 0.0);
}

#[test]
fn holding_the_state_leaves_a_third_or_more() {
    let share = unsafe_share(Some((Mode::HoldState, 0.5)));
    assert!((0.35..0.67).contains(&share), "{share}");
}

#[test]
fn shifting_the_state_needs_a_third_of_the_strength() {
    assert_eq!(unsafe_share(Some((Mode::ShiftState, 0.5 / 3.0))), 0.0);
    assert!(unsafe_share(Some((Mode::ShiftState, 0.05))) > 0.0);
}
